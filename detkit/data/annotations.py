"""From the annotations of one image to the ground truth that a model takes.

Only boxes and classes so far. Records that carry `segmentation` or `keypoints` pass through unharmed: what has not been
transformed is left out of the result rather than handed on in the coordinates of the old image.

Legend: M objects in one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor

from detkit.data import transforms as T
from detkit.structures import AnnotationRecord, Boxes, BoxMode, ImageRecord, Instances
from detkit.utils.image import SizeMismatchError

MIN_BOX_SIDE = 1e-5
"""Pixels: a box that is not wider and higher has nothing left of its object."""

_UNTRANSFORMED_KEYS = ("segmentation", "keypoints")


def boxes_of(annotations: Sequence[AnnotationRecord]) -> np.ndarray:
    """Give the boxes of M annotations, (M, 4) float64 XYXY in absolute pixels."""
    if not annotations:
        return np.zeros((0, 4))
    modes = {annotation["bbox_mode"] for annotation in annotations}
    if len(modes) > 1:
        return np.concatenate([boxes_of([annotation]) for annotation in annotations])
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    mode = modes.pop()
    if mode == BoxMode.XYWH_ABS:  # COCO's; ten times as quick as the general conversion, which goes through tensors
        boxes[:, 2:] += boxes[:, :2]
        return boxes
    return BoxMode.convert(boxes, mode, BoxMode.XYXY_ABS)


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Give (M, 4) XYXY boxes limited to an image of `(height, width)`."""
    height, width = image_size
    return np.minimum(boxes.clip(min=0), (width, height, width, height))


def transform_instance_annotations(
    annotation: AnnotationRecord, transforms: T.Transform | Sequence[T.Transform], image_size: tuple[int, int]
) -> AnnotationRecord:
    """Give one annotation after the image was transformed, its box XYXY and limited to the image.

    Args:
        annotation: It is not changed.
        transforms: What was done to the image.
        image_size: `(height, width)` of the transformed image.

    Returns:
        A copy, without masks and keypoints.
    """
    if not isinstance(transforms, T.Transform):
        transforms = T.TransformList(transforms)
    box = clip_boxes(transforms.apply_box(boxes_of([annotation])), image_size)[0]
    kept = {key: value for key, value in annotation.items() if key not in _UNTRANSFORMED_KEYS}
    return cast(AnnotationRecord, {**kept, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS})


def annotations_to_instances(annotations: Sequence[AnnotationRecord], image_size: tuple[int, int]) -> Instances:
    """Give the ground truth of one image: `gt_boxes` and `gt_classes` (int64), both of length M.

    Args:
        annotations: M annotations in the coordinates of the image that the model sees.
        image_size: `(height, width)` of that image.
    """
    return instances_of(annotations, boxes_of(annotations), image_size)


def instances_of(annotations: Sequence[AnnotationRecord], boxes: np.ndarray, image_size: tuple[int, int]) -> Instances:
    """Give the ground truth of one image whose boxes, (M, 4) XYXY, were transformed already."""
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(torch.from_numpy(boxes.astype(np.float32)))
    classes = [annotation["category_id"] for annotation in annotations]
    instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return instances


@overload
def filter_empty_instances(
    instances: Instances,
    by_box: bool = ...,
    by_mask: bool = ...,
    box_threshold: float = ...,
    *,
    return_mask: Literal[True],
) -> tuple[Instances, Tensor]: ...
@overload
def filter_empty_instances(
    instances: Instances, by_box: bool = ..., by_mask: bool = ..., box_threshold: float = ..., return_mask: bool = ...
) -> Instances: ...
def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = MIN_BOX_SIDE,
    return_mask: bool = False,
) -> Any:
    """Give the ground truth without objects that have nothing left, such as those a crop cut away.

    Args:
        instances: M objects; they are not changed.
        by_box: Drop boxes that are not wider and higher than `box_threshold`. NaN counts as that.
        by_mask: Drop empty masks, where there are masks.
        box_threshold: In pixels.
        return_mask: Also give (M,) bool, true for what was kept.
    """
    if not (by_box or by_mask):
        raise ValueError("choose what to filter by: by_box, by_mask or both")
    is_full = [instances.gt_boxes.nonempty(threshold=box_threshold)] if by_box else []
    if by_mask and instances.has("gt_masks"):
        is_full.append(instances.gt_masks.nonempty())
    keep = torch.stack(is_full).all(dim=0) if is_full else torch.ones(len(instances), dtype=torch.bool)
    kept = instances if bool(keep.all()) else instances[keep]
    return (kept, keep) if return_mask else kept


def check_image_size(record: ImageRecord, image: np.ndarray) -> None:
    """Compare an image, (H, W, ...), with the size that its record gives; a record without a size gets the image's.

    Raises:
        SizeMismatchError: They differ. Boxes would lie in the wrong places.
    """
    height, width = image.shape[:2]
    if "height" in record and "width" in record:
        expected = (record["height"], record["width"])
        if expected != (height, width):
            raise SizeMismatchError(_size_mismatch(record, expected, (height, width)))
    record["height"], record["width"] = height, width


def _size_mismatch(record: ImageRecord, expected: tuple[int, int], found: tuple[int, int]) -> str:
    hint = ""
    if expected == found[::-1]:
        hint = (
            " The sides are exchanged: width and height were mixed up, or the image was annotated without regard to "
            "its EXIF orientation."
        )
    return (
        f"image {record['file_name']} is {found[1]}x{found[0]} (width x height), but its record says "
        f"{expected[1]}x{expected[0]}.{hint}"
    )
