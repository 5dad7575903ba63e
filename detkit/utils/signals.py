"""Handling of the signals that stop a run."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit status of a stopped run that can continue with --resume (EX_TEMPFAIL of sysexits.h)."""

# Slurm can send SIGUSR1 before the end of a job; Windows does not have it.
_STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


@contextlib.contextmanager
def asked_to_stop(call: Callable[[int], Any]) -> Iterator[None]:
    """Call a function with the number of each stop signal, instead of ending the process.

    A second Ctrl-C ends the process immediately. Has no effect outside the main thread, as only
    that receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # The default of the system: Python's handler does not run while a collective waits.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        call(number)

    before = {number: signal.signal(number, receive) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def leave_signals_to_parent() -> None:
    """Let a worker process ignore stop signals; a second SIGTERM ends it."""
    # All processes of a run get the signal. The parent finishes its step, for which it may need
    # data, and ends its workers itself, by SIGTERM if one hangs.
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    signal.signal(signal.SIGTERM, receive)


def name_of(number: int) -> str:
    """Return the name of a signal."""
    return signal.Signals(number).name
