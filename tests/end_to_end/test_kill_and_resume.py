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
import torch

from detkit.checkpoint import load_checkpoint_file
from detkit.cli import train
from tests.processes import end_of, fork, free_port, torchrun_agent

ROOT = Path(__file__).parents[2]

CONFIG = """
IMPORTS: [victim]
DATASETS:
  TRAIN: [shapes_train]
  TEST: [shapes_val]
MODEL: {META_ARCHITECTURE: Victim, DEVICE: cpu, ROI_HEADS: {NUM_CLASSES: 3}}
INPUT: {MIN_SIZE_TRAIN: [32, 40], MAX_SIZE_TRAIN: 64, MIN_SIZE_TEST: 32, MAX_SIZE_TEST: 64}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 6, STEPS: [4], WARMUP_ITERS: 3, CHECKPOINT_PERIOD: 2}
TEST: {EVAL_PERIOD: 3}
CHECKPOINT_KEEP: 3
DATALOADER: {NUM_WORKERS: 0}
DETERMINISTIC: True
SEED: 1
OUTPUT_DIR: out
"""

# A model with batch norm and random numbers of its own, which can be told where its process is to be killed. A plan is
# a list of [place, count], one for each start of the process, and lies in the environment.
VICTIM = """
import json, os, signal
import torch
from torch import nn
import detkit.checkpoint.safe_save as safe_save
import detkit.engine.default_trainer as default_trainer
from detkit.checkpoint import DetectionCheckpointer
from detkit.modeling import META_ARCH_REGISTRY
from detkit.structures import Boxes, Instances
from detkit.utils import comm
from detkit.utils.events import get_event_storage

default_trainer._WRITE_PERIOD = 1
plan = json.loads(os.environ.get("VICTIM_PLAN", "[]"))
record = os.environ.get("VICTIM_RECORD", "")  # a file with a byte for each kill
start = os.path.getsize(record) if os.path.exists(record) else 0
place, count = plan[start] if start < len(plan) else (None, 0)
is_target = os.environ.get("RANK", "0") == os.environ.get("VICTIM_RANK", "0")


def pass_by(here):
    global count
    if here == place and is_target:
        count -= 1
        if count <= 0:
            if record:
                with open(record, "ab") as file:
                    file.write(b"x")
            os.kill(os.getpid(), signal.SIGKILL)


class HalfWriter:
    def __init__(self, file):
        self.file = file

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        data = bytes(data)
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        pass_by("writing")
        self.file.write(data[len(data) // 2 :])
        return len(data)


save, tag = torch.save, DetectionCheckpointer.tag_last_checkpoint
safe_save.torch.save = lambda content, file, **kw: save(content, file if kw else HalfWriter(file), **kw)


def tag_last(self, name):
    pass_by("tagging")
    tag(self, name)


DetectionCheckpointer.tag_last_checkpoint = tag_last


@META_ARCH_REGISTRY.register()
class Victim(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, batch):
        pass_by("step" if self.training else "evaluation")
        features = torch.stack([self.norm(self.conv(x["image"][None].float() / 255)).mean((0, 2, 3)) for x in batch])
        if self.training:
            storage = get_event_storage()
            for k, x in enumerate(batch):
                storage.put_scalar(f"image/{k}", x["image_id"], smoothing_hint=False)
            scores = self.head(nn.functional.dropout(features, 0.5))
            return {"loss_a": (scores - 1).pow(2).mean(), "loss_b": scores.abs().mean()}
        scores = self.head(features).sigmoid()
        return [{"instances": self.whole_image(x, s)} for x, s in zip(batch, scores)]

    def whole_image(self, x, scores):
        size = (x["height"], x["width"])
        boxes = Boxes(torch.tensor([[0.0, 0.0, size[1], size[0]]]))
        return Instances(size, pred_boxes=boxes, scores=scores[:1], pred_classes=scores[:1].argmax()[None])
"""


@pytest.fixture
def place_to_run(workplace: Path) -> Path:
    (workplace / "victim.py").write_text(VICTIM)
    (workplace / "run.yaml").write_text(CONFIG)
    return workplace


def start(folder: Path, output: str, *, plan=(), settings=(), resume=False, run=train.main, **variables) -> int:
    """Begin to train in a process of its own, and give its id."""
    argv = ["--config-file", "run.yaml", *(["--resume"] if resume else []), "OUTPUT_DIR", output]

    def main() -> int | None:
        os.environ.update(VICTIM_PLAN=json.dumps(plan), **variables)
        return run([*argv, *map(str, settings)])

    return fork(main, output=folder / f"{output}.txt")


def outcome(folder: Path, output: str):
    """Weights, optimizer, schedule, and every line of the metrics without times."""
    final = load_checkpoint_file(str(folder / output / "model_final.pth"))
    lines = [json.loads(line) for line in (folder / output / "metrics.json").read_text().splitlines()]
    timed = ("time", "data_time", "eta_seconds")
    rows = [{key: value for key, value in line.items() if key not in timed} for line in lines]
    return final["model"], final["trainer"]["_trainer"]["optimizer"], final["trainer"]["hooks"], rows


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


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
        place, most = rng.choice([("step", 4), ("writing", 3), ("tagging", 2), ("evaluation", 3), ("any time", 0)])
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
    argv += [f"--max-restarts={len(plan)}", "--monitor-interval=0.1", str(ROOT / "tools" / "train_net.py")]
    argv += ["--config-file", "run.yaml", "OUTPUT_DIR", output, *map(str, settings)]
    paths = os.pathsep.join([str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")])
    variables = {"VICTIM_PLAN": json.dumps(plan), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    variables |= of_rank_one(folder, output)
    done = subprocess.run(argv, env={**os.environ, **variables}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]


def forked_torchrun(folder: Path, output: str, *, plan=(), settings=()) -> None:
    """The same with the agent called in a process of its own, which forks the others."""
    run = functools.partial(torchrun_agent, train.main, port=free_port(), max_restarts=len(plan))
    status = end_of(start(folder, output, plan=plan, settings=settings, run=run, **of_rank_one(folder, output)))
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


@pytest.mark.slow
@pytest.mark.parametrize("run", [torchrun, forked_torchrun])
def test_kills_of_one_rank_under_torchrun(place_to_run: Path, run) -> None:
    rng = random.Random(0)
    plan = [[place, rng.randint(1, most)] for place, most in [("step", 4), ("evaluation", 2), ("step", 5), ("step", 3)]]
    check_kills_of_one_rank(place_to_run, run, plan, "SOLVER.MAX_ITER", 20)
