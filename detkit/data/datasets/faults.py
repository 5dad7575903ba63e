"""Faults of single entries of a data set's files: an error in a run, a list for the doctor.

A run must not start on data that nobody meant; who looks for faults wants all of them at once.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from detkit.utils.errors import UserError


@dataclass(frozen=True)
class Fault:
    """What is wrong with one entry."""

    code: str
    message: str
    file: str = ""
    """The image; empty where the fault is not of one image."""
    annotation: str | int | None = None


_collected: ContextVar[list[Fault] | None] = ContextVar("collected", default=None)


@contextlib.contextmanager
def collected_faults() -> Iterator[list[Fault]]:
    """Within the block, have readers list faults, leave out what they are of, and go on."""
    faults: list[Fault] = []
    token = _collected.set(faults)
    try:
        yield faults
    finally:
        _collected.reset(token)


def is_collecting() -> bool:
    """Return whether faults are listed instead of raised."""
    return _collected.get() is not None


def collect(
    error: UserError, code: str, *, file: str = "", annotation: str | int | None = None
) -> None:
    """List a fault, whose entry the caller leaves out; raise the error where nobody collects.

    Args:
        error: What a run would end with.
        code: One of `detkit.data.doctor.KINDS`.
        file: The image.
        annotation: Its id in the file, or what else it is called there.
    """
    faults = _collected.get()
    if faults is None:
        raise error
    faults.append(Fault(code, str(error), file, annotation))
