import multiprocessing
import os
import signal
import sys
import time
from typing import Any

import pytest
import torch

from detkit.config import get_cfg
from detkit.data import build_detection_train_loader
from detkit.data.watched_loader import WatchedLoader, WorkerError, _Watch


class Fails:
    """Items that end or hang the process that makes them."""

    def __init__(self, deed):
        self.deed = deed

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 1:
            self.deed()
        return index


def hang():
    time.sleep(1.5)  # long beside the limit; torch waits for its end to tidy up


def die_of(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        pytest.param(
            die_of(signal.SIGKILL),
            r"worker \(pid.* \d+\).*Killed.* Likely cause: .*memory.*NUM_WORKERS",
            id="killed",
        ),
        pytest.param(
            die_of(signal.SIGBUS),
            r"\(pid.* \d+\).*Likely cause: shared memory is full: .*/dev/shm",
            id="bus",
        ),
        pytest.param(
            lambda: os._exit(3),
            r"\(pid.* \d+\).* Likely cause: it ran out of memory, or code",
            id="exit",
        ),
    ],
)
def test_worker_that_dies_is_named_with_the_likely_cause(deed, message):
    with pytest.raises(WorkerError, match=message):
        list(WatchedLoader(Fails(deed), batch_size=None, num_workers=1, timeout=20))


@pytest.mark.parametrize("deed", [lambda: os._exit(0), sys.exit], ids=["_exit", "sys.exit"])
def test_worker_that_ends_itself_without_an_error_is_noticed_soon(deed, monkeypatch):
    monkeypatch.setattr("detkit.data.watched_loader._LOOK_PERIOD", 0.2)
    start = time.monotonic()
    with pytest.raises(
        WorkerError, match=r"\(pid.* \d+\) exited unexpectedly\. Likely cause: .*code of your own"
    ):
        list(WatchedLoader(Fails(deed), batch_size=None, num_workers=2, timeout=30))
    assert time.monotonic() - start < 20


def test_worker_may_take_longer_than_the_time_between_two_looks(monkeypatch):
    monkeypatch.setattr("detkit.data.watched_loader._LOOK_PERIOD", 0.2)
    items = list(
        WatchedLoader(Fails(lambda: time.sleep(1)), batch_size=None, num_workers=1, timeout=20)
    )
    assert items == [0, 1, 2, 3]


def test_worker_that_hangs_is_named_in_bounded_time():
    start = time.monotonic()
    with pytest.raises(
        WorkerError,
        match=r"no data came for 0\.3 seconds .*TIMEOUT.* from 1 worker processes\. Likely cause: .*hangs",
    ):
        list(WatchedLoader(Fails(hang), batch_size=None, num_workers=1, timeout=0.3))
    assert time.monotonic() - start < 20


def test_training_loader_waits_as_long_as_it_is_told():
    cfg = get_cfg()
    assert cfg.DATALOADER.TIMEOUT == 600
    loader = build_detection_train_loader(
        [{"file_name": "a", "width": 1, "height": 1}] * 4,
        mapper=lambda record: hang(),
        total_batch_size=1,
        num_workers=1,
        timeout=0.3,
    )
    with pytest.raises(WorkerError, match=r"no data came for 0\.3 seconds"):
        next(iter(loader))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_items_come_as_they_are(num_workers):
    assert list(WatchedLoader(range(5), batch_size=None, num_workers=num_workers)) == [
        0,
        1,
        2,
        3,
        4,
    ]


def test_other_errors_pass():
    def fail():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        list(WatchedLoader(Fails(fail), batch_size=None))


class Tensors:
    """Tensors of shared memory, which the reader fetches from the worker that made them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((1000,), index)


@pytest.mark.parametrize("number_of_items", [1, 3])
def test_frozen_workers_end_the_wait_and_do_not_outlive_it(number_of_items):
    others = multiprocessing.active_children()  # of tests before, in the same process
    # The first item comes within this time too: on a busy machine workers take a second to start.
    items = iter(WatchedLoader(Tensors(), batch_size=None, num_workers=2, timeout=2))
    for _ in range(number_of_items):
        next(items)
    time.sleep(0.3)  # they have made what may wait, and freeze beside it
    workers = set(multiprocessing.active_children()).difference(others)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(WorkerError, match="no data came for 2 seconds"):
        list(items)
    assert time.monotonic() - start < 10
    assert workers.isdisjoint(multiprocessing.active_children())


def test_worker_whose_end_python_has_missed_is_not_waited_for():
    class Missed:
        """A worker that has ended, whose exit code an error of torch's took away."""

        looks = 0

        def __init__(self):
            self.sentinel, writer = os.pipe()
            os.close(writer)

        def is_alive(self):
            self.looks += 1
            assert self.looks < 100, "waits without end"
            return True

        def join(self):
            raise RuntimeError("DataLoader worker is killed")

    worker: Any = Missed()
    _Watch(0, [worker]).join_workers()
    os.close(worker.sentinel)


def test_reader_may_take_its_time():
    items = iter(WatchedLoader(Tensors(), batch_size=None, num_workers=1, timeout=0.3))
    first = next(items)
    time.sleep(1)
    assert [first[0], *(item[0] for item in items)] == list(range(8))


def test_more_workers_than_cores_are_told_once_in_words_of_a_key(caplog, monkeypatch, recwarn):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    with caplog.at_level("INFO", logger="detkit"):
        for _ in range(2):
            assert list(WatchedLoader([1, 2], num_workers=2, batch_size=None)) == [1, 2]
    told = [m for m in caplog.messages if "more than the 1 core" in m]
    assert told == [
        "2 processes load images (DATALOADER.NUM_WORKERS), more than the 1 core of this machine"
    ]
    assert not [w for w in recwarn if "worker processes" in str(w.message)]
