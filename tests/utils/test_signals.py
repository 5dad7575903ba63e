import os
import signal
import threading

import pytest

from detkit.utils.signals import asked_to_stop, leave_signals_to_parent, name_of


def in_child(function):
    """The status with which a forked process ends: its own, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_is_told_and_handlers_are_put_back(number):
    before, received = signal.getsignal(number), []
    with asked_to_stop(received.append):
        os.kill(os.getpid(), number)
    assert received == [number]
    assert signal.getsignal(number) == before


def test_second_interrupt_ends_the_process_at_once():
    def twice():
        with asked_to_stop(lambda number: None):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    assert in_child(twice) == -signal.SIGINT


def test_other_threads_are_left_alone():
    def enter():
        with asked_to_stop(print):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen, before = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]


def test_worker_outlives_what_asks_its_parent_to_stop():
    def ask(*numbers):
        def run():
            leave_signals_to_parent()
            for number in numbers:
                os.kill(os.getpid(), number)

        return run

    assert in_child(ask(signal.SIGINT, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)) == 0
    assert in_child(ask(signal.SIGTERM, signal.SIGTERM)) == 128 + signal.SIGTERM


def test_signal_has_a_name():
    assert name_of(15) == "SIGTERM"
