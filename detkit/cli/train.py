"""`detkit train`: train and evaluate a model as a config describes it, or only evaluate it."""

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint.safe_load import local_checkpoint_file
from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.cli.report import write_reports
from detkit.config import CfgNode, get_cfg
from detkit.data import DatasetCatalog
from detkit.engine import DefaultTrainer, default_setup, launch
from detkit.engine.checkpoint_records import expect_classes_of_checkpoint
from detkit.engine.hooks.visualization import write_pictures
from detkit.engine.predictor import config_of_checkpoint
from detkit.evaluation import verify_results
from detkit.model_zoo import find_config
from detkit.utils import comm
from detkit.utils.text import counted, printable

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    parser = PARSERS["train"](prog)
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error(
            "--config-file is needed: a YAML file, or the name of a config that comes with detkit"
        )
    machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    return run_command(launch, run, *machines, (args,))


def setup(args: argparse.Namespace) -> CfgNode:
    """Read the config and the settings of the command line, freeze it, and prepare the run.

    Args:
        args: Without a `config_file`, its `weights` hold their config.
    """
    if args.config_file:
        cfg = get_cfg()
        cfg.merge_from_file(find_config(args.config_file))
    else:
        cfg = config_of_checkpoint(args.weights)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    return cfg


def run(args: argparse.Namespace) -> Mapping[str, Any]:
    """Train and evaluate, or evaluate only, in this process (one per GPU); print the results."""
    restarts = comm.get_num_restarts()
    args.resume = args.resume or restarts > 0
    cfg = setup(args)
    if restarts > 0:
        logger.info("restart %d by torchrun: going on from the last checkpoint", restarts)
    # Checks, evaluations and pictures all ask for the test data.
    with DatasetCatalog.kept(cfg.DATASETS.TEST):
        return _run(cfg, args)


def _run(cfg: CfgNode, args: argparse.Namespace) -> Mapping[str, Any]:
    last_checkpoint = Path(cfg.OUTPUT_DIR) / "last_checkpoint"
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
    is_new_run = not args.resume and not args.eval_only
    if may_restart and is_new_run and comm.is_main_process():
        # A restart of this run must not continue an older run in the same folder.
        last_checkpoint.unlink(missing_ok=True)
    if cfg.MODEL.WEIGHTS and not (args.resume and last_checkpoint.exists()):
        local_checkpoint_file(cfg.MODEL.WEIGHTS)  # fails now, not when data and model are ready
    if args.eval_only:
        model = DefaultTrainer.build_model(cfg)
        checkpointer = DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        loaded = checkpointer.resume_or_load(
            cfg.MODEL.WEIGHTS,
            resume=args.resume,
            strict=not args.allow_partial,
            averaged=cfg.MODEL_EMA.USE_FOR_PREDICTION,
        )
        expect_classes_of_checkpoint(cfg, loaded.get("metadata"))
        DefaultTrainer.check_test_data(cfg)
        results = DefaultTrainer.test(cfg, model)
    else:
        trainer = DefaultTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        results = trainer.train() or {}
        # Without DistributedDataParallel, whose forward pass would wait for the other processes.
        model = trainer.checkpointer.model
    if comm.is_main_process():
        pictures = write_pictures(cfg, model, Path(cfg.OUTPUT_DIR) / "pictures")
        if pictures:
            logger.info(
                "settings, log and scores are in %s, %s of predictions beside ground truth in",
                cfg.OUTPUT_DIR,
                counted(len(pictures), "picture", "pictures"),
            )
        folder = pictures[0].parent if pictures else Path(cfg.OUTPUT_DIR)
        print(printable(str(folder.resolve())), flush=True)
        if getattr(args, "report", False):  # scripts of users have parsers of their own
            write_reports(cfg)
        if args.eval_only:  # in training, the trainer has done it
            verify_results(cfg, results)
    return results
