"""Cityscapes' scores of instances and of pixels."""

from detkit.evaluation.cityscapes.instance import CityscapesInstanceEvaluator
from detkit.evaluation.cityscapes.sem_seg import CityscapesSemSegEvaluator

__all__ = ["CityscapesInstanceEvaluator", "CityscapesSemSegEvaluator"]
