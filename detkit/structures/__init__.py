"""Boxes, instances and image batches: the geometry that models, data and evaluation share."""

from detkit.structures.box_mode import BoxMode
from detkit.structures.boxes import (
    Boxes,
    matched_pairwise_iou,
    pairwise_intersection,
    pairwise_ioa,
    pairwise_iou,
    pairwise_point_box_distance,
)
from detkit.structures.image_list import ImageList
from detkit.structures.instances import Instances
from detkit.structures.records import AnnotationRecord, ImageRecord, ModelInput, ModelOutput, RLERecord

__all__ = [
    "AnnotationRecord",
    "BoxMode",
    "Boxes",
    "ImageList",
    "ImageRecord",
    "Instances",
    "ModelInput",
    "ModelOutput",
    "RLERecord",
    "matched_pairwise_iou",
    "pairwise_intersection",
    "pairwise_ioa",
    "pairwise_iou",
    "pairwise_point_box_distance",
]
