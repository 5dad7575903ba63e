"""`--num-gpus 2` without GPUs: kills, signals and errors of a run whose processes are started, not torchrun's."""

import functools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import start_processes

from detkit.cli import train
from tests.end_to_end.victim import outcome, prepare, start, wait_until_asleep
from tests.processes import end_of, group_is_gone, living
from tests.same import same

TWO = ["--num-gpus", "2"]


def train_forked(argv):
    """Train in two processes that begin with everything imported."""
    os.setsid()  # a group of processes of its own, as a terminal gives to a command
    sys.modules["detkit.engine.launch"].spawn = functools.partial(
        start_processes, start_method="fork"
    )
    return train.main([*TWO, *argv])


def train_spawned(argv):
    os.setsid()
    return train.main([*TWO, *argv])


@pytest.fixture
def place_to_run(workplace: Path) -> Path:
    return prepare(workplace)


RUNS = [
    pytest.param(train_forked, id="forked"),
    pytest.param(train_spawned, id="spawned", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("run", RUNS)
def test_killed_and_stopped_run_ends_as_the_undisturbed_one(place_to_run, run):
    begin = functools.partial(start, place_to_run, run=run)
    log = place_to_run / "disturbed.txt"
    assert end_of(begin("whole")) == 0, (place_to_run / "whole.txt").read_text()

    killed = begin("disturbed", plan=[["step", 4]], VICTIM_RANK="1")
    assert end_of(killed) == 1
    assert "signal SIGKILL" in log.read_text()
    assert group_is_gone(killed)

    stopped = begin("disturbed", resume=True, VICTIM_SLEEP="0.2")
    wait_until_asleep(place_to_run)
    os.kill(stopped, signal.SIGTERM)
    assert end_of(stopped) == 75, log.read_text()
    assert "which is saved; --resume goes on" in log.read_text()
    assert group_is_gone(stopped)
    assert not (place_to_run / "disturbed" / "model_final.pth").exists()

    assert end_of(begin("disturbed", resume=True)) == 0, log.read_text()
    assert same(outcome(place_to_run, "disturbed"), outcome(place_to_run, "whole"))


def test_ctrl_c_stops_all_and_twice_at_once(place_to_run):
    begin = functools.partial(
        start, place_to_run, run=train_forked, settings=["SOLVER.MAX_ITER", 1000]
    )
    # To all processes, as a terminal does it.
    once = begin("once", VICTIM_SLEEP="0.5")
    wait_until_asleep(place_to_run)
    os.killpg(once, signal.SIGINT)
    assert end_of(once) == 75, (place_to_run / "once.txt").read_text()
    assert (place_to_run / "once" / "last_checkpoint").exists()

    for path in place_to_run.glob("asleep_*"):
        path.unlink()
    twice = begin("twice", VICTIM_SLEEP="30")
    wait_until_asleep(place_to_run)
    assert len(living(twice)) == 3
    os.killpg(twice, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(twice, signal.SIGINT)
    begun = time.monotonic()
    assert end_of(twice) == -signal.SIGINT
    assert group_is_gone(twice)
    assert time.monotonic() - begun < 10


def test_error_of_one_process_is_shown_and_ends_all(place_to_run):
    failing = start(place_to_run, "failing", plan=[["raise", 3]], VICTIM_RANK="1", run=train_forked)
    begun = time.monotonic()
    assert end_of(failing) == 1
    assert group_is_gone(failing)
    assert time.monotonic() - begun < 30
    said = (place_to_run / "failing.txt").read_text()
    assert (
        "process 1 fails on its own"
        in said.rsplit("Process 1 terminated with the following error", 1)[1]
    )
