"""The detections of a model in each image: checked as they come in, and held compactly.

Legend: R detections in one image, J keypoints of one object; N and M boxes of two sets.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as mask_util
from torch import Tensor

from detkit.evaluation.collector import ImageCollector
from detkit.structures import (
    Boxes,
    BoxMode,
    Instances,
    ModelInput,
    RotatedBoxes,
    pairwise_iou_rotated,
)
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.text import listed

logger = logging.getLogger(__name__)

_ENCODED_AT_ONCE = 100


@dataclass(frozen=True)
class ImageDetections:
    """The detections of one image, as the model returned them, on the CPU."""

    image_id: int | str
    boxes: np.ndarray
    """(R, 4) XYXY in absolute pixels; (R, 5) XYWHA where rotated boxes are scored."""
    scores: np.ndarray
    """(R,)"""
    classes: np.ndarray
    """(R,) int64 contiguous class ids."""
    # A few hundred bytes per mask, where the pixels of a hundred masks would take 30 MB.
    masks: list[dict[str, Any]] | None = None
    """(R,) masks of the image's size in COCO's run-length encoding, `counts` as bytes."""
    keypoints: np.ndarray | None = None
    """(R, J, 3) x and y in absolute pixels, score."""

    def __len__(self) -> int:
        return len(self.scores)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        arrays = {"boxes": self.boxes, "scores": self.scores, "classes": self.classes}
        if self.masks is not None:
            arrays |= masks_to_arrays(self.masks)
        if self.keypoints is not None:
            arrays["keypoints"] = self.keypoints
        return arrays

    @classmethod
    def from_arrays(cls, image_id: int | str, arrays: Mapping[str, np.ndarray]) -> ImageDetections:
        """Build the detections from the arrays of `to_arrays`."""
        return cls(
            image_id,
            arrays["boxes"],
            arrays["scores"],
            arrays["classes"],
            masks_from_arrays(arrays) if "mask_sizes" in arrays else None,
            arrays.get("keypoints"),
        )


def image_id_of(model_input: ModelInput) -> int | str:
    """Return the image id of a model input.

    Raises:
        ValueError: It has none.
    """
    if "image_id" not in model_input:
        raise ValueError(
            "evaluation needs 'image_id' in every input of the model, got the keys"
            f" {sorted(model_input)}"
        )
    return model_input["image_id"]


def detections_from_instances(
    image_id: int | str,
    instances: Instances,
    dataset_name: str,
    class_names: Sequence[str],
    fields: Collection[str] = (),
    *,
    rotated: bool = False,
) -> ImageDetections:
    """Take the detections from a detector's output, and check them.

    Args:
        image_id: The image they are in.
        instances: With `pred_boxes`, `scores`, `pred_classes`, on any device.
        dataset_name: For error messages.
        class_names: The classes of the data set.
        fields: Of `pred_masks` and `pred_keypoints`, those to take if the instances have them.
        rotated: Whether to take boxes as XYWHA; otherwise upright ones around rotated boxes.

    Raises:
        ConfigError: A class id lies outside the classes.
        DataError: A number is not finite.
        ValueError: Masks do not have the size of the image.
    """
    detections = take_instances(image_id, instances, fields, rotated=rotated)
    classes = detections.classes
    outside = (classes < 0) | (classes >= len(class_names))
    if outside.any():
        raise ConfigError(
            f"the model predicted the class ids {np.unique(classes[outside]).tolist()} in image"
            f" {image_id!r}, but data set {dataset_name!r} has {len(class_names)} classes, ids 0 to"
            f" {len(class_names) - 1} ({listed(class_names)}). Set the model's number of classes"
            f" (MODEL.ROI_HEADS.NUM_CLASSES) to {len(class_names)}, or evaluate on a data set with"
            " the classes it was trained on"
        )
    return _checked(detections)


def take_instances(
    image_id: int | str,
    instances: Instances,
    fields: Collection[str] = (),
    *,
    rotated: bool = False,
) -> ImageDetections:
    """Take the detections from a detector's output without the checks of numbers and classes."""
    present = [name for name in fields if instances.has(name)]
    masks = None
    if "pred_masks" in present:
        masks = [] if len(instances) == 0 else _encoded_masks(image_id, instances)
    return ImageDetections(
        image_id,
        _box_array(instances.pred_boxes, rotated),
        _to_numpy(instances.scores),
        _to_numpy(instances.pred_classes).astype(np.int64),
        masks,
        _to_numpy(instances.pred_keypoints) if "pred_keypoints" in present else None,
    )


def _box_array(boxes: Boxes, rotated: bool) -> np.ndarray:
    """Return boxes as (R, 5) XYWHA if they are to be rotated, else as (R, 4) XYXY."""
    if isinstance(boxes, RotatedBoxes):
        return _to_numpy(boxes.tensor if rotated else boxes.upright().tensor)
    if not rotated:
        return _to_numpy(boxes.tensor)
    xywh = BoxMode.convert(boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
    return _to_numpy(BoxMode.convert(xywh, BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS))


def detections_from_proposals(
    image_id: int | str, proposals: Instances, *, rotated: bool = False
) -> ImageDetections:
    """Take the proposals from a proposal network's output: all of class 0, logits as scores.

    Args:
        image_id: The image they are in.
        proposals: With `proposal_boxes`, `objectness_logits`, on any device.
        rotated: See `detections_from_instances`.

    Raises:
        DataError: A number is not finite.
    """
    scores = _to_numpy(proposals.objectness_logits)
    boxes = _box_array(proposals.proposal_boxes, rotated)
    return _checked(ImageDetections(image_id, boxes, scores, np.zeros(len(scores), dtype=np.int64)))


def explain_scores(
    collector: ImageCollector[ImageDetections],
    detections: Sequence[ImageDetections],
    num_objects: int,
) -> None:
    """Log why scores are nan, 0, or lower than they could be.

    Args:
        collector: The collector of the detections.
        detections: Those of each image that was predicted.
        num_objects: Number of objects in the data set that can be found.
    """
    name, num_images = collector.dataset_name, len(collector.image_ids)
    if num_objects == 0:
        logger.warning(
            "AP is nan: data set %s has no ground truth (%d images, no object)", name, num_images
        )
    elif not detections:
        logger.warning("AP is 0 on %s: none of its %d images was predicted", name, num_images)
    elif not any(len(detections_i) for detections_i in detections):
        logger.warning(
            "AP is 0 on %s: nothing was detected in any of %d images. The model has learnt too"
            " little yet, its weights were not loaded, or MODEL.ROI_HEADS.SCORE_THRESH_TEST is too"
            " high.",
            name,
            len(detections),
        )
    else:
        collector.warn_if_incomplete(detections, "the objects in the others count as missed")


def exact_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Compute the overlaps of boxes in double precision; 0 where both boxes are empty.

    Args:
        boxes1: (N, 4) XYXY, or (N, 5) XYWHA.
        boxes2: (M, 4) XYXY, or (M, 5) XYWHA.

    Returns:
        (N, M) in [0, 1].
    """
    if boxes1.shape[1] == 5:
        tensors = (torch.from_numpy(boxes.astype(np.float64)) for boxes in (boxes1, boxes2))
        return pairwise_iou_rotated(*tensors).numpy()
    # `structures.pairwise_iou` computes in float32, where an overlap of exactly 0.65 lies below the
    # threshold 0.65.
    boxes1 = boxes1[:, None].astype(np.float64)
    boxes2 = boxes2[None].astype(np.float64)
    top_left = np.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = np.minimum(boxes1[..., 2:], boxes2[..., 2:])
    intersection = (bottom_right - top_left).clip(min=0).prod(axis=-1)
    areas1 = (boxes1[..., 2:] - boxes1[..., :2]).prod(axis=-1)
    areas2 = (boxes2[..., 2:] - boxes2[..., :2]).prod(axis=-1)
    union = areas1 + areas2 - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return (R, H, W) masks, on any device, in COCO's run-length encoding."""
    rles: list[dict[str, Any]] = []
    # A part at a time: the copies of 3,000 masks of 800 x 1333 took 6 GB beside the masks' 3.
    for part in masks.detach().split(_ENCODED_AT_ONCE):
        # The encoder reads the columns of one mask after the other. Transposed on the device, the
        # masks are copied only once.
        columns = part.to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
        # Typed as Any: pycocotools' stubs say that it returns the encoding of one mask.
        encoded: Any = mask_util.encode(columns.transpose(2, 1, 0)) if len(columns) else []
        rles += encoded
    return rles


def masks_to_arrays(masks: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return (R,) run-length masks as (R, 2) sizes, (R,) numbers of bytes, and all their bytes."""
    return {
        "mask_sizes": np.array([mask["size"] for mask in masks], dtype=np.int32).reshape(-1, 2),
        "mask_lengths": np.array([len(mask["counts"]) for mask in masks], dtype=np.int64),
        "mask_bytes": np.frombuffer(b"".join(mask["counts"] for mask in masks), dtype=np.uint8),
    }


def masks_from_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the masks from the arrays of `masks_to_arrays`."""
    counts, ends = arrays["mask_bytes"].tobytes(), np.cumsum(arrays["mask_lengths"])
    sizes, lengths = arrays["mask_sizes"].tolist(), arrays["mask_lengths"].tolist()
    return [
        {"size": size, "counts": counts[end - length : end]}
        for size, length, end in zip(sizes, lengths, ends.tolist(), strict=True)
    ]


def _encoded_masks(image_id: int | str, instances: Instances) -> list[dict[str, Any]]:
    if isinstance(instances.pred_masks, list):  # run lengths already, as `TiledModel` returns
        return [{**rle, "counts": _as_bytes(rle["counts"])} for rle in instances.pred_masks]
    # BitMasks hold a tensor, models return the tensor itself.
    masks = getattr(instances.pred_masks, "tensor", instances.pred_masks)
    is_pasted = masks.ndim == 3 and tuple(masks.shape[1:]) == tuple(instances.image_size)
    # Models that classify masks of the whole image, such as MaskFormer, return 0.0 and 1.0.
    if is_pasted and masks.dtype.is_floating_point:
        is_pasted = bool(torch.all((masks == 0) | (masks == 1)))
    if not is_pasted:
        raise ValueError(
            f"masks in image {image_id!r} must be (R, H, W) bool with the image's size"
            f" {tuple(instances.image_size)}, got {tuple(masks.shape)} {masks.dtype}: those of a"
            " mask head have to be pasted into the image first (detector_postprocess)"
        )
    return encode_masks(masks)


def _as_bytes(counts: str | bytes) -> bytes:
    return counts.encode("ascii") if isinstance(counts, str) else counts


def _checked(detections: ImageDetections) -> ImageDetections:
    # NaN scores have no order, and each COCO tool scores a NaN box in its own way.
    finite = np.isfinite(detections.scores) & np.isfinite(detections.boxes).all(axis=1)
    if detections.keypoints is not None:
        finite &= np.isfinite(detections.keypoints).all(axis=(1, 2))
    bad = ~finite
    if bad.any():
        example = f"score {detections.scores[bad][0]}, box {detections.boxes[bad][0].tolist()}"
        raise DataError(
            f"{bad.sum()} of {len(detections)} detections in image {detections.image_id!r} have a"
            f" score, box or keypoints that are not finite, such as {example}: the model has"
            " probably diverged in training"
        )
    return detections


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16.
    is_half = tensor.is_floating_point() and tensor.itemsize < 4
    return (tensor.float() if is_half else tensor).numpy()
