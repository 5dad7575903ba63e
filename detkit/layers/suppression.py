"""Which of many overlapping detections stay: hard and soft suppression, per class or over all.

Legend: N boxes, G groups (classes), M boxes of the largest group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detkit.layers.nms import batched_nms
from detkit.utils.near_miss import did_you_mean

NMS_METHODS = ("hard", "linear", "gaussian")
"""Legal values of TEST.NMS.METHOD."""


@dataclass(frozen=True)
class NMSMethod:
    """How boxes suppress each other. As built it is the usual way: those of a class, wholly.

    Raises:
        ValueError: An unknown method, or a sigma that is not positive.
    """

    method: str = "hard"
    """hard drops what overlaps a better box; linear and gaussian lower its score.

    Source: Bodla et al. 2017, arXiv 1704.04503, equations 2 and 3.
    """
    sigma: float = 0.5
    """Width of the gaussian: a score is multiplied by exp(-IoU^2 / sigma)."""
    class_agnostic: bool = False
    """Whether boxes of different classes suppress each other too."""

    def __post_init__(self) -> None:
        if self.method not in NMS_METHODS:
            hint = did_you_mean(self.method, NMS_METHODS)
            raise ValueError(
                f"TEST.NMS.METHOD must be one of {', '.join(NMS_METHODS)}, got"
                f" {self.method!r}.{hint}"
            )
        if not self.sigma > 0:
            raise ValueError(f"TEST.NMS.SIGMA must be positive, got {self.sigma}")


def suppress(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    nms: NMSMethod,
    *,
    min_score: float = 0.0,
    topk: int = -1,
) -> tuple[Tensor, Tensor]:
    """Reduce detections of one image to those that stay.

    Args:
        boxes: (N, 4) XYXY.
        scores: (N,), positive and above `min_score`.
        classes: (N,) int64.
        iou_threshold: IoU above which (linear: from which on) a better box suppresses. A gaussian
            has no threshold.
        nms: The method.
        min_score: Lowered scores must stay above it.
        topk: At most this many stay; negative keeps all.

    Returns:
        int64 indices of the boxes that stay, best first, and their scores, lowered where the method
        is soft.
    """
    groups = torch.zeros_like(classes) if nms.class_agnostic else classes
    if nms.method == "hard" or len(boxes) == 0:
        keep = batched_nms(boxes, scores, groups, iou_threshold)
        keep = keep[:topk] if topk >= 0 else keep
        return keep, scores[keep]
    return _soft_nms(boxes, scores, groups, iou_threshold, nms, min_score, topk)


def _soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    nms: NMSMethod,
    min_score: float,
    topk: int,
) -> tuple[Tensor, Tensor]:
    # All groups at once: in every round each picks the best box it has left, and lowers the others.
    # Rounds are as many as the largest group has boxes; nothing is fetched from the device in
    # between.
    index = _table_of_groups(groups)  # (G, M), -1 where a group has no more boxes
    is_box = index >= 0
    boxes_of = boxes.float()[index.clamp(min=0)]
    left = torch.where(is_box, scores.float()[index.clamp(min=0)], -1.0)
    # The picks of a group fall in score: no more of them than are wanted in all can be among the
    # best.
    rounds = index.shape[1] if topk < 0 else min(index.shape[1], topk)
    picked, picked_scores = [], []
    for _ in range(rounds):
        best_score, best = left.max(dim=1)
        picked.append(index.gather(1, best[:, None])[:, 0])
        picked_scores.append(best_score)
        iou = _iou_with_one(boxes_of, boxes_of.gather(1, best[:, None, None].expand(-1, 1, 4)))
        # What is picked already, or no box at all, stays below 0.
        left = torch.where(left > 0, left * _decay(iou, iou_threshold, nms), -1.0).scatter(
            1, best[:, None], -1.0
        )
    if not picked:
        return groups.new_zeros(0), scores[:0]
    kept, kept_scores = torch.cat(picked), torch.cat(picked_scores)
    is_kept = kept_scores > max(min_score, 0.0)
    kept, kept_scores = kept[is_kept], kept_scores[is_kept]
    order = kept_scores.argsort(descending=True, stable=True)
    order = order[:topk] if topk >= 0 else order
    return kept[order], kept_scores[order].to(scores.dtype)


def _table_of_groups(groups: Tensor) -> Tensor:
    """Return (G, M): the indices of each group's members in a row, filled up with -1."""
    _, row, counts = groups.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(groups), device=groups.device) - starts[row[order]]
    table = groups.new_full((len(counts), int(counts.max())), -1)
    table[row[order], column] = order
    return table


def _iou_with_one(boxes: Tensor, one: Tensor) -> Tensor:
    """Return (G, M) IoU of the boxes (G, M, 4) of each group with one box (G, 1, 4)."""
    top_left, bottom_right = (
        torch.maximum(boxes[..., :2], one[..., :2]),
        torch.minimum(boxes[..., 2:], one[..., 2:]),
    )
    shared = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    union = _area(boxes) + _area(one) - shared
    return torch.where(union > 0, shared / union, 0.0)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1)


def _decay(iou: Tensor, iou_threshold: float, nms: NMSMethod) -> Tensor:
    if nms.method == "gaussian":
        return torch.exp(-(iou**2) / nms.sigma)
    return torch.where(iou >= iou_threshold, 1 - iou, 1.0)
