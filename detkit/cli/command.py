"""The command `detkit`: run a subcommand with the rest of the command line."""

import gc
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from detkit import __version__
from detkit.cli.parsers import PARSERS
from detkit.config.command_line import Parser
from detkit.utils.logger import error_head
from detkit.utils.text import did_you_mean

# Each but `benchmark` is the module of that name beside this one, with `_` for `-`. Its options are
# in parsers.py, where completion, documentation and tests find them.
COMMANDS = {
    "train": "train a model and evaluate it",
    "eval": "evaluate a checkpoint",
    "predict": "find objects in images and videos; writes pictures, JSON, COCO, CSV, YOLO, labelme",
    "report": "show where a detector is wrong: one page with scores, errors and suggestions",
    "export": "write a trained model as ONNX, OpenVINO or torch.export, to run without detkit",
    "show-batch": "write pictures of what the model is fed in training, with boxes and masks drawn",
    "check-dataset": "look for faults in the images and annotations of a config's data",
    "convert-dataset": "bring a data set of any format into that of COCO, VOC or YOLO",
    "convert-weights": (
        "bring weights of torchvision, Caffe2, MMDetection under detkit's names; change their"
        " format"
    ),
    "configs": "list the configs that come with detkit, a line each (configs WORD: some of them)",
    "config": "explain settings, show those of a config, compare two configs",
    "env": "print versions and devices, for a bug report",
    "completion": "print what makes the Tab key complete all this in bash, zsh or fish",
    "benchmark": "measure detkit's speed against torchvision, a PIL data loader and pycocotools",
}

# In a checkout beside the package; an installed package has none.
_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
_NO_BENCHMARKS = (
    "the benchmarks do not come with an installed detkit. Clone its repository, and run"
    " python benchmarks/speed.py there; benchmarks/README.md lists the others"
)

_EPILOG = """examples:
  detkit train --config-file quick_start/faster_rcnn_R_18_FPN_shapes.yaml
  detkit eval --weights output/quick_start/model_final.pth
  detkit predict --model output/quick_start/model_final.pth --input photos/ --output found/
  detkit predict --config-file faster_rcnn_R_50_FPN_3x --input photos/ --output found/

detkit COMMAND --help explains a command. Configs that come with detkit are found by their name.
DETKIT_TRACEBACK=1 shows where an error was raised, NO_COLOR=1 writes without colours.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    Args:
        argv: The words after `detkit`; None takes those of this process. A command's own `main`
            takes those behind its name, and as `prog` its name for the help.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    # By hand: argparse would take the options of the command for its own.
    if not words or words[0].startswith("-"):
        parser.parse_args(words)
        parser.error("a COMMAND is needed, such as train")
    command, *rest = words
    if command not in COMMANDS:
        hint = f"no command {command!r}.{did_you_mean(command, COMMANDS)}"
        print(error_head(sys.stderr), hint, "detkit --help lists the commands", file=sys.stderr)
        return 2
    prog = f"detkit {command}"
    if command in PARSERS:
        # Help and mistakes end here, without waiting for torch, which takes seconds to load.
        PARSERS[command](prog).parse_args(rest)
    module = f"detkit.cli.{command.replace('-', '_')}"
    if command == "benchmark":
        if not (_BENCHMARKS / "speed.py").is_file():
            print(error_head(sys.stderr), _NO_BENCHMARKS, file=sys.stderr)
            return 2
        sys.path.insert(0, str(_BENCHMARKS))  # its files import each other by name
        module = "speed"
    return imported(module).main(rest, prog=prog)


def imported(module: str) -> ModuleType:
    """Import a module; the first that needs torch without the garbage collector."""
    is_start = "torch" not in sys.modules and gc.isenabled()
    if not is_start:
        return importlib.import_module(module)
    # Nearly all of torch's 300,000 objects stay: 7 MB are garbage. To look for it takes a third of
    # the time of the import (2.8 s of CPU in place of 4.5), and 0.2 s at each collection later on.
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _parser() -> Parser:
    listed = "\n".join(f"  {name:<15} {help_text}" for name, help_text in COMMANDS.items())
    parser = Parser(
        prog="detkit",
        usage="detkit COMMAND ...",
        description="Object detection in the Detectron2 vocabulary.\n\ncommands:\n" + listed,
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"detkit {__version__}")
    return parser
