"""`detkit benchmark`: how fast detkit is beside what its users would use otherwise, measured on this machine.

Both sides of a contest run in turn, round after round, so that a machine that gets slower slows
both. What is compared, and what makes the comparison fair, stands with each contest in
`benchmark_models`, `benchmark_data` and `benchmark_eval`.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate

from detkit import __version__
from detkit.cli.benchmark_contest import Contest
from detkit.cli.benchmark_data import data_contest
from detkit.cli.benchmark_eval import eval_contest
from detkit.cli.benchmark_models import infer_contest, train_contest
from detkit.cli.errors import run_command
from detkit.utils.env import resolve_device
from detkit.utils.near_miss import did_you_mean

CONTESTS: dict[str, Callable[[torch.device, bool], Contest]] = {
    "infer": infer_contest,
    "train": train_contest,
    "data": data_contest,
    "eval": eval_contest,
}


@dataclass(frozen=True)
class Measurement:
    """Seconds of every round of a contest, detkit's and the other side's."""

    contest: Contest
    ours: list[float]
    theirs: list[float]

    @property
    def ratio(self) -> float:
        """How many times faster detkit is, by the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and give its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("contests", nargs="*", metavar="infer|train|data|eval", help="which (default: all)")
    add(
        "--quick",
        action="store_true",
        help="fewer rounds and smaller inputs: seconds, but less certain",
    )
    add("--rounds", type=int, help="rounds that are counted (default: each contest's own number)")
    add(
        "--device",
        default="cpu",
        help="of infer and train: auto, cpu, cuda, mps (default: %(default)s)",
    )
    add("--threads", type=int, help="threads of infer and train (default: torch's own choice)")
    add(
        "--json",
        metavar="FILE",
        help="write every measured second, with versions and machine, to FILE",
    )
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure the contests asked for and print them as a table."""
    for name in args.contests:
        if name not in CONTESTS:
            raise ValueError(
                f"no contest {name!r}.{did_you_mean(name, CONTESTS)} There are:"
                f" {', '.join(CONTESTS)}"
            )
    if args.rounds is not None and args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    device = resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    surroundings = describe_surroundings(device)
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
        path.write_text(
            json.dumps({**surroundings, "contests": [_as_dict(m) for m in measurements]}, indent=1)
        )


def measure(contest: Contest, rounds: int) -> Measurement:
    """Let both sides run in turn: once without the clock, then `rounds` times with it."""
    our_result, their_result = contest.ours(), contest.theirs()
    if contest.check is not None:
        contest.check(our_result, their_result)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(_seconds(contest.ours))
        theirs.append(_seconds(contest.theirs))
    return Measurement(contest, ours, theirs)


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def describe_surroundings(device: torch.device) -> dict[str, Any]:
    """Return what the numbers depend on, besides the code."""
    return {
        "detkit": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def format_table(measurements: Iterable[Measurement]) -> str:
    """Return a table: median, fastest and slowest round of both sides, their ratio, and the ratio
    that is aimed at.
    """
    rows = [
        [
            m.contest.name,
            m.contest.opponent,
            _spread(m.ours),
            _spread(m.theirs),
            f"{m.ratio:.2f}x",
            f"{m.contest.target:.1f}x" if m.contest.target else "",
        ]
        for m in measurements
    ]
    return tabulate(
        rows,
        headers=["contest", "against", "detkit", "other", "faster", "target"],
        disable_numparse=True,
    )


def _spread(seconds: Sequence[float]) -> str:
    unit, factor = ("ms", 1000) if max(seconds) < 1 else ("s", 1)
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle * factor:.3g} {unit} ({low * factor:.3g} to {high * factor:.3g})"


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
