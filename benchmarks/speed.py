"""Measure how fast detkit is beside what its users would use otherwise, on this machine.

    python benchmarks/speed.py infer train data jitter eval
    python benchmarks/speed.py --quick --json speed.json

What is compared, and what makes the comparison fair, is said with each contest: `infer` and `train`
in faster_rcnn.py, `data` and `jitter` in data_loading.py, `eval` in coco_scoring.py.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from coco_scoring import eval_contest
from contest import Contest, Measurement, format_table, measure
from data_loading import data_contest, jitter_contest
from faster_rcnn import infer_contest, train_contest

from detkit import __version__
from detkit.cli.errors import run_command
from detkit.utils.env import resolve_device
from detkit.utils.errors import ConfigError, UnknownNameError
from detkit.utils.text import did_you_mean

CONTESTS: dict[str, Callable[[torch.device, bool], Contest]] = {
    "infer": infer_contest,
    "train": train_contest,
    "data": data_contest,
    "jitter": jitter_contest,
    "eval": eval_contest,
}


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("contests", nargs="*", metavar="infer|train|data|jitter|eval", help="which (default: all)")
    add("--quick", action="store_true", help="fewer rounds, smaller inputs; less certain")
    add("--rounds", type=int, help="rounds that are counted (default: each contest's own number)")
    devices = "of infer and train: auto, cpu, cuda, mps (default: %(default)s)"
    add("--device", default="cpu", help=devices)
    add("--threads", type=int, help="threads of infer and train (default: torch's own choice)")
    add("--json", metavar="FILE", help="write every measured second, with versions and machine")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure the contests asked for and print them as a table."""
    for name in args.contests:
        if name not in CONTESTS:
            hint = did_you_mean(name, CONTESTS)
            raise UnknownNameError(f"no contest {name!r}.{hint} There are: {', '.join(CONTESTS)}")
    if args.rounds is not None and args.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {args.rounds}")
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    surroundings = {
        "detkit": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in surroundings.items()), flush=True)
    measurements = []
    for name in args.contests or CONTESTS:
        contest = CONTESTS[name](device, args.quick)
        print(f"{name}: {contest.task}", flush=True)
        measurements.append(measure(contest, args.rounds or contest.rounds))
    print(format_table(measurements))
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        contests = [_as_dict(measurement) for measurement in measurements]
        path.write_text(json.dumps({**surroundings, "contests": contests}, indent=1))


def _as_dict(measurement: Measurement) -> dict[str, Any]:
    contest = measurement.contest
    return {
        "name": contest.name,
        "task": contest.task,
        "against": contest.opponent,
        "detkit_seconds": measurement.ours,
        "other_seconds": measurement.theirs,
        "ratio": measurement.ratio,
        "target": contest.target,
    }


if __name__ == "__main__":
    sys.exit(main())
