"""What a model detected in each image: checked as it comes in, and held compactly.

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

from detkit.structures import Instances, ModelInput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageDetections:
    """The detections of one image, as the model gave them, on the CPU."""

    image_id: int | str
    boxes: np.ndarray
    """(R, 4) XYXY in absolute pixels."""
    scores: np.ndarray
    """(R,)"""
    classes: np.ndarray
    """(R,) int64 contiguous class ids."""
    masks: list[dict[str, Any]] | None = None
    """(R,) masks of the image's size in COCO's run-length encoding, `counts` as bytes: a few hundred bytes each,
    where the pixels of a hundred masks would take 30 MB."""
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
        """Return what `to_arrays` told."""
        masks = masks_from_arrays(arrays) if "mask_sizes" in arrays else None
        return cls(
            image_id,
            arrays["boxes"],
            arrays["scores"],
            arrays["classes"],
            masks,
            arrays.get("keypoints"),
        )


def image_id_of(model_input: ModelInput) -> int | str:
    """Return the image id of a model input.

    Raises:
        ValueError: It has none; without it no detection finds its ground truth.
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
) -> ImageDetections:
    """Take the detections out of a detector's output, and check them.

    Args:
        image_id: The image they are in.
        instances: With `pred_boxes`, `scores`, `pred_classes`, on any device.
        dataset_name: For error messages.
        class_names: The classes of the data set.
        fields: Of `pred_masks` and `pred_keypoints`, what to take as well where it is there.

    Raises:
        ValueError: A class id lies outside the classes, a number is not finite, or masks do not
            have the size of the image.
    """
    detections = take_instances(image_id, instances, fields)
    classes = detections.classes
    outside = (classes < 0) | (classes >= len(class_names))
    if outside.any():
        raise ValueError(
            f"the model predicted the class ids {np.unique(classes[outside]).tolist()} in image"
            f" {image_id!r}, but data set {dataset_name!r} has {len(class_names)} classes, ids 0 to"
            f" {len(class_names) - 1} ({_shortened(class_names)}). Set the model's number of"
            f" classes (MODEL.ROI_HEADS.NUM_CLASSES) to {len(class_names)}, or evaluate on a data"
            " set with the classes it was trained on"
        )
    return _checked(detections)


def take_instances(
    image_id: int | str, instances: Instances, fields: Collection[str] = ()
) -> ImageDetections:
    """Take the detections out of a detector's output as they are: see `detections_from_instances`."""
    present = [name for name in fields if instances.has(name)]
    return ImageDetections(
        image_id,
        _to_numpy(instances.pred_boxes.tensor),
        _to_numpy(instances.scores),
        _to_numpy(instances.pred_classes).astype(np.int64),
        _encode_masks(image_id, instances) if "pred_masks" in present else None,
        _to_numpy(instances.pred_keypoints) if "pred_keypoints" in present else None,
    )


def detections_from_proposals(image_id: int | str, proposals: Instances) -> ImageDetections:
    """Take the proposals out of a proposal network's output: all of class 0, scored by their logits.

    Args:
        image_id: The image they are in.
        proposals: With `proposal_boxes`, `objectness_logits`, on any device.

    Raises:
        ValueError: A number is not finite.
    """
    scores = _to_numpy(proposals.objectness_logits)
    boxes = _to_numpy(proposals.proposal_boxes.tensor)
    return _checked(ImageDetections(image_id, boxes, scores, np.zeros(len(scores), dtype=np.int64)))


def explain_scores(
    dataset_name: str, num_images: int, num_objects: int, detections: Sequence[ImageDetections]
) -> None:
    """Log why scores are nan, 0, or lower than they could be.

    Args:
        dataset_name: The data set scored.
        num_images: Images it has.
        num_objects: Objects in them that can be found.
        detections: What was found, one entry per image that was predicted.
    """
    if num_objects == 0:
        logger.warning(
            "AP is nan: data set %s has no ground truth (%d images, no object)",
            dataset_name,
            num_images,
        )
        return
    if not detections:
        logger.warning(
            "AP is 0 on %s: none of its %d images was predicted", dataset_name, num_images
        )
    elif not any(len(detections_i) for detections_i in detections):
        logger.warning(
            "AP is 0 on %s: nothing was detected in any of %d images. The model has learnt too"
            " little yet, its weights were not loaded, or MODEL.ROI_HEADS.SCORE_THRESH_TEST is too"
            " high.",
            dataset_name,
            len(detections),
        )
    elif len(detections) < num_images:
        logger.warning(
            "only %d of the %d images of %s were predicted: the objects in the others count as"
            " missed",
            len(detections),
            num_images,
            dataset_name,
        )


def exact_iou(boxes1: np.ndarray, boxes2: np.ndarray) -> np.ndarray:
    """Return the overlaps of boxes in double precision; 0 where both boxes are empty.

    `structures.pairwise_iou` calculates in float32, in which an overlap of exactly 0.65 lies below
    the threshold 0.65.

    Args:
        boxes1: (N, 4) XYXY.
        boxes2: (M, 4) XYXY.

    Returns:
        (N, M) in [0, 1].
    """
    corners = boxes1[:, None].astype(np.float64), boxes2[None].astype(np.float64)
    sides = np.minimum(*(c[..., 2:] for c in corners)) - np.maximum(*(c[..., :2] for c in corners))
    intersection = sides.clip(min=0).prod(axis=-1)
    areas = [(c[..., 2:] - c[..., :2]).prod(axis=-1) for c in corners]
    union = areas[0] + areas[1] - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return (R, H, W) masks, on any device, in COCO's run-length encoding."""
    # The encoder reads columns of one mask after the other: turned where the masks are, they are
    # copied only once.
    columns = masks.detach().to(torch.uint8).transpose(1, 2).contiguous().cpu().numpy()
    return mask_util.encode(columns.transpose(2, 1, 0)) if len(columns) else []  # pyright: ignore[reportReturnType]


def masks_to_arrays(masks: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return (R,) masks in COCO's run-length encoding as (R, 2) sizes, (R,) numbers of bytes, and
    the bytes of all.
    """
    return {
        "mask_sizes": np.array([mask["size"] for mask in masks], dtype=np.int32).reshape(-1, 2),
        "mask_lengths": np.array([len(mask["counts"]) for mask in masks], dtype=np.int64),
        "mask_bytes": np.frombuffer(b"".join(mask["counts"] for mask in masks), dtype=np.uint8),
    }


def masks_from_arrays(arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """Return the masks that `masks_to_arrays` told."""
    counts, ends = arrays["mask_bytes"].tobytes(), np.cumsum(arrays["mask_lengths"])
    sizes, lengths = arrays["mask_sizes"].tolist(), arrays["mask_lengths"].tolist()
    return [
        {"size": size, "counts": counts[end - length : end]}
        for size, length, end in zip(sizes, lengths, ends.tolist(), strict=True)
    ]


def _encode_masks(image_id: int | str, instances: Instances) -> list[dict[str, Any]]:
    if len(instances) == 0:
        return []
    masks = getattr(instances.pred_masks, "tensor", instances.pred_masks)
    if (
        masks.ndim != 3
        or masks.dtype.is_floating_point
        or tuple(masks.shape[1:]) != tuple(instances.image_size)
    ):
        raise ValueError(
            f"masks in image {image_id!r} must be (R, H, W) bool with the image's size"
            f" {tuple(instances.image_size)}, got {tuple(masks.shape)} {masks.dtype}: those of a"
            " mask head have to be pasted into the image first (detector_postprocess)"
        )
    return encode_masks(masks)


def _checked(detections: ImageDetections) -> ImageDetections:
    # Sorting by score has no meaning with NaN, and a NaN box is scored differently by every COCO
    # tool.
    finite = np.isfinite(detections.scores) & np.isfinite(detections.boxes).all(axis=1)
    if detections.keypoints is not None:
        finite &= np.isfinite(detections.keypoints).all(axis=(1, 2))
    bad = ~finite
    if bad.any():
        example = f"score {detections.scores[bad][0]}, box {detections.boxes[bad][0].tolist()}"
        raise ValueError(
            f"{bad.sum()} of {len(detections)} detections in image {detections.image_id!r} have a"
            f" score, box or keypoints that are not finite, such as {example}: the model has"
            " probably diverged in training"
        )
    return detections


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    # NumPy has no bfloat16.
    return (
        tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
    ).numpy()


def _shortened(names: Sequence[str], limit: int = 10) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
