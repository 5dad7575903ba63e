"""Non-maximum suppression within classes.

Legend: N boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms as _torchvision_batched_nms


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Drop each box that overlaps a better one of its own class.

    Args:
        boxes: (N, 4) XYXY. Any floating dtype; computed in float32 or better, because half
            precision moves boxes by whole pixels.
        scores: (N,)
        idxs: (N,) int64 class (or pyramid level) of each box: boxes of different ones never
            suppress each other.
        iou_threshold: A box goes if its IoU with a kept one is above this.

    Returns:
        int64 indices of the boxes that stay, in falling order of score.

    Raises:
        ValueError: The shapes do not fit each other.
    """
    if (
        boxes.dim() != 2
        or boxes.shape[1] != 4
        or scores.shape != boxes.shape[:1]
        or idxs.shape != boxes.shape[:1]
    ):
        shapes = f"{tuple(boxes.shape)}, {tuple(scores.shape)} and {tuple(idxs.shape)}"
        raise ValueError(f"need boxes (N, 4), scores (N,) and idxs (N,): got {shapes}")
    if boxes.shape[0] == 0:
        return idxs.new_zeros(0, dtype=torch.int64)
    boxes = boxes.to(_offset_dtype(boxes))
    # torchvision keeps classes apart by an offset of (largest coordinate + 1) per class, which does
    # so only if no coordinate is negative.
    return _torchvision_batched_nms(
        boxes - boxes.min(), scores.to(boxes.dtype), idxs, iou_threshold
    )


def _offset_dtype(boxes: Tensor) -> torch.dtype:
    # With a thousand classes the offsets reach a million pixels, where float32 has steps of an
    # eighth of a pixel, and the result would differ from that of class by class. MPS has no
    # float64.
    return torch.float32 if boxes.device.type == "mps" else torch.float64
