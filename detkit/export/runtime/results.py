"""From what an exported model returns to objects, masks and segments in the original image.

The same steps as `detkit.modeling.postprocessing` and the merging of `PanopticFPN`, in NumPy.

Legend: M objects in one image, K keypoints or classes of pixels, S cells of a mask along a side,
    H x W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.export.runtime.resize import resize_bilinear

# Class of the semantic branch that stands for all things.
_THINGS = 0


@dataclass(frozen=True)
class Detections:
    """The objects of an image in falling order of score, as arrays under Detectron2's names."""

    pred_boxes: np.ndarray
    """(M, 4) float32 XYXY in pixels of the image."""
    scores: np.ndarray
    """(M,) float32; of a proposal network, logits."""
    pred_classes: np.ndarray | None = None
    """(M,) int64."""
    pred_masks: np.ndarray | None = None
    """(M, H, W) bool."""
    pred_keypoints: np.ndarray | None = None
    """(M, K, 3) float32: x, y, score."""

    def get_fields(self) -> dict[str, np.ndarray]:
        """Return what the model predicts by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, item: Any) -> "Detections":
        """Select objects by a slice, a bool mask, or indices."""
        return Detections(**{name: value[item] for name, value in self.get_fields().items()})


def rescaled_detections(
    outputs: Mapping[str, np.ndarray],
    size: tuple[int, int],
    original_size: tuple[int, int],
    *,
    score_threshold: float,
    mask_threshold: float,
    mask_pasted: bool,
) -> Detections:
    """Return the objects of an image in its own pixels; boxes are clipped, empty ones dropped.

    Args:
        outputs: Of this image, only the rows of objects.
        size: `(height, width)` that the model saw.
        original_size: `(height, width)` of the image.
        score_threshold: Objects of no higher score are dropped.
        mask_threshold: Probability from which a pixel belongs to the object.
        mask_pasted: Whether masks are those of the image that the model saw.
    """
    height, width = original_size
    scale_x, scale_y = width / size[1], height / size[0]
    boxes = outputs["boxes"].astype(np.float32)
    boxes[:, 0::2] = (boxes[:, 0::2] * scale_x).clip(0, width)
    boxes[:, 1::2] = (boxes[:, 1::2] * scale_y).clip(0, height)
    # False for what is not a number, too.
    is_kept = (boxes[:, 2:] - boxes[:, :2] > 0).all(axis=1)
    is_kept &= outputs["scores"] > score_threshold
    kept = {name: values[is_kept] for name, values in outputs.items() if name != "sem_seg"}
    boxes, masks, keypoints = boxes[is_kept], kept.get("masks"), kept.get("keypoints")
    if masks is not None and mask_pasted:
        cut = masks[:, : size[0], : size[1]].transpose(1, 2, 0)
        masks = resize_bilinear(cut, original_size).transpose(2, 0, 1) >= 0.5
    elif masks is not None:
        masks = paste_masks(masks, boxes, original_size, mask_threshold)
    if keypoints is not None:
        keypoints = keypoints * np.array([scale_x, scale_y, 1], np.float32)
    return Detections(boxes, kept["scores"], kept.get("classes"), masks, keypoints)


def paste_masks(
    masks: np.ndarray, boxes: np.ndarray, image_size: tuple[int, int], threshold: float
) -> np.ndarray:
    """Return (M, H, W) bool: masks resized to their boxes, bilinearly, in an empty image.

    Args:
        masks: (M, S, S) probabilities.
        boxes: (M, 4) XYXY, not empty.
        image_size: `(H, W)`
        threshold: A pixel belongs to the mask where the probability is at least this.
    """
    # See `detkit.structures.mask_ops` for why two products of matrices, and only near the box.
    pasted = np.zeros((len(masks), *image_size), bool)
    boxes = boxes.astype(np.float32)
    limit = np.array([image_size[1], image_size[0]])
    grid = np.array([masks.shape[2], masks.shape[1]])
    scale = (grid / (boxes[:, 2:] - boxes[:, :2])).astype(np.float32)
    reach = (boxes[:, 2:] - boxes[:, :2]) / (2 * grid)
    first = np.floor(boxes[:, :2] - reach).clip(0, limit).astype(np.int64)
    last = np.ceil(boxes[:, 2:] + reach).clip(0, limit).astype(np.int64)
    y, x = (np.arange(side, dtype=np.float32) + np.float32(0.5) for side in image_size)
    lowest = max(threshold, float(np.finfo(np.float32).tiny))
    for i, ((x0, y0), (x1, y1)) in enumerate(zip(first, last, strict=True)):
        rows = _interpolation(y[y0:y1], boxes[i, 1], scale[i, 1], masks.shape[1])
        columns = _interpolation(x[x0:x1], boxes[i, 0], scale[i, 0], masks.shape[2])
        mask = masks[i].astype(np.float32, copy=False)
        pasted[i, y0:y1, x0:x1] = rows @ (mask @ columns.T) >= lowest
    return pasted


def _interpolation(
    pixels: np.ndarray, low: np.float32, scale: np.float32, num_cells: int
) -> np.ndarray:
    """Return the weights (P, cells) of the cells of a mask in P pixels along an axis."""
    position = (pixels - low) * scale - np.float32(0.5)
    distance = np.abs(position[:, None] - np.arange(num_cells, dtype=np.float32))
    return (1 - distance).clip(min=0)


def merged_segments(
    instances: Detections,
    labels: np.ndarray,
    *,
    overlap_threshold: float,
    stuff_area_limit: float,
    instances_score_threshold: float,
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Paint instances, best first, and fill the remaining pixels with stuff.

    Arguments and result are those of `combine_semantic_and_instance_outputs` in
    `detkit.modeling.meta_arch.panoptic_fpn`, as arrays.
    """
    fields = instances.get_fields()
    segments = np.zeros(labels.shape, np.int32)
    found: list[dict[str, Any]] = []
    for index in np.argsort(-instances.scores, kind="stable"):
        mask = fields["pred_masks"][index]
        area = int(mask.sum())
        if instances.scores[index] < instances_score_threshold or area == 0:
            continue
        free = mask & (segments == 0)
        # In float32, as there.
        covered = np.float32(area - int(free.sum())) / np.float32(area)
        if covered > np.float32(overlap_threshold):
            continue
        thing = {"id": len(found) + 1, "isthing": True, "score": float(instances.scores[index])}
        thing |= {"category_id": int(fields["pred_classes"][index]), "instance_id": int(index)}
        segments[free] = thing["id"]
        found.append(thing)
    is_free = segments == 0
    areas = np.bincount(labels[is_free], minlength=1)
    for label, area in enumerate(areas.tolist()):
        if label != _THINGS and area >= max(stuff_area_limit, 1):
            stuff = {"id": len(found) + 1, "isthing": False, "category_id": label, "area": area}
            segments[is_free & (labels == label)] = stuff["id"]
            found.append(stuff)
    return segments, found
