"""`detkit export`: write a trained model as files that run without detkit."""

import argparse
from collections.abc import Sequence

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg
from detkit.engine import DefaultPredictor
from detkit.export.model import check_export, export_model
from detkit.model_zoo import find_config
from detkit.utils.logger import setup_logger
from detkit.utils.text import printable


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    return run_command(run, PARSERS["export"](prog).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Export, and print the files."""
    setup_logger()
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(args.opts)
    cfg.MODEL.DEVICE = "cpu"
    formats = list(dict.fromkeys(args.format)) or ["onnx"]
    check_export(cfg, formats)
    predictor = DefaultPredictor(cfg)
    paths = export_model(
        predictor.model,
        predictor.metadata,
        predictor.cfg,
        formats,
        args.output,
        input_dtype=args.input_dtype,
    )
    for path in paths:
        print(printable(str(path.resolve())))
