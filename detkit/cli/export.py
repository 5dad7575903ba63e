"""`detkit export`: write a trained model as files that run without detkit."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg
from detkit.engine import DefaultPredictor, DefaultTrainer
from detkit.export.evaluation import evaluate_exported, headline
from detkit.export.formats import require
from detkit.export.model import check_export, export_model
from detkit.export.quantize import PRECISIONS, calibration_images, check_copies, write_copies
from detkit.export.runtime import ENDINGS, ExportedPredictor
from detkit.model_zoo import find_config
from detkit.utils.errors import ConfigError
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
    cfg.MODEL.COMPILE = "none"  # what is compiled cannot be traced
    formats = list(dict.fromkeys(args.format)) or ["onnx"]
    check_export(cfg, formats)
    if args.int8 != bool(args.calibrate):
        raise ConfigError(
            "--int8 and --calibrate DATASET need each other: ranges are those of images"
        )
    options = [option for option in PRECISIONS if getattr(args, option)]
    copies = {option: check_copies(option, formats) for option in options}
    if "onnx" in formats and (args.eval or copies):
        require("onnxruntime", "onnx")
    predictor = DefaultPredictor(cfg)
    images = calibration_images(predictor.cfg, args.calibrate) if args.int8 else ()
    paths = export_model(
        predictor.model,
        predictor.metadata,
        predictor.cfg,
        formats,
        args.output,
        input_dtype=args.input_dtype,
        paste=args.paste,
    )
    for option, having in copies.items():
        given = images if option == "int8" else ()
        paths += write_copies(paths[formats.index("onnx")], option, having, given)
    if args.eval or copies:
        print(scores_of(predictor, [path for path in paths if path.suffix in ENDINGS]))
    for path in paths:
        print(printable(str(path.resolve())))


def scores_of(predictor: DefaultPredictor, paths: Sequence[Path]) -> str:
    """Return a table of the model and of its files: size, and scores on DATASETS.TEST.

    Args:
        predictor: The model; its config names the data sets.
        paths: The files, as the runtime takes them.
    """
    cfg = predictor.cfg.clone()
    cfg.defrost()
    # Not over the results of training.
    cfg.OUTPUT_DIR = str(paths[0].parent / "eval") if paths else cfg.OUTPUT_DIR
    rows = [{"file": "eager", "MB": None, **headline(DefaultTrainer.test(cfg, predictor.model))}]
    for path in paths:
        results = evaluate_exported(ExportedPredictor(path), cfg)
        size = path.stat().st_size
        if path.suffix == ".xml":
            size += path.with_suffix(".bin").stat().st_size
        first = next(iter(results.values())) if len(results) == 1 else results
        rows.append({"file": path.name, "MB": size / 1e6, **headline(first)})
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f")
