"""Training processes that are killed with SIGKILL, again and again, end where the undisturbed one ends, bit for bit."""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from detkit.cli import train
from tests.end_to_end.victim import outcome, prepare, start, wait_until_asleep
from tests.processes import end_of, free_port, group_is_gone, torchrun_agent
from tests.same import same

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place_to_run(workplace: Path) -> Path:
    return prepare(workplace)


def test_one_kill(place_to_run: Path) -> None:
    assert end_of(start(place_to_run, "whole")) == 0
    assert end_of(start(place_to_run, "killed", plan=[["step", 4]])) == -signal.SIGKILL
    assert end_of(start(place_to_run, "killed", resume=True)) == 0
    assert same(outcome(place_to_run, "killed"), outcome(place_to_run, "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 4])
def test_twenty_kills(place_to_run: Path, workers: int) -> None:
    settings = ["SOLVER.MAX_ITER", 120, "SOLVER.STEPS", "(60,)", "DATALOADER.NUM_WORKERS", workers]
    assert end_of(start(place_to_run, "whole", settings=settings)) == 0
    rng, kills = random.Random(workers), Counter()
    while sum(kills.values()) < 20:
        place, most = rng.choice(
            [("step", 4), ("writing", 3), ("tagging", 2), ("evaluation", 3), ("any time", 0)]
        )
        plan = [[place, rng.randint(1, most)]] if most else []
        child = start(place_to_run, "killed", plan=plan, settings=settings, resume=bool(kills))
        if not most:
            time.sleep(rng.uniform(0.05, 0.8))
            os.kill(child, signal.SIGKILL)
        status = end_of(child)
        assert status == -signal.SIGKILL, (place_to_run / "killed.txt").read_text()[-3000:]
        kills[place] += 1
    print(dict(kills))
    assert {"step", "writing", "evaluation"} <= set(kills)
    assert not (place_to_run / "killed" / "model_final.pth").exists()
    assert end_of(start(place_to_run, "killed", settings=settings, resume=True)) == 0
    assert same(outcome(place_to_run, "killed"), outcome(place_to_run, "whole"))


def of_rank_one(folder: Path, output: str) -> dict[str, str]:
    return {"VICTIM_RANK": "1", "VICTIM_RECORD": str(folder / f"{output}.kills")}


def torchrun(folder: Path, output: str, *, plan=(), settings=()) -> None:
    """Train under torchrun, with as many restarts as kills."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv += [
        f"--max-restarts={len(plan)}",
        "--monitor-interval=0.1",
        str(ROOT / "tools" / "train_net.py"),
    ]
    argv += ["--config-file", "run.yaml", "OUTPUT_DIR", output, *map(str, settings)]
    paths = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    variables = {"VICTIM_PLAN": json.dumps(plan), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    variables["CUDA_VISIBLE_DEVICES"] = ""
    variables |= of_rank_one(folder, output)
    done = subprocess.run(
        argv, env={**os.environ, **variables}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-5000:]


def forked_torchrun(folder: Path, output: str, *, plan=(), settings=()) -> None:
    """The same with the agent called in a process of its own, which forks the others."""
    run = functools.partial(torchrun_agent, train.main, port=free_port(), max_restarts=len(plan))
    status = end_of(
        start(folder, output, plan=plan, settings=settings, run=run, **of_rank_one(folder, output))
    )
    assert status == 0, (folder / f"{output}.txt").read_text()[-5000:]


def check_kills_of_one_rank(folder: Path, run, plan, *settings) -> None:
    run(folder, "whole", settings=settings)
    run(folder, "killed", plan=plan, settings=settings)
    assert (folder / "killed.kills").stat().st_size == len(plan)
    log = (folder / "killed" / "log.txt").read_text()
    assert log.count("by torchrun: going on from the last checkpoint") == len(plan)
    assert same(outcome(folder, "killed"), outcome(folder, "whole"))


def test_one_kill_of_one_rank_under_torchrun(place_to_run: Path) -> None:
    check_kills_of_one_rank(place_to_run, forked_torchrun, [["step", 4]])


def test_torchrun_that_is_told_to_stop_saves_first(place_to_run: Path) -> None:
    def run(argv):
        os.setsid()
        torchrun_agent(train.main, argv, port=free_port(), max_restarts=1)

    agent = start(
        place_to_run, "stopped", settings=["SOLVER.MAX_ITER", 1000], run=run, VICTIM_SLEEP="0.3"
    )
    wait_until_asleep(place_to_run)
    os.kill(agent, signal.SIGTERM)
    assert end_of(agent) == 1  # torchrun's own
    assert group_is_gone(agent)
    assert "which is saved; --resume goes on" in (place_to_run / "stopped" / "log.txt").read_text()
    assert (place_to_run / "stopped" / "last_checkpoint").exists()


@pytest.mark.slow
@pytest.mark.parametrize("run", [torchrun, forked_torchrun])
def test_kills_of_one_rank_under_torchrun(place_to_run: Path, run) -> None:
    rng = random.Random(0)
    plan = [
        [place, rng.randint(1, most)]
        for place, most in [("step", 4), ("evaluation", 2), ("step", 5), ("step", 3)]
    ]
    check_kills_of_one_rank(place_to_run, run, plan, "SOLVER.MAX_ITER", 20)
