"""A loader that reports which worker process died, or that none answers, with the likely cause."""

import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from detkit.utils.errors import UserError
from detkit.utils.signals import leave_signals_to_parent

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

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        items = super().__iter__()
        start = time.monotonic()
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except RuntimeError as error:
                if _DEAD.match(str(error)):
                    raise WorkerError(_death(error)) from error
                if not _LATE.match(str(error)):
                    raise
                if time.monotonic() - start >= self.limit:
                    raise WorkerError(
                        f"no data came for {self.limit:g} seconds (DATALOADER.TIMEOUT) from"
                        f" {self.num_workers} worker processes. Likely cause: a file system that"
                        " hangs, or a deadlock in code of your own. DATALOADER.NUM_WORKERS 0 shows"
                        " where; raise the limit if an image may take as long."
                    ) from error
                continue  # torch's iterator is unchanged by a timeout, and waits on
            yield item
            start = time.monotonic()


def _leave_signals(worker_id: int) -> None:
    leave_signals_to_parent()


def _death(error: RuntimeError) -> str:
    """Return torch's report of a dead worker, with the likely cause."""
    # torch says that a worker exited, and in the error before it by which signal.
    lines = [str(e).partition("\n")[0].strip(" .") for e in (error, error.__cause__)]
    report = ": ".join(line for line in lines if _DEAD.match(line))
    cause = next((text for sign, text in _CAUSES.items() if sign in report), _OTHER_CAUSE)
    return f"{report}. Likely cause: {cause}."
