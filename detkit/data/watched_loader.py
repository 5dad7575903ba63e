"""A loader that says which worker process died or hangs, and what the likely cause is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

DEFAULT_TIMEOUT = 600.0
# How torch begins what it says of workers that are gone, and of those that it waited for too long.
_GONE = re.compile(r"DataLoader worker \(pid")
_LATE = re.compile(r"DataLoader timed out after")
_CAUSES = {
    "Bus error": (
        "shared memory is full: enlarge /dev/shm (docker run --shm-size 8g), or lower DATALOADER.NUM_WORKERS or "
        "SOLVER.IMS_PER_BATCH"
    ),
    "Killed": (
        "the system ended it, nearly always for want of memory: lower DATALOADER.NUM_WORKERS, or give the job more "
        "memory"
    ),
    "Segmentation fault": "a library crashed over a file: DATALOADER.NUM_WORKERS 0 shows where",
}
_OTHER_CAUSE = "it ran out of memory, or code of your own ended it: DATALOADER.NUM_WORKERS 0 shows where"


class WorkerError(RuntimeError):
    """A process that loads data died or hangs; the message names it and the likely cause."""


class WatchedLoader(DataLoader):
    """A `DataLoader` whose workers are waited for no longer than its `timeout`, and whose errors say what to do."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        items = super().__iter__()
        try:
            yield from items
        except RuntimeError as error:
            if _GONE.match(str(error)):
                told = _told_by(error)
                cause = next((text for sign, text in _CAUSES.items() if sign in told), _OTHER_CAUSE)
                raise WorkerError(f"{told}. Likely cause: {cause}.") from error
            if _LATE.match(str(error)):
                raise WorkerError(
                    f"no data came for {self.timeout:g} seconds (DATALOADER.TIMEOUT){_late_worker(items)}. Likely "
                    "cause: a file system that hangs, or a deadlock in code of your own. DATALOADER.NUM_WORKERS 0 "
                    "shows where; raise the limit if an image may take as long."
                ) from error
            raise


def timeout_for(num_workers: int, timeout: float) -> float:
    """Give the `timeout` of a DataLoader: without worker processes there is nobody to wait for."""
    return timeout if num_workers > 0 else 0


def _told_by(error: BaseException) -> str:
    """Give the first line of an error; torch says that a worker exited, and by which signal in the error before it."""
    lines = [str(e).splitlines()[0].strip(" .") for e in (error, error.__cause__) if e is not None and str(e)]
    return ": ".join(line for line in lines if _GONE.match(line))


def _late_worker(items: Any) -> str:
    """Name the worker whose turn it is, as far as torch's iterator tells."""
    try:
        number = items._task_info[items._rcvd_idx][0]
        return f" from worker {number} (pid {items._workers[number].pid})"
    except (AttributeError, KeyError, IndexError):
        return ""
