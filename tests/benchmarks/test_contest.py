import os
from collections.abc import Callable

import pytest
import torch
from contest import OwnProcess


def counter(start: int) -> Callable[[], tuple[int, int, int]]:
    """Return a function that counts its calls, and says in which process and with how many threads."""
    calls = [start]

    def count() -> tuple[int, int, int]:
        calls[0] += 1
        if calls[0] == 13:
            raise ValueError("thirteen is not counted")
        if calls[0] == 23:
            os._exit(1)
        return calls[0], os.getpid(), torch.get_num_threads()

    return count


def no_side() -> Callable[[], None]:
    raise ValueError("nothing can be built")


def test_function_lives_in_another_process_and_keeps_its_state() -> None:
    side = OwnProcess(counter, 10)
    (first, process, threads), (second, same_process, _) = side(), side()
    assert (first, second) == (11, 12)
    assert process == same_process != os.getpid()
    assert threads == torch.get_num_threads()
    with pytest.raises(RuntimeError, match="thirteen is not counted"):
        side()


def test_failure_to_build_shows_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="nothing can be built"):
        OwnProcess(no_side)


def test_death_of_the_process_is_an_error_and_no_endless_wait() -> None:
    side = OwnProcess(counter, 22)
    with pytest.raises(RuntimeError, match="a process of the benchmark died"):
        side()
