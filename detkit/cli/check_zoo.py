"""Build the model of every config of Detectron2's zoo, and hold it against the one that Detectron2 0.6 builds.

Names and shapes of all tensors and the set of trained parameters are compared; nothing is trained
or downloaded.
"""

import argparse
import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path

from detkit.cli.errors import message_of, run_command
from detkit.model_zoo import RecordedModel, compare_with_recorded, get_config

# The record comes with a checkout, not with an installed package: it is for those who change
# detkit.
_RECORD = Path(__file__).resolve().parents[2] / "tests" / "golden" / "state_dicts.json.gz"


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and give its exit status: 0 when every model is as recorded, else 1.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="configs to check, as recorded (default: all)"
    )
    parser.add_argument(
        "--recorded",
        default=_RECORD,
        type=Path,
        metavar="FILE",
        help="state_dicts.json.gz (default: %(default)s)",
    )
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Print the models that differ and how, and the count of those that do not."""
    if not args.recorded.is_file():
        raise FileNotFoundError(
            f"no recorded models at {args.recorded}: name state_dicts.json.gz with --recorded"
        )
    recorded = json.loads(gzip.decompress(args.recorded.read_bytes()))
    unknown = [name for name in args.names if name not in recorded]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: not among the {len(recorded)} models in {args.recorded}"
        )
    names = args.names or list(recorded)
    start = time.perf_counter()
    same = sum(_is_same(name, recorded[name]) for name in names)
    print(f"{same} of {len(names)} models as recorded, in {time.perf_counter() - start:.0f} s")
    return 0 if same == len(names) else 1


def _is_same(name: str, recorded: RecordedModel) -> bool:
    try:
        differences = compare_with_recorded(get_config(name), recorded)
    except Exception as error:  # whatever stops one model must not hide the state of the others
        differences = [f"{type(error).__name__}: {message_of(error)}"]
    if differences:
        print(f"{name}\n  " + "\n  ".join(differences))
    return not differences
