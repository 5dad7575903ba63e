"""A training run that can be told where its process is to be killed."""

import json
import os
import time
from pathlib import Path

from detkit.checkpoint import load_checkpoint_file
from detkit.cli import train
from tests.processes import fork

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
import json, os, signal, time
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
target = int(os.environ.get("VICTIM_RANK", "0"))


def pass_by(here):
    global count
    if here == place and comm.get_rank() == target:
        count -= 1
        if count <= 0:
            if record:
                with open(record, "ab") as file:
                    file.write(b"x")
            if place == "raise":
                raise ArithmeticError(f"process {target} fails on its own")
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
        pass_by("raise")
        if "VICTIM_SLEEP" in os.environ and self.training:
            open(f"asleep_{comm.get_rank()}", "w").close()
            time.sleep(float(os.environ["VICTIM_SLEEP"]))
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


def prepare(folder: Path) -> Path:
    """Write the model and the config into a working directory."""
    (folder / "victim.py").write_text(VICTIM)
    (folder / "run.yaml").write_text(CONFIG)
    return folder


def start(
    folder: Path, output: str, *, plan=(), settings=(), resume=False, run=train.main, **variables
) -> int:
    """Begin to train in a process of its own, and give its id."""
    argv = ["--config-file", "run.yaml", *(["--resume"] if resume else []), "OUTPUT_DIR", output]

    def main() -> int | None:
        os.environ.update(VICTIM_PLAN=json.dumps(plan), **variables)
        return run([*argv, *map(str, settings)])

    return fork(main, output=folder / f"{output}.txt")


def wait_until_asleep(folder: Path) -> None:
    """Wait until both processes are in the middle of a step."""
    end = time.monotonic() + 60
    for path in [folder / "asleep_0", folder / "asleep_1"]:
        while not path.exists():
            assert time.monotonic() < end, "no step has come"
            time.sleep(0.02)
        path.unlink()


def outcome(folder: Path, output: str):
    """Weights, optimizer, schedule, and every line of the metrics without times."""
    final = load_checkpoint_file(str(folder / output / "model_final.pth"))
    lines = [
        json.loads(line) for line in (folder / output / "metrics.json").read_text().splitlines()
    ]
    timed = ("time", "data_time", "eta_seconds")
    rows = [{key: value for key, value in line.items() if key not in timed} for line in lines]
    return (
        final["model"],
        final["trainer"]["_trainer"]["optimizer"],
        final["trainer"]["hooks"],
        rows,
    )
