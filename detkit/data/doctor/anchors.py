"""How well anchors meet the objects of a data set, and sizes and ratios that meet them better.

Legend: M objects, A anchors per cell.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from detkit.config import CfgNode
from detkit.data.doctor.annotations import Objects, resize_scales
from detkit.data.doctor.finding import Findings

_IOU = 0.5
_ENOUGH = 0.9  # of the objects
_GAIN = 0.05  # by which other anchors must be better to be worth a change
_SAMPLE, _ROUNDS = 20_000, 30


class AnchorLevel(NamedTuple):
    """The anchors of one feature level."""

    stride: float
    offset: float
    """Centre of the first cell, in strides."""
    cells: np.ndarray
    """(A, 4) XYXY around (0, 0)."""


def best_overlaps(
    boxes: np.ndarray, sizes: np.ndarray, levels: Sequence[AnchorLevel]
) -> np.ndarray:
    """Return (M,) the IoU of each box with the anchor that it overlaps most.

    Args:
        boxes: (M, 4) XYXY, as the model sees them.
        sizes: (M, 2) width and height of the images, likewise.
        levels: Anchors, symmetric around their cells.
    """
    best = np.zeros(len(boxes))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    for stride, offset, cells in levels:
        # The nearest cell overlaps most: the overlap falls with the distance along each axis.
        last = np.maximum(np.ceil(sizes / stride) - 1, 0)
        nearest = np.clip(np.rint(centers / stride - offset), 0, last)
        shift = np.tile((nearest + offset) * stride, 2)
        for cell in cells:
            low = np.maximum(boxes[:, :2], (shift + cell)[:, :2])
            common = np.clip(np.minimum(boxes[:, 2:], (shift + cell)[:, 2:]) - low, 0, None)
            common = common.prod(axis=1)
            union = areas + (cell[2:] - cell[:2]).prod() - common
            best = np.maximum(best, common / union)
    return best


def check_anchors(
    cfg: CfgNode, all_objects: Sequence[Objects], levels: Sequence[AnchorLevel], findings: Findings
) -> dict[str, Any]:
    """Note the objects that no anchor meets, where other anchors would meet clearly more.

    Args:
        cfg: The resize, and the sizes and ratios of `levels`.
        all_objects: The data sets that are trained on.
        levels: The anchors of the model.
        findings: Added to.

    Returns:
        What was measured, for the report.
    """
    chosen = [o.is_usable & ~o.is_crowd & np.isfinite(o.sizes).all(axis=1) for o in all_objects]
    boxes, sizes = [], []
    for objects, mask in zip(all_objects, chosen, strict=True):
        scale = resize_scales(cfg, objects.sizes[mask])[:, None]
        boxes.append(objects.boxes[mask] * scale)
        sizes.append(objects.sizes[mask] * scale)
    if not levels or not sum(map(len, boxes)):
        return {}
    overlaps = [best_overlaps(b, s, levels) for b, s in zip(boxes, sizes, strict=True)]
    recall = float((np.concatenate(overlaps) >= _IOU).mean())
    measured: dict[str, Any] = {"recall": round(recall, 4)}
    if recall >= _ENOUGH:
        return measured
    ratios = cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    num_ratios = len(ratios[0]) if isinstance(ratios[0], list | tuple) else len(ratios)
    better, setting = _better_levels(np.concatenate(boxes), levels, num_ratios)
    reached = best_overlaps(np.concatenate(boxes), np.concatenate(sizes), better) >= _IOU
    measured["suggested"] = {**setting, "recall": round(float(reached.mean()), 4)}
    if reached.mean() < recall + _GAIN:
        return measured
    remedy = (
        f"MODEL.ANCHOR_GENERATOR: {{SIZES: {setting['SIZES']}, ASPECT_RATIOS:"
        f" {setting['ASPECT_RATIOS']}}} would meet {reached.mean():.0%} of the objects at IoU"
        f" {_IOU}, instead of {recall:.0%}."
    )
    for objects, mask, overlap in zip(all_objects, chosen, overlaps, strict=True):
        missed = np.zeros(len(mask), dtype=bool)
        missed[mask] = overlap < _IOU
        objects.note(findings, "anchor-recall", missed, remedy=remedy)
    return measured


def _better_levels(
    boxes: np.ndarray, levels: Sequence[AnchorLevel], num_ratios: int
) -> tuple[list[AnchorLevel], dict[str, Any]]:
    """Return as many anchors, chosen for the sizes and ratios of boxes, and their config keys."""
    sides = boxes[:, 2:] - boxes[:, :2]
    sides = sides[:: -(-len(sides) // _SAMPLE)]
    ratios = np.exp(_k_means(np.log(sides[:, 1] / sides[:, 0]), num_ratios)).round(2)
    counts = [max(len(level.cells) // num_ratios, 1) for level in levels]
    sizes = np.exp(_k_means(np.log(sides.prod(axis=1)) / 2, sum(counts))).round(1)
    per_level = np.split(sizes, np.cumsum(counts)[:-1])
    better = []
    for level, level_sizes in zip(levels, per_level, strict=True):
        width = level_sizes[:, None] / np.sqrt(ratios)
        half = np.stack([width, width * ratios], axis=-1).reshape(-1, 2) / 2
        better.append(level._replace(cells=np.concatenate([-half, half], axis=1)))
    keys = {"SIZES": [s.tolist() for s in per_level], "ASPECT_RATIOS": [ratios.tolist()]}
    return better, keys


def _k_means(values: np.ndarray, k: int) -> np.ndarray:
    """Return (k,) increasing means of clusters of numbers, by Lloyd's rounds from quantiles."""
    means = np.quantile(values, (np.arange(k) + 0.5) / k)
    for _ in range(_ROUNDS):
        nearest = np.abs(values[:, None] - means).argmin(axis=1)
        sums, counts = np.bincount(nearest, values, k), np.bincount(nearest, minlength=k)
        means = np.where(counts > 0, sums / np.maximum(counts, 1), means)
    return np.sort(means)
