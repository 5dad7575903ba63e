"""`detkit report`: show where a detector is wrong, as one page that opens from disk."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import CfgNode, get_cfg
from detkit.engine import prepare
from detkit.evaluation import COCOEvaluator
from detkit.evaluation.coco.ground_truth import load_coco_ground_truth
from detkit.evaluation.report import ReportOptions, read_results, write_report
from detkit.model_zoo import find_config
from detkit.utils.errors import ConfigError, MissingFileError
from detkit.utils.logger import setup_logger
from detkit.utils.text import did_you_mean, file_stem, printable

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    return run_command(run, PARSERS["report"](prog).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Write the report and print its path."""
    options = _options(args)
    if args.predictions and not args.dataset:
        raise ConfigError("--predictions needs --dataset: the name of the data set they are of")
    setup_logger()
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(find_config(args.config_file))
    elif args.run:
        cfg.merge_from_file(str(_config_of(Path(args.run).expanduser())))
    cfg.merge_from_list(args.opts)
    prepare(cfg)
    if args.dataset is None and not cfg.DATASETS.TEST:
        raise ConfigError("DATASETS.TEST of the run is empty: name the data set by --dataset")
    dataset = args.dataset or cfg.DATASETS.TEST[0]
    if args.run and dataset not in cfg.DATASETS.TEST:
        known = ", ".join(cfg.DATASETS.TEST)
        raise ConfigError(
            f"--dataset {dataset}: the run evaluates on {known or 'nothing'}."
            f"{did_you_mean(dataset, cfg.DATASETS.TEST)}"
        )
    source = Path(args.run or args.predictions).expanduser()
    output = (source if args.run else source.parent) / "report"
    page = report_of(
        cfg,
        dataset,
        source,
        Path(args.output).expanduser() if args.output else output,
        other=Path(args.compare).expanduser() if args.compare else None,
        has_settings=bool(args.config_file or args.run),
        options=options,
    )
    print(printable(str(page.resolve())))


def report_of(
    cfg: CfgNode,
    dataset: str,
    source: Path,
    output: Path,
    *,
    other: Path | None = None,
    has_settings: bool = True,
    options: ReportOptions | None = None,
) -> Path:
    """Write the report of a run, or of a file of detections, and return the page.

    Args:
        cfg: As `prepare` leaves it.
        dataset: A registered data set.
        source: Folder of a run, or file of detections.
        output: Folder to write into.
        other: What to compare with, as `source`; None for nothing.
        has_settings: Whether `cfg` is that of the detector.
        options: What the report holds; None for the defaults.

    Raises:
        MissingFileError: A run has no detections of the data set.
    """
    truth = load_coco_ground_truth(dataset)
    detections = read_results(str(_results_of(source, dataset)), truth)
    others = None if other is None else read_results(str(_results_of(other, dataset)), truth)
    names = {"first": str(source)} | ({} if other is None else {"second": str(other)})
    return write_report(
        output,
        truth,
        detections,
        cfg,
        others=others,
        has_settings=has_settings,
        names=names,
        options=options,
    )


def write_reports(cfg: CfgNode) -> None:
    """Write the report of each data set that a run has just evaluated on, into its folder."""
    run = Path(cfg.OUTPUT_DIR)
    for dataset in cfg.DATASETS.TEST:
        folder = run / "report"
        if len(cfg.DATASETS.TEST) > 1:
            folder /= file_stem(dataset)
        try:
            page = report_of(cfg, dataset, run, folder)
            logger.info("the error report of %s is in %s", dataset, page)
        except MissingFileError:
            message = "no error report of %s: its evaluator writes no %s"
            logger.warning(message, dataset, COCOEvaluator.results_file)


def _options(args: argparse.Namespace) -> ReportOptions:
    threshold = args.confidence_threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ConfigError(f"--confidence-threshold must lie between 0 and 1, got {threshold}")
    for name in ("max_images", "image_size", "samples"):
        least = 1 if name == "image_size" else 0
        if getattr(args, name) < least:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} must be at least {least}, got {getattr(args, name)}")
    return ReportOptions(threshold, args.max_images, args.image_size, args.samples)


def _config_of(folder: Path) -> Path:
    # An evaluation in the folder of a training writes the second: what ran last counts.
    written = [folder / name for name in ("config.yaml", "config.run.yaml")]
    written = [path for path in written if path.is_file()]
    if not written:
        what = (
            "no config.yaml in it: is it a run of detkit?" if folder.is_dir() else "no such folder"
        )
        raise MissingFileError(f"{folder}: {what}")
    return max(written, key=lambda path: path.stat().st_mtime)


def _results_of(source: Path, dataset: str) -> Path:
    """Return the file of detections of a run, or the file itself."""
    if not source.is_dir():
        return source
    name, folder = COCOEvaluator.results_file, source / "inference"
    # A folder for each where a run evaluates on several.
    for path in (folder / file_stem(dataset) / name, folder / name):
        if path.is_file():
            return path
    there = sorted(path.parent.name for path in folder.glob(f"*/{name}"))
    hint = f" There are those of {', '.join(there)}.{did_you_mean(dataset, there)}" if there else ""
    raise MissingFileError(
        f"{source} has no detections of {dataset!r} ({folder / name}).{hint} An evaluation writes"
        f" them: detkit train --config-file {source / 'config.yaml'} --eval-only MODEL.WEIGHTS"
        f" {source / 'model_final.pth'}"
    )
