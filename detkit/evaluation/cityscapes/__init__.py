"""Cityscapes' scores of instances and of pixels."""

from detkit.evaluation.cityscapes.evaluator import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
)

__all__ = ["CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"]
