"""Build the model of every config of Detectron2's zoo, and compare it with that of Detectron2 0.6.

    python benchmarks/check_zoo.py

Names and shapes of all tensors and the set of trained parameters are compared; nothing is trained
or downloaded. The exit status is 0 when every model is as recorded, else 1.
"""

import argparse
import gzip
import json
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch

from detkit.cli.errors import message_of, run_command
from detkit.config import CfgNode
from detkit.model_zoo import get_config
from detkit.modeling import META_ARCH_REGISTRY
from detkit.utils.errors import MissingFileError, UnknownNameError

_RECORD = Path(__file__).resolve().parents[1] / "tests" / "golden" / "state_dicts.json.gz"
# Of a long list of differences, the first few tell what is wrong.
_SHOWN = 4


class RecordedModel(TypedDict):
    """A model as `tests/golden/state_dicts.json.gz` holds it."""

    keys: Mapping[str, Sequence[int]]
    """Shape of every tensor in the `state_dict`."""
    trainable: Sequence[str]
    """Names of the parameters that take a gradient."""


def compare_with_recorded(cfg: CfgNode, recorded: RecordedModel) -> list[str]:
    """Build the model of a config, and return how it differs from the recorded one."""
    # On the meta device, without memory and random numbers: 92 models take seconds.
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {name: list(shape) for name, shape in recorded["keys"].items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    reshaped = [
        f"{name}: {shapes[name]}, not {wanted[name]}"
        for name in shapes.keys() & wanted.keys()
        if shapes[name] != wanted[name]
    ]
    return [
        *_difference("missing", wanted.keys() - shapes.keys()),
        *_difference("not recorded", shapes.keys() - wanted.keys()),
        *_difference("of another shape", reshaped),
        *_difference("trained, but should not be", trained - set(recorded["trainable"])),
        *_difference("not trained, but should be", set(recorded["trainable"]) - trained),
    ]


def _difference(what: str, names: Collection[str]) -> list[str]:
    if not names:
        return []
    more = f", ... ({len(names)})" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(sorted(names)[:_SHOWN])}{more}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 when every model is as recorded, else 1."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="configs to check, as recorded (default: all)")
    record_help = "state_dicts.json.gz (default: %(default)s)"
    add("--recorded", default=_RECORD, type=Path, metavar="FILE", help=record_help)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Print the models that differ and how, and the count of those that do not."""
    if not args.recorded.is_file():
        raise MissingFileError(
            f"no recorded models at {args.recorded}: name state_dicts.json.gz with --recorded"
        )
    recorded = json.loads(gzip.decompress(args.recorded.read_bytes()))
    unknown = [name for name in args.names if name not in recorded]
    if unknown:
        raise UnknownNameError(
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
    except Exception as error:  # one model that fails must not hide the state of the others
        differences = [f"{type(error).__name__}: {message_of(error)}"]
    if differences:
        print(f"{name}\n  " + "\n  ".join(differences))
    return not differences


if __name__ == "__main__":
    sys.exit(main())
