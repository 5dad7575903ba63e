"""Boxes, masks, keypoints, instances and image batches: the geometry that all packages share."""

from detkit.structures.batch_boxes import BatchBoxes, RowImages, boxes_in_image
from detkit.structures.bit_masks import BitMasks, ROIMasks
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
from detkit.structures.keypoints import Keypoints, heatmaps_to_keypoints
from detkit.structures.mask_formats import (
    RLERecord,
    bitmask_to_polygons,
    bitmask_to_rle,
    polygon_area,
    polygons_to_bitmask,
    polygons_to_rle,
    rle_to_bitmask,
    union_of_rles,
    window_to_rle,
)
from detkit.structures.mask_ops import paste_masks_in_image
from detkit.structures.polygon_masks import PolygonMasks
from detkit.structures.records import (
    AnnotationRecord,
    ImageRecord,
    ModelInput,
    ModelOutput,
    as_flag,
)
from detkit.structures.rotated_boxes import (
    RotatedBoxes,
    matched_pairwise_iou_rotated,
    overlapping_rotated_boxes,
    pairwise_iou_rotated,
    rotated_box_corners,
    rotated_boxes_around,
)

__all__ = [
    "AnnotationRecord",
    "BatchBoxes",
    "BitMasks",
    "BoxMode",
    "Boxes",
    "ImageList",
    "ImageRecord",
    "Instances",
    "Keypoints",
    "ModelInput",
    "ModelOutput",
    "PolygonMasks",
    "RLERecord",
    "ROIMasks",
    "RotatedBoxes",
    "RowImages",
    "as_flag",
    "bitmask_to_polygons",
    "bitmask_to_rle",
    "boxes_in_image",
    "heatmaps_to_keypoints",
    "matched_pairwise_iou",
    "matched_pairwise_iou_rotated",
    "overlapping_rotated_boxes",
    "pairwise_intersection",
    "pairwise_ioa",
    "pairwise_iou",
    "pairwise_iou_rotated",
    "pairwise_point_box_distance",
    "paste_masks_in_image",
    "polygon_area",
    "polygons_to_bitmask",
    "polygons_to_rle",
    "rle_to_bitmask",
    "rotated_box_corners",
    "rotated_boxes_around",
    "union_of_rles",
    "window_to_rle",
]
