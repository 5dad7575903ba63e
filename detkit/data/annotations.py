"""From the annotations of one image to the ground truth that a model takes.

Legend: M objects in one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from detkit.data import transforms as T
from detkit.data.keypoint_annotations import as_keypoints, keypoints_of, transform_keypoints
from detkit.data.mask_annotations import masks_of, transform_segmentation
from detkit.structures import AnnotationRecord, Boxes, BoxMode, ImageRecord, Instances
from detkit.utils.image import SizeMismatchError

MIN_BOX_SIDE = 1e-5
"""Pixels: a box that is not wider and higher has nothing left of its object."""

Part = TypeVar("Part")


def boxes_of(annotations: Sequence[AnnotationRecord]) -> np.ndarray:
    """Return the boxes of M annotations, (M, 4) float64 XYXY in absolute pixels."""
    if not annotations:
        return np.zeros((0, 4))
    modes = {annotation["bbox_mode"] for annotation in annotations}
    if len(modes) > 1:
        return np.concatenate([boxes_of([annotation]) for annotation in annotations])
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    mode = modes.pop()
    if (
        mode == BoxMode.XYWH_ABS
    ):  # COCO's; ten times as quick as the general conversion, which goes through tensors
        boxes[:, 2:] += boxes[:, :2]
        return boxes
    return BoxMode.convert(boxes, mode, BoxMode.XYXY_ABS)


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return (M, 4) XYXY boxes limited to an image of `(height, width)`."""
    height, width = image_size
    return np.minimum(boxes.clip(min=0), (width, height, width, height))


def transform_instance_annotations(
    annotation: AnnotationRecord,
    transforms: T.Transform | Sequence[T.Transform],
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
) -> AnnotationRecord:
    """Return one annotation after the image was transformed, its box XYXY and limited to the image.

    Args:
        annotation: It is not changed.
        transforms: What was done to the image.
        image_size: `(height, width)` of the transformed image.
        keypoint_hflip_indices: As in `transform_keypoints`.

    Returns:
        A copy. Its polygons are not limited to the image, other masks are a bitmap of it; its
        keypoints are flat.

    Raises:
        ValueError: Mask or keypoints cannot be used.
    """
    if not isinstance(transforms, T.Transform):
        transforms = T.TransformList(transforms)
    box = clip_boxes(transforms.apply_box(boxes_of([annotation])), image_size)[0]
    moved: dict[str, Any] = {**annotation, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
    if "segmentation" in annotation:
        moved["segmentation"] = transform_segmentation(annotation["segmentation"], transforms)
    if "keypoints" in annotation:
        keypoints = keypoints_of([annotation], len(annotation.get("keypoints", ())) // 3)
        moved["keypoints"] = transform_keypoints(
            keypoints, transforms, image_size, keypoint_hflip_indices
        ).ravel()
    return cast(AnnotationRecord, moved)


def annotations_to_instances(
    annotations: Sequence[AnnotationRecord],
    image_size: tuple[int, int],
    mask_format: str = "polygon",
) -> Instances:
    """Return the ground truth of one image: `gt_boxes` and `gt_classes` (int64), `gt_masks` where all annotations have
    masks, and `gt_keypoints` where some have keypoints; all of length M.

    Args:
        annotations: M annotations in the coordinates of the image that the model sees.
        image_size: `(height, width)` of that image.
        mask_format: As in `masks_of`.

    Raises:
        ValueError: A mask or keypoints cannot be used.
    """
    instances = instances_of(annotations, boxes_of(annotations), image_size)
    if annotations and all("segmentation" in annotation for annotation in annotations):
        instances.gt_masks = masks_of(
            transformed_masks(annotations, T.NoOpTransform()), image_size, mask_format
        )
    num_keypoints = max(
        (len(annotation.get("keypoints", ())) // 3 for annotation in annotations), default=0
    )
    if num_keypoints:
        instances.gt_keypoints = as_keypoints(keypoints_of(annotations, num_keypoints))
    return instances


def transformed_masks(
    annotations: Sequence[AnnotationRecord],
    transforms: T.Transform,
    file_name: str = "the image",
    original_size: tuple[int, int] | None = None,
) -> list[list[np.ndarray] | np.ndarray]:
    """Return the masks of one image's annotations after it was transformed, each as `transform_segmentation` does.

    Args:
        annotations: They are not changed.
        transforms: What was done to the image.
        file_name: Of the image, for messages.
        original_size: As in `transform_segmentation`.

    Raises:
        ValueError: An annotation has no mask, or one that cannot be used.
    """
    return [
        _named(
            lambda a: transform_segmentation(_mask_of(a), transforms, original_size),
            annotation,
            file_name,
        )
        for annotation in annotations
    ]


def _mask_of(annotation: AnnotationRecord) -> Any:
    if "segmentation" not in annotation:
        raise ValueError("it has no segmentation, which MODEL.MASK_ON needs for every object")
    return annotation["segmentation"]


def _named(
    part_of: Callable[[AnnotationRecord], Part], annotation: AnnotationRecord, file_name: str
) -> Part:
    """Return what a function makes of an annotation; its errors name the annotation and the file."""
    try:
        return part_of(annotation)
    except ValueError as error:
        which = (
            f"annotation {annotation['id']}"
            if "id" in annotation
            else f"the object at {annotation['bbox']}"
        )
        raise ValueError(f"{which} of {file_name}: {error}") from error


def instances_of(
    annotations: Sequence[AnnotationRecord], boxes: np.ndarray, image_size: tuple[int, int]
) -> Instances:
    """Return the ground truth of one image whose boxes, (M, 4) XYXY, were transformed already."""
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
    instances: Instances,
    by_box: bool = ...,
    by_mask: bool = ...,
    box_threshold: float = ...,
    return_mask: bool = ...,
) -> Instances: ...
def filter_empty_instances(
    instances: Instances,
    by_box: bool = True,
    by_mask: bool = True,
    box_threshold: float = MIN_BOX_SIDE,
    return_mask: bool = False,
) -> Any:
    """Return the ground truth without objects that have nothing left, such as those a crop cut away.

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
    keep = (
        torch.stack(is_full).all(dim=0) if is_full else torch.ones(len(instances), dtype=torch.bool)
    )
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
            " The sides are exchanged: width and height were mixed up, or the image was annotated"
            " without regard to its EXIF orientation."
        )
    return (
        f"image {record['file_name']} is {found[1]}x{found[0]} (width x height), but its record"
        f" says {expected[1]}x{expected[0]}.{hint}"
    )
