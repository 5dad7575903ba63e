"""Measure how fast detkit is beside what its users would use otherwise, on this machine.

    python benchmarks/speed.py --json speed.json
    python benchmarks/speed.py infer train data jitter eval --quick

What is compared, and what makes the comparison fair, is said with each contest: `infer` and `train`
in faster_rcnn.py, `data` and `jitter` in data_loading.py, `eval` in coco_scoring.py, all of one
model with the same weights in pairs.py. `import` is a new Python that imports torch, torchvision
and `detkit.engine`, against one without the last.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from coco_scoring import eval_contest
from contest import Contest, Measurement, Setting, format_shares, format_table, measure
from data_loading import data_contest, jitter_contest
from faster_rcnn import infer_contest, train_contest
from pairs import pair_contest

from detkit import __version__
from detkit.cli.errors import run_command
from detkit.utils.env import resolve_device
from detkit.utils.errors import ConfigError, MissingFileError, UnknownNameError
from detkit.utils.text import did_you_mean


def import_contest(setting: Setting) -> Contest:
    """A new Python that imports detkit.engine, against torch and torchvision alone."""
    own = "import torch, torchvision"
    return Contest(
        name="import",
        task="to import detkit.engine; the other side: torch and torchvision, which it needs",
        opponent="torch and torchvision",
        ours=partial(_run_python, f"{own}, detkit.engine"),
        theirs=partial(_run_python, own),
        target=0.4,
        rounds=2 if setting.quick else 7,
        is_part=True,
    )


def _run_python(program: str) -> None:
    # Otherwise it may compile detkit's sources each time; an installed package is compiled already.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


_infer = partial(pair_contest, train_batch=0)
CONTESTS: dict[str, Callable[[Setting], Contest]] = {
    "infer": infer_contest,
    "faster": partial(_infer, kind="faster", image_size=(480, 640), target=2.0),
    "mask": partial(_infer, kind="mask", image_size=(480, 640), target=2.0),
    "retinanet": partial(_infer, kind="retinanet", image_size=(480, 640), target=1.8),
    "train": train_contest,
    "train-pair": partial(
        pair_contest, kind="faster", image_size=(320, 480), train_batch=2, target=1.8
    ),
    "data": data_contest,
    "jitter": jitter_contest,
    "eval": eval_contest,
    "import": import_contest,
}
_MARKS = ("<!-- speed -->", "<!-- /speed -->")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    add("contests", nargs="*", metavar="|".join(CONTESTS), help="which (default: all)")
    add("--quick", action="store_true", help="fewer rounds, smaller inputs; less certain")
    add("--rounds", type=int, help="at most so many rounds are counted (default: as many as usual)")
    devices = "of the models: auto, cpu, cuda, mps (default: %(default)s)"
    add("--device", default="cpu", help=devices)
    dtypes = "mixed precision of both sides where they have the same weights (default: %(default)s)"
    add("--dtype", choices=_DTYPES, default="float32", help=dtypes)
    add("--threads", type=int, help="threads of the models (default: torch's own choice)")
    add("--shares", action="store_true", help="show where the time of models goes, by operator")
    add("--json", metavar="FILE", help="write every measured second, with versions and machine")
    add(
        "--markdown",
        metavar="FILE",
        help=f"put the tables into a Markdown file, between lines {_MARKS[0]} and {_MARKS[1]}",
    )
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
    setting = Setting(device, args.quick, _DTYPES[args.dtype])
    if args.threads:
        torch.set_num_threads(args.threads)
    surroundings = {
        "detkit": __version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "machine": _processor(),
        "python": platform.python_version(),
    }
    page = _Page(Path(args.markdown)) if args.markdown else None
    print(", ".join(f"{key} {value}" for key, value in surroundings.items()), flush=True)
    measurements, shares = [], {}
    for name in args.contests or CONTESTS:
        measurement, shares_of_it = _measured(name, setting, args)
        measurements.append(measurement)
        if shares_of_it is not None:
            shares[measurement.contest.name] = shares_of_it
        if page is not None:  # at once, for whoever has to stop before the last one
            page.write(_markdown(surroundings, measurements, shares))
    print(format_table(measurements))
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        contests = [_as_dict(measurement) for measurement in measurements]
        path.write_text(
            json.dumps({**surroundings, "contests": contests, "shares": shares}, indent=1)
        )


def _measured(
    name: str, setting: Setting, args: argparse.Namespace
) -> tuple[Measurement, dict[str, dict[str, float]] | None]:
    """Run a contest, and return its times, and where they go, if that is asked for and known."""
    contest = CONTESTS[name](setting)
    print(f"{name}: {contest.task}", flush=True)
    measurement = measure(contest, min(args.rounds or contest.rounds, contest.rounds))
    times = f"{measurement.ratio:.2f} times faster, {measurement.cpu_ratio:.2f} in CPU time"
    print(f"{name}: {times}", flush=True)
    shares_of = contest.shares if args.shares else None
    # Without the functions, so that their processes end and give their memory back.
    contest = replace(contest, ours=_done, theirs=_done, shares=None)
    measurement = replace(measurement, contest=contest)
    if shares_of is None:
        return measurement, None
    shares = shares_of()
    print(format_shares(shares), flush=True)
    return measurement, shares


def _done() -> None:
    raise RuntimeError("this contest is over")


class _Page:
    """A Markdown file with a part that is written anew."""

    def __init__(self, path: Path) -> None:
        """Read the file, so that what is wrong with it is known before minutes of measuring."""
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise MissingFileError(f"--markdown needs a file that is there: {error}") from None
        self.path = path
        self.head, begin, rest = text.partition(_MARKS[0])
        _, end, self.tail = rest.partition(_MARKS[1])
        if not begin or not end:
            raise ConfigError(f"{path} needs the lines {_MARKS[0]} and {_MARKS[1]}, in this order")

    def write(self, part: str) -> None:
        """Replace what is between the two lines."""
        text = f"{self.head}{_MARKS[0]}\n\n{part}\n\n{_MARKS[1]}{self.tail}"
        self.path.write_text(text, encoding="utf-8")


def _markdown(
    surroundings: dict[str, Any],
    measurements: list[Measurement],
    shares: dict[str, dict[str, dict[str, float]]],
) -> str:
    """Return what was measured, where, and all tables."""
    where = (
        "{machine}, {threads} threads, Python {python}, torch {torch}, torchvision {torchvision}"
    )
    parts = [
        f"{where.format(**surroundings)}, {surroundings['device']}, {surroundings['dtype']};"
        f" {datetime.date.today():%d %B %Y}. Medians, with the fastest and the slowest round.",
        format_table(measurements, "pipe"),
        "\n".join(f"- {m.contest.name}: {m.contest.task}" for m in measurements),
    ]
    for name, of_contest in shares.items():
        parts += [f"By operator, {name}:", format_shares(of_contest, "pipe")]
    return "\n\n".join(parts)


def _processor() -> str:
    """Return the processor's name where the system tells it (Linux), else the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _as_dict(measurement: Measurement) -> dict[str, Any]:
    contest = measurement.contest
    return {
        "name": contest.name,
        "task": contest.task,
        "against": contest.opponent,
        "detkit_seconds": measurement.ours,
        "other_seconds": measurement.theirs,
        "detkit_cpu_seconds": measurement.our_cpu,
        "other_cpu_seconds": measurement.their_cpu,
        "ratio": measurement.ratio,
        "cpu_ratio": measurement.cpu_ratio,
        "target": contest.target,
    }


if __name__ == "__main__":
    sys.exit(main())
