import functools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from detkit.engine import launch
from detkit.engine.rendezvous import fresh_part
from detkit.utils import comm
from tests.processes import end_of, fork, free_port, torchrun_agent

SECOND = timedelta(seconds=1)


def meet(store, world_size, timeout=5 * SECOND):
    """What each of the processes of one start gets."""
    with ThreadPoolExecutor(world_size) as threads:
        ranks = [
            threads.submit(fresh_part, store, rank=rank, world_size=world_size, timeout=timeout)
            for rank in reversed(range(world_size))
        ]
        return [future.result() for future in reversed(ranks)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_processes_of_a_start_share_what_those_before_have_not(world_size):
    store = HashStore()
    for start in range(3):
        parts, counts = zip(*meet(store, world_size), strict=True)
        assert set(counts) == {start}
        assert not parts[-1].check(["address"])
        parts[0].set("address", str(start))
        assert {part.get("address") for part in parts} == {str(start).encode()}


def test_process_that_is_gone_takes_nobody_in():
    store = HashStore()
    with ThreadPoolExecutor(2) as threads:
        # Killed before process 0 of its start had come: its question stands in the store.
        with pytest.raises(RuntimeError):
            fresh_part(store, rank=1, world_size=2, timeout=timedelta(milliseconds=50))
        main = threads.submit(fresh_part, store, rank=0, world_size=2, timeout=5 * SECOND)
        time.sleep(0.1)
        assert not main.done()
        other, _ = fresh_part(store, rank=1, world_size=2, timeout=5 * SECOND)
        main.result()[0].set("address", "here")
        assert other.get("address") == b"here"


def test_processes_that_do_not_come_are_named():
    with pytest.raises(TimeoutError, match=r"2 processes did not come within 0:00:00\.05.*: 1, 2"):
        fresh_part(HashStore(), rank=0, world_size=3, timeout=timedelta(milliseconds=50))


def worker(record):
    start = record.stat().st_size if record.exists() else 0
    if start and os.environ["RANK"] == "0":
        time.sleep(
            0.5
        )  # so that the other comes first, and would find what the last process 0 has left
    launch(fail_at_first, 1, args=(record, start))
    launch(is_no_restart_of_the_first, 1, args=(record, start))


def fail_at_first(record, start):
    assert comm.get_num_restarts() == start
    assert comm.all_gather(start) == [start, start]
    comm.synchronize()
    if start == 0 and comm.get_rank() == 1:
        record.write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def is_no_restart_of_the_first(record, start):
    assert comm.get_num_restarts() == start
    if comm.is_main_process():
        record.with_name("done").touch()


@pytest.mark.parametrize("num_machines", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_restart_by_torchrun_meets_at_the_first_attempt(tmp_path, num_machines):
    machine = functools.partial(
        torchrun_agent,
        worker,
        tmp_path / "record",
        port=free_port(),
        num_processes=2 // num_machines,
        num_machines=num_machines,
        max_restarts=1,
    )
    agents = [fork(machine, output=tmp_path / "output.txt") for _ in range(num_machines)]
    assert [end_of(process) for process in agents] == [0] * num_machines, (
        tmp_path / "output.txt"
    ).read_text()
    assert (tmp_path / "done").exists()
