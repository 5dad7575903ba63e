"""COCO's average precision of boxes, masks and keypoints."""

from detkit.evaluation.coco.evaluator import COCOEvaluator, RotatedCOCOEvaluator
from detkit.evaluation.coco.results import instances_to_coco_json

__all__ = ["COCOEvaluator", "RotatedCOCOEvaluator", "instances_to_coco_json"]
