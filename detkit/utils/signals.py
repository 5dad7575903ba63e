"""Signals that ask a run to stop, and the exit status of a run that did."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

STOPPED = 75
"""Exit status of a run that has saved and can continue with --resume (EX_TEMPFAIL, sysexits.h)."""

# Slurm can send SIGUSR1 some time before the end of a job; Windows has none.
_ASKING = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


@contextlib.contextmanager
def asked_to_stop(call: Callable[[int], Any]) -> Iterator[None]:
    """Call a function with the number of each signal to stop, instead of ending the process.

    A second Ctrl-C ends the process at once. Without effect outside the main thread, which alone
    receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def receive(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # The system's handler: Python's own does not run during a wait for another process.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        call(number)

    before = {number: signal.signal(number, receive) for number in _ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def leave_signals_to_parent() -> None:
    """Let a worker process ignore signals to stop; a second SIGTERM ends it."""
    # All processes of a run get the signal. The parent still finishes a step, for which it may need
    # data, and ends its workers itself; a hanging one by SIGTERM.
    for number in _ASKING:
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
