"""A loader that reports which worker process died, or that none answers, with the likely cause."""

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader

from detkit.utils.errors import UserError
from detkit.utils.logger import log_first_n
from detkit.utils.signals import leave_signals_to_parent
from detkit.utils.text import counted

DEFAULT_TIMEOUT = 600.0
# A worker that a signal or an error ended is reported at once. One that ended as if all were well
# is noticed only when torch's own timeout runs out, so that is kept short.
_LOOK_PERIOD = 2.0
# How torch's messages about dead workers begin, and about workers that it waited for too long.
_DEAD = re.compile(r"DataLoader worker \(pid")
_LATE = re.compile(r"DataLoader timed out after")
_CAUSES = {
    "Bus error": (
        "shared memory is full: enlarge /dev/shm (docker run --shm-size 8g), or lower"
        " DATALOADER.NUM_WORKERS or SOLVER.IMS_PER_BATCH"
    ),
    "Killed": (
        "the system ended it, nearly always for want of memory: lower DATALOADER.NUM_WORKERS, or"
        " give the job more memory"
    ),
    "Segmentation fault": "a library crashed over a file: DATALOADER.NUM_WORKERS 0 shows where",
}
_OTHER_CAUSE = (
    "it ran out of memory, or code of your own ended it: DATALOADER.NUM_WORKERS 0 shows where"
)


class WorkerError(UserError, RuntimeError):
    """A process that loads data died or hangs; the message says so, with the likely cause."""


class WatchedLoader(DataLoader):
    """A `DataLoader` that waits a bounded time for its workers, and explains their end.

    Attributes:
        limit: Seconds to wait for an item; 0 waits forever.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        num_workers: int = 0,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the arguments of `DataLoader`; `timeout` is not used without workers."""
        self.limit = timeout if num_workers > 0 else 0
        super().__init__(
            dataset,
            num_workers=num_workers,
            timeout=min(self.limit, _LOOK_PERIOD),
            worker_init_fn=_leave_signals if worker_init_fn is None else worker_init_fn,
            # A generator of its own: the numbers that a loader draws would change the training's.
            generator=torch.Generator().manual_seed(0),
            **kwargs,
        )

    def check_worker_number_rationality(self) -> None:
        """Say once that there are more workers than cores, in place of torch's warning."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        if cores and self.num_workers > cores:
            log_first_n(
                logging.INFO,
                f"{self.num_workers} processes load images (DATALOADER.NUM_WORKERS), more than the"
                f" {counted(cores, 'core', 'cores')} of this machine",
                key="more workers than cores",
            )

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        items = super().__iter__()
        watch = _Watch(self.limit, getattr(items, "_workers", ()))
        try:
            while True:
                watch.start_waiting()
                try:
                    item = next(items)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:
                    if watch.has_ended_workers:
                        watch.join_workers()
                        raise WorkerError(
                            f"no data came for {self.limit:g} seconds (DATALOADER.TIMEOUT) from"
                            f" {self.num_workers} worker processes. Likely cause: a file system"
                            " that hangs, or a deadlock in code of your own. DATALOADER.NUM_WORKERS"
                            " 0 shows where; raise the limit if an image may take as long."
                        ) from error
                    if _DEAD.match(str(error)):
                        raise WorkerError(_death(error)) from error
                    if not _LATE.match(str(error)):
                        raise
                    continue  # torch's iterator is unchanged by a timeout, and waits on
                watch.stop_waiting()
                yield item
        finally:
            watch.stop()


class _Watch:
    """Kills worker processes once a loader has waited for them longer than a limit.

    In a thread: torch's own timeout does not cover the memory of a tensor, for which the reader
    asks the worker that made it, and a frozen one (SIGSTOP, a file system that hangs) never
    answers. Killed and not terminated: a frozen process does not receive SIGTERM, and Python would
    wait for its end.
    """

    def __init__(self, limit: float, workers: Sequence[BaseProcess]) -> None:
        self.has_ended_workers = False
        self._limit = limit
        self._workers = workers
        self._waiting_since: float | None = None
        self._stopped = threading.Event()
        if limit > 0:
            threading.Thread(target=self._run, daemon=True).start()

    def start_waiting(self) -> None:
        # Kept through torch's timeouts, which come while nothing has.
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()

    def stop_waiting(self) -> None:
        self._waiting_since = None

    def stop(self) -> None:
        self._stopped.set()

    def join_workers(self) -> None:
        # torch raises an error for each worker that dies, wherever the process is: within `join` it
        # may be after the end of the worker and before the note of it, and to Python the worker
        # would be alive for ever. So first wait for their ends, by their pipes, and the signals.
        running = {worker.sentinel for worker in self._workers}
        while running:
            with contextlib.suppress(RuntimeError):
                running.difference_update(wait(running))
        for _ in self._workers:
            with contextlib.suppress(RuntimeError):
                time.sleep(0.01)
        for worker in self._workers:
            with contextlib.suppress(RuntimeError):
                worker.join()

    def _run(self) -> None:
        while not self._stopped.wait(min(self._limit, _LOOK_PERIOD)):
            since = self._waiting_since
            if since is not None and time.monotonic() - since >= self._limit:
                self.has_ended_workers = True
                for worker in self._workers:
                    worker.kill()
                return


def _leave_signals(worker_id: int) -> None:
    leave_signals_to_parent()


def _death(error: Exception) -> str:
    """Return torch's report of a dead worker, with the likely cause."""
    # torch says that a worker exited, and in the error before it by which signal.
    lines = [str(e).partition("\n")[0].strip(" .") for e in (error, error.__cause__)]
    report = ": ".join(line for line in lines if _DEAD.match(line))
    cause = next((text for sign, text in _CAUSES.items() if sign in report), _OTHER_CAUSE)
    return f"{report}. Likely cause: {cause}."
