"""Panoptic quality."""

from detkit.evaluation.panoptic.evaluator import COCOPanopticEvaluator

__all__ = ["COCOPanopticEvaluator"]
