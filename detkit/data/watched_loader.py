"""A loader that says which worker process died or hangs, and what the likely cause is."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

DEFAULT_TIMEOUT = 600.0
# Signals tell of a worker that a signal or an error ended; one that ended itself as if all were
# well is seen only when somebody looks, which torch does after its timeout.
_LOOK_PERIOD = 2.0
# How torch begins what it says of workers that are gone, and of those that it waited for too long.
_GONE = re.compile(r"DataLoader worker \(pid")
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


class WorkerError(RuntimeError):
    """A process that loads data died or hangs; the message names it and the likely cause."""


class WatchedLoader(DataLoader):
    """A `DataLoader` whose workers are waited for in bounded time, and whose errors say what to do.

    Attributes:
        limit: Seconds to wait for an item; 0 waits for ever.
    """

    def __init__(self, *args: Any, timeout: float = 0, **kwargs: Any) -> None:
        """Take the arguments of `DataLoader`; its own `timeout` becomes the time between two looks
        at the workers.
        """
        super().__init__(*args, timeout=min(timeout, _LOOK_PERIOD), **kwargs)
        self.limit = timeout

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        items = super().__iter__()
        start = time.monotonic()
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except RuntimeError as error:
                if _GONE.match(str(error)):
                    raise WorkerError(_gone(error)) from error
                if not _LATE.match(str(error)):
                    raise
                if time.monotonic() - start >= self.limit:
                    raise WorkerError(
                        f"no data came for {self.limit:g} seconds"
                        f" (DATALOADER.TIMEOUT){_late_worker(items)}. Likely cause: a file system"
                        " that hangs, or a deadlock in code of your own. DATALOADER.NUM_WORKERS 0"
                        " shows where; raise the limit if an image may take as long."
                    ) from error
                continue  # a look that found nothing wrong leaves torch's iterator as it was
            yield item
            start = time.monotonic()


def timeout_for(num_workers: int, timeout: float) -> float:
    """Return the `timeout` of a DataLoader: without worker processes there is nobody to wait for."""
    return timeout if num_workers > 0 else 0


def _gone(error: RuntimeError) -> str:
    """Return what torch says of a worker that is gone, and the likely cause."""
    told = _told_by(error)
    cause = next((text for sign, text in _CAUSES.items() if sign in told), _OTHER_CAUSE)
    return f"{told}. Likely cause: {cause}."


def _told_by(error: BaseException) -> str:
    """Return the first line of an error; torch says that a worker exited, and by which signal in
    the error before it.
    """
    lines = [
        str(e).splitlines()[0].strip(" .")
        for e in (error, error.__cause__)
        if e is not None and str(e)
    ]
    return ": ".join(line for line in lines if _GONE.match(line))


def _late_worker(items: Any) -> str:
    """Name the worker whose turn it is, as far as torch's iterator tells."""
    try:
        number = items._task_info[items._rcvd_idx][0]
        return f" from worker {number} (pid {items._workers[number].pid})"
    except (AttributeError, KeyError, IndexError):
        return ""
