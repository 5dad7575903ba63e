"""Scoring what a model predicts on a data set."""

from detkit.evaluation.build import build_evaluator
from detkit.evaluation.cityscapes import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detkit.evaluation.coco import (
    COCOEvaluator,
    RotatedCOCOEvaluator,
    instances_to_coco_json,
)
from detkit.evaluation.evaluator import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from detkit.evaluation.lvis_evaluation import LVISEvaluator
from detkit.evaluation.panoptic import COCOPanopticEvaluator
from detkit.evaluation.pascal_voc_evaluation import PascalVOCDetectionEvaluator
from detkit.evaluation.sem_seg_evaluation import SemSegEvaluator
from detkit.evaluation.testing import flatten_results_dict, print_csv_format, verify_results

__all__ = [
    "COCOEvaluator",
    "COCOPanopticEvaluator",
    "CityscapesInstanceEvaluator",
    "CityscapesSemSegEvaluator",
    "DatasetEvaluator",
    "DatasetEvaluators",
    "LVISEvaluator",
    "PascalVOCDetectionEvaluator",
    "RotatedCOCOEvaluator",
    "SemSegEvaluator",
    "build_evaluator",
    "flatten_results_dict",
    "inference_context",
    "inference_on_dataset",
    "instances_to_coco_json",
    "print_csv_format",
    "verify_results",
]
