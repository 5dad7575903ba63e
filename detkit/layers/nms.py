"""Non-maximum suppression: hard and soft, per class or over all; of rotated boxes too.

Legend: N boxes, G groups (classes), M boxes of the largest group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from detkit.layers.cpu.switch import is_traced
from detkit.layers.tensor_ops import nonzero_tuple
from detkit.structures import (
    RowImages,
    matched_pairwise_iou_rotated,
    overlapping_rotated_boxes,
    pairwise_iou_rotated,
)
from detkit.utils.errors import ContractError
from detkit.utils.text import did_you_mean

NMS_METHODS = ("hard", "linear", "gaussian")
"""Legal values of `NMSMethod.method`."""


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Drop each box that overlaps a better one of its own class.

    Args:
        boxes: (N, 4) XYXY of any floating dtype; computed in float32 or better, because half
            precision moves boxes by whole pixels.
        scores: (N,)
        idxs: (N,) int64 class (or pyramid level) of each box: boxes of different ones never
            suppress each other.
        iou_threshold: A box is dropped if its IoU with a kept one is above this.

    Returns:
        int64 indices of the boxes that stay, in descending order of score.

    Raises:
        ValueError: The shapes do not match.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]])
        >>> batched_nms(boxes, torch.tensor([0.9, 0.8, 0.7]), torch.zeros(3).long(), 0.5)
        tensor([0, 2])
    """
    counts = (scores.shape, idxs.shape)
    if boxes.dim() != 2 or boxes.shape[1] != 4 or counts != (boxes.shape[:1], boxes.shape[:1]):
        shapes = f"{tuple(boxes.shape)}, {tuple(scores.shape)} and {tuple(idxs.shape)}"
        raise ContractError(f"need boxes (N, 4), scores (N,) and idxs (N,): got {shapes}")
    if boxes.shape[0] == 0:
        return idxs.new_zeros(0, dtype=torch.int64)
    # Offsets keep classes apart. With a thousand classes they reach a million pixels, where float32
    # has steps of an eighth of a pixel, and the result would differ from that of class by class.
    # MPS has no float64.
    boxes = boxes.to(torch.float32 if boxes.device.type == "mps" else torch.float64)
    scores = scores.to(boxes.dtype)
    boxes = boxes - boxes.min()
    is_cpu = boxes.device.type == "cpu"
    if is_traced() or len(boxes) <= (1000 if is_cpu else _MOST_ON_GPU):
        return _nms_apart(boxes, scores, idxs, iou_threshold)
    # All classes at once would compare each pair of boxes, and class by class search all boxes once
    # per class: 5,000 classes took minutes. Sorted by class, each is a slice; small ones share one.
    order = scores.argsort(descending=True, stable=True)
    order = order[idxs[order].argsort(stable=True)]
    boxes, sorted_scores = boxes[order], scores[order]
    _, row, counts = idxs[order].unique_consecutive(return_inverse=True, return_counts=True)
    kept = []
    for start, end in _slices(counts.tolist(), 256 if is_cpu else _MOST_ON_GPU):
        boxes_s, groups_s = boxes[start:end], row[start:end] - row[start]
        keep_s = _nms_apart(boxes_s, sorted_scores[start:end], groups_s, iou_threshold)
        kept.append(start + keep_s)
    keep = order[torch.cat(kept)].sort().values
    return keep[scores[keep].argsort(descending=True, stable=True)]


# Boxes that one suppression takes on a GPU: a bit for each pair is 78 MB.
_MOST_ON_GPU = 25_000


def _nms_apart(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Suppress within groups: each is moved to a place of its own, beyond the largest coordinate.

    Args:
        boxes: (N, 4), N at least 1. Negative coordinates would bring groups together.
        scores: (N,)
        groups: (N,) int64
        iou_threshold: See `batched_nms`.
    """
    offsets = groups.to(boxes.dtype) * (boxes.max() + 1)
    return nms(boxes + offsets[:, None], scores, iou_threshold)


def nms_mask(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes no better one of their group overlaps: `batched_nms` in exported graphs.

    An operator of its own, because formats differ in how they keep groups apart.

    Args:
        boxes: (N, 4) XYXY.
        scores: (N,); what scores -inf may or may not stay.
        groups: (N,) int64, at least 0.
        iou_threshold: See `batched_nms`.

    Returns:
        (N,) bool.
    """
    return torch.ops.detkit.nms_mask(boxes, scores, groups, iou_threshold)


def nms_mask_by_offsets(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float
) -> Tensor:
    """Return `nms_mask`, with the operators of torch and torchvision alone."""
    # Two boxes in groups of their own always stay: torchvision tells torch.export that at least two
    # boxes do, and there is a smallest coordinate of no boxes.
    boxes = torch.cat([boxes.new_zeros(2, 4), boxes]).double()
    scores = torch.cat([scores.new_zeros(2), scores]).double()
    groups = torch.cat([torch.arange(2, device=groups.device), groups + 2])
    keep = _nms_apart(boxes - boxes.min(), scores, groups, iou_threshold)
    is_kept = torch.zeros_like(groups, dtype=torch.bool).index_fill(0, keep, True)
    return is_kept[2:]


def _shape_of_nms_mask(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float
) -> Tensor:
    return torch.empty_like(groups, dtype=torch.bool)


# Not by `torch.library.custom_op`: it looks through all modules for the file that it is called
# from, which took a tenth of the time to import this package.
_LIBRARY = torch.library.Library("detkit", "DEF")
_LIBRARY.define(
    "nms_mask(Tensor boxes, Tensor scores, Tensor groups, float iou_threshold) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("nms_mask", nms_mask_by_offsets, "CompositeExplicitAutograd")
_LIBRARY.impl("nms_mask", _shape_of_nms_mask, "Meta")


def _slices(counts: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence of groups into slices of whole groups, of `most` boxes unless one has more."""
    start = end = 0
    for count in counts:
        if end > start and end + count - start > most:
            yield start, end
            start = end
        end += count
    yield start, end


# Boxes that are compared with each other, and what stays of them with all lower-scored ones.
_NMS_BLOCK = 512


def nms_rotated(boxes: Tensor, scores: Tensor, iou_threshold: float, topk: int = -1) -> Tensor:
    """Drop each rotated box that overlaps a better one.

    Args:
        boxes: (N, 5) XYWHA.
        scores: (N,)
        iou_threshold: A box is dropped if its IoU with a kept one is above this.
        topk: The number of boxes after which to stop; negative finds all.

    Returns:
        int64 indices of the boxes that stay, in descending order of score.

    Raises:
        ValueError: The shapes do not match.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 5 or scores.shape != boxes.shape[:1]:
        shapes = f"{tuple(boxes.shape)} and {tuple(scores.shape)}"
        raise ValueError(f"need boxes (N, 5) and scores (N,): got {shapes}")
    left = scores.argsort(descending=True, stable=True)
    topk = len(boxes) if topk < 0 else topk
    kept = left[:0]
    # Block by block, best first: memory for N x N overlaps is never needed, and what an earlier
    # block suppresses is not compared again.
    while len(left) > 0 and len(kept) < topk:
        block, left = left[:_NMS_BLOCK], left[_NMS_BLOCK:]
        block = block[_stays(boxes[block], [len(block)], iou_threshold)]
        kept = torch.cat([kept, block])
        if len(left) > 0:
            ious = pairwise_iou_rotated(boxes[block], boxes[left], above=iou_threshold)
            left = left[~(ious > iou_threshold).any(dim=0)]
    return kept[:topk]


def _stays(boxes: Tensor, counts: Sequence[int], iou_threshold: float) -> Tensor:
    """Return (N,) bool: which boxes no better one of the same run suppresses.

    Args:
        boxes: (N, 5)
        counts: Lengths of consecutive runs of boxes, each sorted by score, best first.
        iou_threshold: See `nms_rotated`.
    """
    # Which ones stay depends on one after the other: on the host, a copy for all.
    pairs = overlapping_rotated_boxes(boxes, counts, iou_threshold).cpu().numpy()
    better, worse = pairs.T
    stays = np.ones(len(boxes), dtype=bool)
    while True:
        # Right for the first box of a run at once, and for one more with every round: in fact, few
        # rounds change anything.
        now = np.ones_like(stays)
        now[worse[stays[better]]] = False
        if (now == stays).all():
            return torch.from_numpy(stays).to(boxes.device)
        stays = now


def batched_nms_rotated(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, topk: int = -1
) -> Tensor:
    """Drop each rotated box that overlaps a better one of its own class.

    Args:
        boxes: (N, 5) XYWHA.
        scores: (N,)
        idxs: (N,) int64 class (or pyramid level) of each box, at least 0.
        iou_threshold: A box is dropped if its IoU with a kept one is above this.
        topk: See `nms_rotated`.

    Returns:
        int64 indices of the boxes that stay, in descending order of score.

    Raises:
        ValueError: The shapes do not match.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 5 or idxs.shape != boxes.shape[:1]:
        shapes = f"{tuple(boxes.shape)} and {tuple(idxs.shape)}"
        raise ContractError(f"need boxes (N, 5) and idxs (N,): got {shapes}")
    if boxes.shape[0] == 0:
        return idxs.new_zeros(0, dtype=torch.int64)
    if boxes.device.type == "cpu":
        return _nms_rotated_by_group(boxes, scores, idxs, iou_threshold, topk)
    # Moved apart by class, as in `batched_nms`, and in float64 for the same reason.
    boxes = boxes.to(torch.float32 if boxes.device.type == "mps" else torch.float64)
    reach = boxes[:, 2:4].norm(dim=1) / 2
    lowest = (boxes[:, :2].amin(dim=1) - reach).min()
    extent = (boxes[:, :2].amax(dim=1) + reach).max() - lowest + 1
    offsets = idxs.to(boxes.dtype) * extent
    boxes = torch.cat([boxes[:, :2] + offsets[:, None], boxes[:, 2:]], dim=1)
    return nms_rotated(boxes, scores, iou_threshold, topk)


def _nms_rotated_by_group(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, topk: int
) -> Tensor:
    """Return `batched_nms_rotated`, comparing boxes of the same group only.

    A GPU would wait for each group.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[idxs[order].argsort(stable=True)]
    counts = idxs[order].unique_consecutive(return_counts=True)[1].tolist()
    if max(counts) <= _NMS_BLOCK:
        # A few large operations instead of many small ones for each group.
        kept = [order[_stays(boxes[order], counts, iou_threshold)]]
    else:
        kept = [
            members[nms_rotated(boxes[members], scores[members], iou_threshold, topk)]
            for members in order.split(counts)
        ]
    # Of equal scores the first box comes first, as within a group.
    indices = torch.cat(kept).sort().values
    order = scores[indices].argsort(descending=True, stable=True)
    return indices[order][: len(boxes) if topk < 0 else topk]


@dataclass(frozen=True)
class NMSMethod:
    """How boxes suppress each other. The default is hard suppression within each class.

    Raises:
        ValueError: The method is unknown.
        ValueError: `sigma` is not positive.
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
            known = ", ".join(NMS_METHODS)
            raise ValueError(f"method must be one of {known}, got {self.method!r}.{hint}")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be positive, got {self.sigma}")


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
    """Suppress overlapping detections of one image.

    Args:
        boxes: (N, 4) XYXY, or (N, 5) XYWHA.
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
        keep = _suppress_hard(boxes, scores, groups, iou_threshold, topk)
        return keep, scores[keep]
    # All groups at once: in every round each picks the best box it has left, and lowers the others.
    # There are as many rounds as the largest group has boxes; nothing is fetched from the device in
    # between.
    index = _group_table(groups)
    is_box = index >= 0
    boxes_of = boxes.float()[index.clamp(min=0)]
    left = torch.where(is_box, scores.float()[index.clamp(min=0)], -1.0)
    # The picks of a group fall in score, so none after the first `topk` can be among the best.
    rounds = index.shape[1] if topk < 0 else min(index.shape[1], topk)
    picked, picked_scores = [groups.new_zeros(0)], [scores.new_zeros(0, dtype=torch.float32)]
    for _ in range(rounds):
        best_score, best = left.max(dim=1)
        picked.append(index.gather(1, best[:, None])[:, 0])
        picked_scores.append(best_score)
        best_boxes = boxes_of.take_along_dim(best[:, None, None], dim=1)
        iou = _iou_with_one(boxes_of, best_boxes)
        if nms.method == "gaussian":
            decay = torch.exp(-(iou**2) / nms.sigma)
        else:
            decay = torch.where(iou >= iou_threshold, 1 - iou, 1.0)
        # What is picked already, or no box at all, stays below 0.
        left = torch.where(left > 0, left * decay, -1.0).scatter(1, best[:, None], -1.0)
    kept, kept_scores = torch.cat(picked), torch.cat(picked_scores)
    is_kept = kept_scores > max(min_score, 0.0)
    kept, kept_scores = kept[is_kept], kept_scores[is_kept]
    order = kept_scores.argsort(descending=True, stable=True)
    order = order[:topk] if topk >= 0 else order
    return kept[order], kept_scores[order].to(scores.dtype)


def suppress_in_batch(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    images: RowImages,
    iou_threshold: float,
    nms: NMSMethod,
    topk: int,
) -> Tensor:
    """Suppress overlapping detections of all images of a batch at once, in an exported graph.

    Args:
        boxes: (R, 4) XYXY
        scores: (R,)
        classes: (R,) int64
        images: Those of the rows.
        iou_threshold: See `suppress`.
        nms: A hard method.
        topk: At most this many stay of an image.

    Returns:
        int64 indices of the boxes that stay: image by image, best first.
    """
    groups = images.index
    if not nms.class_agnostic:
        # With one more row: there is no largest of no classes.
        groups = groups * (torch.cat([classes, classes.new_zeros(1)]).max() + 1) + classes
    is_kept = nms_mask(boxes, scores, groups, iou_threshold)
    order = scores.argsort(descending=True, stable=True)
    image = torch.arange(images.sizes.shape[0], device=boxes.device)[:, None]
    is_kept = (images.index[order] == image) & is_kept[order]
    _, rank = nonzero_tuple(is_kept & (is_kept.cumsum(dim=1) <= topk))
    return order[rank]


def _suppress_hard(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, topk: int
) -> Tensor:
    suppress_all = batched_nms if boxes.shape[1] == 4 else batched_nms_rotated
    if topk < 0:
        return suppress_all(boxes, scores, groups, iou_threshold)
    # Only better boxes can suppress a box, so the best thousand usually contain all that is asked
    # for: of the 80,000 candidates that a threshold near 0 leaves, or of 5,000,000 with many
    # classes.
    most = max(1000, 10 * topk)
    while most < len(boxes) and not is_traced():
        lowest = scores.topk(most).values[-1]
        (best,) = nonzero_tuple(scores >= lowest)  # with those that score the same
        keep = best[suppress_all(boxes[best], scores[best], groups[best], iou_threshold)]
        if len(keep) >= topk:
            return keep[:topk]
        most *= 8
    return suppress_all(boxes, scores, groups, iou_threshold)[:topk]


def _group_table(groups: Tensor) -> Tensor:
    """Return (G, M) int64: the indices of each group's members in a row, padded with -1."""
    _, row, counts = groups.unique(return_inverse=True, return_counts=True)
    order = row.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.arange(len(groups), device=groups.device) - starts[row[order]]
    table = groups.new_full((len(counts), int(counts.max())), -1)
    table[row[order], column] = order
    return table


def _iou_with_one(boxes: Tensor, one: Tensor) -> Tensor:
    """Return (G, M) IoU of the boxes (G, M, 4 or 5) of each group with one box (G, 1, 4 or 5)."""
    if boxes.shape[2] == 5:
        pairs = boxes.flatten(0, 1), one.expand_as(boxes).flatten(0, 1)
        return matched_pairwise_iou_rotated(*pairs).view(boxes.shape[:2])
    top_left = torch.maximum(boxes[..., :2], one[..., :2])
    bottom_right = torch.minimum(boxes[..., 2:], one[..., 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(dim=2)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(dim=2)
    area_of_one = (one[..., 2:] - one[..., :2]).prod(dim=2)
    union = area + area_of_one - shared
    return torch.where(union > 0, shared / union, 0.0)
