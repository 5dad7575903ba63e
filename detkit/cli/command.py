"""The command `detkit`: run a subcommand with the rest of the command line."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from detkit import __version__

# Each but `benchmark` is the module of that name beside this one, with `_` for `-`.
COMMANDS = {
    "train": "train a model and evaluate it, or evaluate only (--eval-only)",
    "predict": "find objects in image files; writes pictures and predictions.json",
    "show-batch": "write pictures of what the model is fed in training, with boxes and masks drawn",
    "convert-dataset": "bring a data set of any format into that of COCO, VOC or YOLO",
    "configs": "list the configs that come with detkit, a line each (configs WORD: some of them)",
    "config": "explain a setting: config explain SOLVER.BASE_LR",
    "convert-weights": (
        "bring weights of torchvision, Caffe2, MMDetection under detkit's names; change their"
        " format"
    ),
    "benchmark": "measure detkit's speed against torchvision, a PIL data loader and pycocotools",
}

# In a checkout beside the package; an installed package has none.
_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_NO_BENCHMARKS = (
    "error: the benchmarks do not come with an installed detkit. Clone its repository, and run"
    " python benchmarks/speed.py there; benchmarks/README.md lists the others"
)

_EXAMPLES = """examples:
  detkit train --config-file quick_start/faster_rcnn_R_18_FPN_shapes.yaml
  detkit train --config-file my.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
  detkit predict --config-file my.yaml --input photos/ --output found/ MODEL.WEIGHTS model.pth
  detkit predict --config-file faster_rcnn_R_50_FPN_3x --input photos/ --output found/

detkit COMMAND --help explains a command. Configs that come with detkit are found by their name.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    Args:
        argv: The words after `detkit`; None takes those of this process.
    """
    args = _parser().parse_args(argv)
    module = f"detkit.cli.{args.command.replace('-', '_')}"
    if args.command == "benchmark":
        if not (_BENCHMARKS / "speed.py").is_file():
            print(_NO_BENCHMARKS, file=sys.stderr)
            return 2
        sys.path.insert(0, str(_BENCHMARKS))  # its files import each other by name
        module = "speed"
    # Imported only now: torch takes seconds to load, which `detkit --help` should not wait for.
    command = importlib.import_module(module)
    return command.main(args.arguments, prog=f"detkit {args.command}")


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<15} {help_text}" for name, help_text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="detkit",
        usage="detkit COMMAND ...",
        description="Object detection in the Detectron2 vocabulary.\n\ncommands:\n" + listed,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"detkit {__version__}")
    return parser
