"""Scores and processor time of a trained model with other settings, beside those without them.

    python benchmarks/settings.py --model output/quick_start/model_final.pth TEST.AMP.ENABLED True
    python benchmarks/settings.py --model output/quick_start/model_final.pth MODEL.COMPILE dense

Both run on each image of the test data in turn, in one process.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer
from detkit.config import CfgNode
from detkit.engine import DefaultTrainer
from detkit.engine.evaluations import testing_precision
from detkit.engine.predictor import config_of_checkpoint
from detkit.evaluation.evaluator import inference_context
from detkit.utils.env import reuse_freed_memory
from detkit.utils.logger import setup_logger


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per score: plain, with the settings, and their difference.

    Args:
        argv: Words of the command line; None takes those of this process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="FILE", help="checkpoint of a detkit run")
    parser.add_argument("--images", type=int, help="only so many")
    parser.add_argument("settings", nargs="+", metavar="KEY VALUE")
    args = parser.parse_args(argv)
    setup_logger()
    reuse_freed_memory()
    plain = config_of_checkpoint(args.model)
    plain.merge_from_list(["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0])
    changed = plain.clone()
    changed.merge_from_list(args.settings)
    models = nn.ModuleList(_loaded(cfg) for cfg in (plain, changed))
    precisions = [testing_precision(cfg) for cfg in (plain, changed)]
    seconds: list[list[float]] = [[], []]
    (dataset,) = plain.DATASETS.TEST
    evaluators = [DefaultTrainer.build_evaluator(plain, dataset) for _ in models]
    for evaluator in evaluators:
        evaluator.reset()
    with inference_context(models), torch.no_grad():
        for number, inputs in enumerate(DefaultTrainer.build_test_loader(plain, dataset)):
            if number == args.images:
                break
            for side in (0, 1) if number % 2 else (1, 0):
                start = time.process_time()
                with precisions[side]():
                    outputs = models[side](inputs)
                seconds[side].append(time.process_time() - start)
                evaluators[side].process(inputs, outputs)
    _print(args.settings, seconds, [evaluator.evaluate() or {} for evaluator in evaluators])


def _loaded(cfg: CfgNode) -> nn.Module:
    model = DefaultTrainer.build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def _print(settings: list[str], seconds: list[list[float]], results: list[dict[str, Any]]) -> None:
    print(f"{' '.join(settings)}: plain, changed")
    for task, scores in results[0].items():
        for name, score in scores.items():
            other = results[1][task][name]
            print(f"{task} {name}: {score:.2f} {other:.2f} ({other - score:+.2f})")
    plain, changed = (1000 * statistics.median(side) for side in seconds)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    print(f"CPU ms per image: {plain:.1f} {changed:.1f} ({ratio:.2f} times as fast)")


if __name__ == "__main__":
    main()
