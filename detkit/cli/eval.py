"""`detkit eval`: evaluate a checkpoint, as `train --eval-only` does, or an exported model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from detkit.cli import train
from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.cli.report import write_reports
from detkit.config import get_cfg
from detkit.engine import launch, prepare
from detkit.evaluation import print_csv_format, verify_results
from detkit.export.evaluation import describe_model, evaluate_exported
from detkit.export.runtime import WRITTEN_ENDINGS, ExportedPredictor
from detkit.model_zoo import find_config
from detkit.utils.logger import setup_logger
from detkit.utils.text import printable


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    parser = PARSERS["eval"](prog)
    args = parser.parse_args(argv)
    if args.weights.lower().endswith(WRITTEN_ENDINGS):
        return run_command(_evaluate_exported, args)
    if not args.config_file and not args.weights:
        parser.error(
            "--weights are needed, which hold their config, or --config-file: a YAML file, or the"
            " name of a config that comes with detkit"
        )
    if args.weights:
        args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]
    if args.dataset:
        args.opts = ["DATASETS.TEST", tuple(args.dataset), *args.opts]
    machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    return run_command(launch, train.run, *machines, (args,))


def _evaluate_exported(args: argparse.Namespace) -> None:
    predictor = ExportedPredictor(args.weights)
    # Beside the model, not in the folder of the training run, whose results are those of eager.
    settings = ["OUTPUT_DIR", str(Path(args.weights).expanduser().parent / "eval"), *args.opts]
    if args.dataset:
        settings = ["DATASETS.TEST", tuple(args.dataset), *settings]
    cfg = get_cfg()
    if args.config_file:
        cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(settings)
    prepare(cfg)  # registers the data sets that it declares
    describe_model(cfg, predictor.metadata)
    setup_logger(cfg.OUTPUT_DIR)
    results = evaluate_exported(predictor, cfg)
    for result in results.values():
        print_csv_format(result)
    if args.report:
        write_reports(cfg)
    if len(results) == 1:
        verify_results(cfg, next(iter(results.values())))
    print(printable(str(Path(cfg.OUTPUT_DIR).resolve())))
