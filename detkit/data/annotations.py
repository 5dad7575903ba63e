"""From the annotations of one image to its ground truth: boxes, masks and keypoints.

Masks stay polygons as long as all masks of an image are polygons: moving points costs next to
nothing, and only what lies in a proposal is ever rasterized. Otherwise all become bitmaps.

Legend: M objects in one image, K keypoints of an object, H and W height and width of the image
    that the model sees.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from torch import Tensor

from detkit.data import transforms as T
from detkit.data.catalog import MetadataCatalog
from detkit.structures import (
    AnnotationRecord,
    BitMasks,
    Boxes,
    BoxMode,
    Instances,
    Keypoints,
    PolygonMasks,
    RotatedBoxes,
)
from detkit.structures.mask_formats import as_polygon, polygons_to_bitmask, rle_to_bitmask
from detkit.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

MASK_FORMATS = ("polygon", "bitmask")
MIN_BOX_SIDE = 1e-5
"""Pixels: a box that is not wider and higher than this is empty."""

# ------------------------------------------------------------------------------------------------
# whole annotations


def transform_instance_annotations(
    annotation: AnnotationRecord,
    transforms: T.Transform | Sequence[T.Transform],
    image_size: tuple[int, int],
    *,
    keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
) -> AnnotationRecord:
    """Return a copy of one annotation, transformed as its image was, with its box clipped to it.

    Args:
        annotation: Not changed.
        transforms: The transforms that were applied to the image.
        image_size: `(height, width)` of the transformed image.
        keypoint_hflip_indices: See `transform_keypoints`.

    Returns:
        The box is XYXY. Polygons are not clipped, other masks become a bitmap of the image;
        keypoints are (K, 3).

    Raises:
        DataError: The mask or the keypoints cannot be used.
    """
    if not isinstance(transforms, T.Transform):
        transforms = T.TransformList(transforms)
    box = clip_boxes(transforms.apply_box(boxes_of([annotation])), image_size)[0]
    moved: dict[str, Any] = {**annotation, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
    if "segmentation" in annotation:
        moved["segmentation"] = transform_segmentation(annotation["segmentation"], transforms)
    if "keypoints" in annotation:
        keypoints = keypoints_of([annotation], np.size(annotation["keypoints"]) // 3)
        moved["keypoints"] = transform_keypoints(
            keypoints, transforms, image_size, keypoint_hflip_indices
        )[0]
    return cast(AnnotationRecord, moved)


def annotations_to_instances(
    annotations: Sequence[AnnotationRecord],
    image_size: tuple[int, int],
    mask_format: str = "polygon",
) -> Instances:
    """Return the ground truth of one image.

    Args:
        annotations: M annotations in the coordinates of the image that the model sees.
        image_size: `(height, width)` of that image.
        mask_format: See `masks_of`.

    Returns:
        `gt_boxes` and `gt_classes` (int64), `gt_masks` if all annotations have masks, and
        `gt_keypoints` if some have keypoints; all of length M.

    Raises:
        DataError: A mask or keypoints cannot be used.
    """
    instances = instances_of(annotations, boxes_of(annotations), image_size)
    if annotations and all("segmentation" in annotation for annotation in annotations):
        masks = transformed_masks(annotations, T.NoOpTransform())
        instances.gt_masks = masks_of(masks, image_size, mask_format)
    num_keypoints = max((np.size(a.get("keypoints", ())) // 3 for a in annotations), default=0)
    if num_keypoints:
        instances.gt_keypoints = as_keypoints(keypoints_of(annotations, num_keypoints))
    return instances


def annotations_to_instances_rotated(
    annotations: Sequence[AnnotationRecord], image_size: tuple[int, int]
) -> Instances:
    """Return the ground truth of one image as rotated boxes.

    Args:
        annotations: M annotations in the coordinates of the image that the model sees. An upright
            box becomes one of angle 0.
        image_size: `(height, width)` of that image.

    Returns:
        `gt_boxes`, clipped as by `RotatedBoxes.clip`, and `gt_classes` (int64), of length M.
    """
    return instances_of(annotations, rotated_boxes_of(annotations), image_size)


def transformed_rotated_instances(
    annotations: Sequence[AnnotationRecord], transforms: T.Transform, image_size: tuple[int, int]
) -> Instances:
    """Return the rotated boxes and classes of one image, transformed as the image was.

    Objects whose center is outside of the image are left out: a turned box is not cut at the
    border, and most of such an object is not to be seen.
    """
    boxes = transforms.apply_rotated_box(rotated_boxes_of(annotations))
    height, width = image_size
    is_kept = ((boxes[:, :2] >= 0) & (boxes[:, :2] <= (width, height))).all(axis=1)
    is_kept &= (boxes[:, 2:4] > MIN_BOX_SIDE).all(axis=1)
    kept = np.flatnonzero(is_kept).tolist()
    return instances_of([annotations[k] for k in kept], boxes[kept], image_size)


def instances_of(
    annotations: Sequence[AnnotationRecord], boxes: np.ndarray, image_size: tuple[int, int]
) -> Instances:
    """Return boxes and classes of one image whose boxes were already transformed.

    They are (M, 4) XYXY, or (M, 5) XYWHA.
    """
    instances = Instances(image_size)
    tensor = torch.from_numpy(boxes.astype(np.float32))
    if boxes.shape[1] == 5:
        instances.gt_boxes = RotatedBoxes(tensor)
        instances.gt_boxes.clip(image_size)
    else:
        instances.gt_boxes = Boxes(tensor)
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
    """Return the ground truth without empty objects, such as those that a crop cut away.

    Args:
        instances: M objects; not changed.
        by_box: Drop boxes that are not wider and higher than `box_threshold`, and boxes with NaN.
        by_mask: Drop empty masks, if there are masks.
        box_threshold: In pixels.
        return_mask: Also return (M,) bool, true for the objects that were kept.
    """
    if not (by_box or by_mask):
        raise ValueError("choose what to filter by: by_box, by_mask or both")
    keep = torch.ones(len(instances), dtype=torch.bool)
    if by_box:
        keep = keep & instances.gt_boxes.nonempty(threshold=box_threshold)
    if by_mask and instances.has("gt_masks"):
        keep = keep & instances.gt_masks.nonempty()
    kept = instances if bool(keep.all()) else instances[keep]
    return (kept, keep) if return_mask else kept


def _where(annotation: AnnotationRecord, file_name: str) -> str:
    """Name an annotation by its id, or by its box, and its image."""
    if "id" in annotation:
        return f"annotation {annotation['id']} of {file_name}"
    return f"the object at {annotation['bbox']} of {file_name}"


# ------------------------------------------------------------------------------------------------
# boxes


def boxes_of(annotations: Sequence[AnnotationRecord]) -> np.ndarray:
    """Return the boxes of M annotations, (M, 4) float64 XYXY in absolute pixels."""
    if not annotations:
        return np.zeros((0, 4))
    modes = {annotation["bbox_mode"] for annotation in annotations}
    if len(modes) > 1:
        return np.concatenate([boxes_of([annotation]) for annotation in annotations])
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    mode = modes.pop()
    # COCO's mode is converted here: ten times as fast as `BoxMode.convert`, which goes through
    # tensors.
    if mode == BoxMode.XYWH_ABS:
        boxes[:, 2:] += boxes[:, :2]
        return boxes
    return BoxMode.convert(boxes, mode, BoxMode.XYXY_ABS)


def rotated_boxes_of(annotations: Sequence[AnnotationRecord]) -> np.ndarray:
    """Return the boxes of M annotations, (M, 5) float64 XYWHA; upright ones have the angle 0."""
    boxes = np.zeros((len(annotations), 5))
    for box, annotation in zip(boxes, annotations, strict=True):
        if len(annotation["bbox"]) == 5:
            box[:] = annotation["bbox"]
        else:
            x1, y1, x2, y2 = boxes_of([annotation])[0]
            box[:4] = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    return boxes


def clip_boxes(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return (M, 4) XYXY boxes clipped to an image of `(height, width)`."""
    height, width = image_size
    return np.minimum(boxes.clip(min=0), (width, height, width, height))


# ------------------------------------------------------------------------------------------------
# masks


def transformed_masks(
    annotations: Sequence[AnnotationRecord],
    transforms: T.Transform,
    file_name: str = "the image",
    original_size: tuple[int, int] | None = None,
) -> list[list[np.ndarray] | np.ndarray]:
    """Return the masks of one image's annotations, each transformed as by `transform_segmentation`.

    Args:
        annotations: Not changed.
        transforms: The transforms that were applied to the image.
        file_name: The image's file, for messages.
        original_size: See `transform_segmentation`.

    Raises:
        DataError: An annotation has no mask, or one that cannot be used.
    """
    masks = []
    for annotation in annotations:
        if "segmentation" not in annotation:
            raise DataError(
                f"{_where(annotation, file_name)}: it has no segmentation, which MODEL.MASK_ON"
                " needs for every object"
            )
        try:
            mask = transform_segmentation(annotation["segmentation"], transforms, original_size)
        except ValueError as error:
            raise DataError(f"{_where(annotation, file_name)}: {error}") from error
        masks.append(mask)
    return masks


def transform_segmentation(
    segmentation: Any, transforms: T.Transform, original_size: tuple[int, int] | None = None
) -> list[np.ndarray] | np.ndarray:
    """Return a mask, transformed as its image was: its polygons, or a bitmap.

    Args:
        segmentation: Polygons, a run-length mask, or a bitmap; not changed.
        transforms: The transforms that were applied to the image.
        original_size: `(height, width)` of the image before; None takes that of the mask.

    Returns:
        Flat float64 arrays `[x0, y0, ...]`, none if nothing is left; or (H, W) uint8.

    Raises:
        DataError: The mask has none of these forms, or another size than the image.
        ValueError: A polygon has fewer than three points or an odd number of coordinates.
    """
    if isinstance(segmentation, list | tuple):
        polygons = [as_polygon(polygon).reshape(-1, 2) for polygon in segmentation]
        return [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]
    if isinstance(segmentation, Mapping):
        bitmap = rle_to_bitmask(segmentation, *(original_size or (None, None)))
    elif not isinstance(segmentation, np.ndarray) or segmentation.ndim != 2:
        raise DataError(
            "a mask is a list of polygons, run lengths ({size, counts}) or an (H, W) array, got "
            f"{type(segmentation).__name__} {getattr(segmentation, 'shape', '')}".rstrip()
        )
    elif original_size is not None and segmentation.shape != tuple(original_size):
        raise DataError(
            f"a bitmap has the size of its image: got {segmentation.shape} for an image of"
            f" {tuple(original_size)}"
        )
    else:
        bitmap = segmentation != 0
    moved = transforms.apply_segmentation(bitmap.view(np.uint8))
    return (moved == 1).view(np.uint8)  # what came in from outside may have another label


def masks_of(
    segmentations: Sequence[list[np.ndarray] | np.ndarray],
    image_size: tuple[int, int],
    mask_format: str = "polygon",
) -> PolygonMasks | BitMasks:
    """Return the masks of one image's M objects as a model takes them.

    Args:
        segmentations: As returned by `transform_segmentation`.
        image_size: `(height, width)` of the image that the model sees.
        mask_format: "polygon" keeps polygons if all masks are polygons; "bitmask" rasterizes them.

    Raises:
        ConfigError: The format is unknown.
        DataError: A bitmap has another size than the image.
    """
    if mask_format not in MASK_FORMATS:
        raise ConfigError(
            f"INPUT.MASK_FORMAT must be one of {', '.join(MASK_FORMATS)}, got {mask_format!r}"
        )
    polygons = [mask for mask in segmentations if isinstance(mask, list)]
    if mask_format == "polygon" and len(polygons) == len(segmentations):
        return PolygonMasks(polygons)
    # One array for all, filled in place, instead of a stack of copies.
    bitmaps = np.zeros((len(segmentations), *image_size), dtype=bool)
    for bitmap, mask in zip(bitmaps, segmentations, strict=True):
        if isinstance(mask, list):
            mask = polygons_to_bitmask(mask, *image_size)
        if mask.shape != tuple(image_size):
            raise DataError(
                f"a mask must have the shape of its image, {tuple(image_size)}, got {mask.shape}"
            )
        bitmap[:] = mask
    return BitMasks(torch.from_numpy(bitmaps))


# ------------------------------------------------------------------------------------------------
# keypoints


def keypoints_of(
    annotations: Sequence[AnnotationRecord], num_keypoints: int, file_name: str = "the image"
) -> np.ndarray:
    """Return the keypoints of M annotations, (M, K, 3) float64, all 0 for an object without any.

    Args:
        annotations: Objects of one image.
        num_keypoints: K.
        file_name: The image's file, for messages.

    Raises:
        DataError: An object has another number of keypoints.
    """
    keypoints = np.zeros((len(annotations), num_keypoints, 3))
    for points, annotation in zip(keypoints, annotations, strict=True):
        values = np.asarray(annotation.get("keypoints", ()), dtype=np.float64).reshape(-1)
        if len(values) == 0:
            continue
        if len(values) != 3 * num_keypoints:
            raise DataError(
                f"{_where(annotation, file_name)} has {len(values)} keypoint numbers, but"
                f" {num_keypoints} keypoints (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) need"
                f" {3 * num_keypoints}: x, y and visibility of each"
            )
        points[:] = values.reshape(-1, 3)
    return keypoints


def transform_keypoints(
    keypoints: np.ndarray,
    transforms: T.Transform,
    image_size: tuple[int, int],
    keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Return keypoints, (M, K, 3), transformed as their image was.

    Args:
        keypoints: (M, K, 3) x, y, visibility; not changed.
        transforms: The transforms that were applied to the image.
        image_size: `(height, width)` of the transformed image.
        keypoint_hflip_indices: (K,) index of each keypoint's mirror image, such as the right hand
            for the left one; see `create_keypoint_hflip_indices`.

    Returns:
        Keypoints outside of the image become unlabelled; those that are unlabelled lie at (0, 0),
        as in COCO.

    Raises:
        ConfigError: The image was mirrored, and there are no indices.
    """
    height, width = image_size
    points = transforms.apply_coords(keypoints[..., :2].reshape(-1, 2))
    points = points.reshape(keypoints[..., :2].shape)
    # A point exactly on the far border counts as inside, as in Detectron2.
    is_inside = ((points >= 0) & (points <= (width, height))).all(axis=-1, keepdims=True)
    visibility = keypoints[..., 2:] * is_inside
    moved = np.concatenate([points, visibility], axis=-1) * (visibility > 0)
    if not T.is_mirrored(transforms):
        return moved
    if keypoint_hflip_indices is None:
        raise ConfigError(
            "the image was mirrored, and it is not known which keypoints that exchanges: give"
            " keypoint_hflip_indices, or set INPUT.RANDOM_FLIP none"
        )
    return moved[..., np.asarray(keypoint_hflip_indices), :]


def as_keypoints(keypoints: np.ndarray) -> Keypoints:
    """Return (M, K, 3) keypoints as a model takes them."""
    return Keypoints(torch.from_numpy(keypoints.astype(np.float32)))


def create_keypoint_hflip_indices(dataset_names: str | Sequence[str]) -> np.ndarray:
    """Return the index of each keypoint's mirror image, (K,) int64, from the data sets' metadata.

    Args:
        dataset_names: Data sets that are used together; they must have the same `keypoint_names`
            and `keypoint_flip_map`.

    Raises:
        ConfigError: A data set has no keypoint names or pairs, they differ, a name comes twice, or
            a pair names an unknown keypoint.
    """
    dataset_names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    if not dataset_names:
        raise ConfigError(
            "no data set is named whose metadata could say which keypoints a mirror exchanges"
        )
    names = _same_metadata(dataset_names, "keypoint_names")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            f"data set {dataset_names[0]!r} has several keypoints called {', '.join(repeated)}, so"
            " that it is not known which ones a mirror exchanges: give them names that differ, or"
            " set INPUT.RANDOM_FLIP none (and TEST.AUG.FLIP False)"
        )
    pairs = [tuple(pair) for pair in _same_metadata(dataset_names, "keypoint_flip_map")]
    stray = sorted({name for pair in pairs for name in pair} - set(names))
    if stray:
        raise ConfigError(
            f"keypoint_flip_map of data set {dataset_names[0]!r} names {', '.join(stray)}, which is"
            f" not among its keypoints: {', '.join(names)}"
        )
    if not pairs and len(names) > 1:
        logger.warning(
            "keypoint_flip_map is empty in data set %r: a mirror exchanges none of its keypoints."
            " Is that right? %s",
            dataset_names[0],
            ", ".join(names),
        )
    # A pair works in both directions; keypoints without one stay what they are.
    mirrored = dict(pairs) | {right: left for left, right in pairs}
    return np.array([names.index(mirrored.get(name, name)) for name in names], dtype=np.int64)


def _same_metadata(dataset_names: Sequence[str], key: str) -> list:
    """Return the list that all data sets have as metadata `key`."""
    first = MetadataCatalog.get(dataset_names[0]).get(key)
    for name in dataset_names:
        value = MetadataCatalog.get(name).get(key)
        if value is None:
            raise ConfigError(
                f"data set {name!r} has no {key}: name `keypoints` in the category of its json"
                f" file, under its entry in DATASETS.REGISTER, or in MetadataCatalog.get({name!r})"
            )
        if list(value) != list(first):
            raise ConfigError(
                f"data sets that are used together need the same {key}: {dataset_names[0]!r} has"
                f" {first}, {name!r} has {value}"
            )
    return list(first)
