"""COCO's average precision of boxes, masks and keypoints."""

from detkit.evaluation.coco.evaluator import COCOEvaluator
from detkit.evaluation.coco.results import instances_to_coco_json

__all__ = ["COCOEvaluator", "instances_to_coco_json"]
