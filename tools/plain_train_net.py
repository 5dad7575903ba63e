"""The training loop written out: what `DefaultTrainer` does, without trainer and hooks.

For those who want to see every step, or to change one that no hook reaches. Mixed precision,
accumulation of gradients and the other features of `DefaultTrainer` alone are left out, and a
config that asks for one is refused. Otherwise settings, data, model, schedule, checkpoints and
results are the same as with `tools/train_net.py`.

    python tools/plain_train_net.py --config-file quick_start/faster_rcnn_R_18_FPN_shapes.yaml
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detkit.cli.errors import run_command
from detkit.config import CfgNode, default_trainer_settings, get_cfg
from detkit.data import build_detection_test_loader, build_detection_train_loader
from detkit.engine import (
    create_ddp_model,
    default_argument_parser,
    default_setup,
    launch,
    warn_about_random_fixed_norms,
)
from detkit.engine.hooks import PeriodicWriter
from detkit.engine.run_config import run_config
from detkit.engine.setup import refuse_settings
from detkit.engine.writers import build_writers
from detkit.evaluation import build_evaluator, inference_on_dataset, print_csv_format
from detkit.model_zoo import find_config
from detkit.modeling import build_model
from detkit.solver import build_lr_scheduler, build_optimizer
from detkit.utils import comm
from detkit.utils.events import EventStorage

logger = logging.getLogger("detkit.plain_train_net")

WRITE_PERIOD = 20


def do_test(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Return the results on every data set of DATASETS.TEST, by its name."""
    results = {}
    for name in cfg.DATASETS.TEST:
        loader = build_detection_test_loader(cfg, name)
        evaluator = build_evaluator(cfg, name, str(Path(cfg.OUTPUT_DIR) / "inference" / name))
        results[name] = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            print_csv_format(results[name])  # to log.txt; the evaluators have shown their tables
    return results


def do_train(cfg: CfgNode, model: nn.Module, *, resume: bool) -> None:
    """Train from the start, or from the last checkpoint, to SOLVER.MAX_ITER."""
    cfg, data_loader = run_config(cfg, build_detection_train_loader)
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    max_iter = cfg.SOLVER.MAX_ITER
    writers = (
        build_writers(cfg.WRITERS, cfg.OUTPUT_DIR, max_iter, cfg) if comm.is_main_process() else []
    )
    checkpointer = DetectionCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        optimizer=optimizer,
        scheduler=scheduler,
        writers=PeriodicWriter(writers),  # for its state: how far they have written
    )
    start = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume).get("iteration", -1) + 1
    warn_about_random_fixed_norms(model, checkpointer.load_report)
    periodic_checkpointer = PeriodicCheckpointer(
        checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, max_iter
    )
    batches = iter(data_loader)
    # After the checkpointer, which saves the bare model.
    model = create_ddp_model(model).train()
    logger.info("training from iteration %d to %d", start, max_iter)

    with EventStorage(start) as storage:
        for iteration in range(start, max_iter):
            storage.iter = iteration
            losses = model(next(batches))
            total = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(total):
                raise FloatingPointError(f"loss is not finite at iteration {iteration}: {losses}")
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            storage.put_scalar("lr", optimizer.param_groups[0]["lr"], smoothing_hint=False)
            scheduler.step()

            for name, mean in comm.reduce_dict({"total_loss": total, **losses}).items():
                storage.put_scalar(name, mean)
            is_last = iteration + 1 == max_iter
            if (
                cfg.TEST.EVAL_PERIOD > 0
                and (iteration + 1) % cfg.TEST.EVAL_PERIOD == 0
                and not is_last
            ):
                do_test(cfg, model)
                # The main process alone computes the results; the others wait for it.
                comm.synchronize()
            if (iteration + 1) % WRITE_PERIOD == 0 or is_last:
                for writer in writers:
                    writer.write()
            periodic_checkpointer.step(iteration)
    for writer in writers:
        writer.close()


def run(args: argparse.Namespace) -> None:
    """Train and evaluate, or evaluate, in this process (one per GPU)."""
    cfg = get_cfg()
    cfg.merge_from_file(find_config(args.config_file))
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    refuse_settings(cfg, default_trainer_settings(), "tools/plain_train_net.py")
    default_setup(cfg, args)

    model = build_model(cfg)
    if args.eval_only:
        checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR)
        checkpointer.resume_or_load(
            cfg.MODEL.WEIGHTS,
            resume=args.resume,
            strict=not args.allow_partial,
            averaged=cfg.MODEL_EMA.USE_FOR_PREDICTION,
        )
    else:
        do_train(cfg, model, resume=args.resume)
    do_test(cfg, model)


def main() -> int:
    """Start one process per GPU, and return the exit status."""
    args = default_argument_parser().parse_args()
    machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    return run_command(launch, run, *machines, (args,))


if __name__ == "__main__":
    sys.exit(main())
