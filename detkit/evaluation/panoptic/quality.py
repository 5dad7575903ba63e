"""Panoptic quality: how well segments of things and stuff that do not overlap fit the true ones.

Source: Kirillov et al. 2018, "Panoptic segmentation", arXiv 1801.00868, section 4; rules for void
and crowd regions as in COCO's `panopticapi`, which is not on the package index.

Legend: C categories, S true segments and P predicted segments of one image, H and W its height and
    width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segment:
    """One segment of an image."""

    id: int
    """The number that its pixels hold; not 0."""
    category: int
    """In [0, C)."""
    is_crowd: bool = False


@dataclass
class PanopticCounts:
    """What panoptic quality is made of, per category; counts of several images add up."""

    iou: np.ndarray
    """(C,) overlaps of matched segments, summed up."""
    matched: np.ndarray
    """(C,) pairs of a true and a predicted segment."""
    wrong: np.ndarray
    """(C,) predicted segments without a true one."""
    missed: np.ndarray
    """(C,) true segments without a predicted one."""

    @classmethod
    def zeros(cls, num_categories: int) -> PanopticCounts:
        """Return the counts of no image."""
        return cls(*(np.zeros(num_categories) for _ in range(4)))

    def __add__(self, other: PanopticCounts) -> PanopticCounts:
        return PanopticCounts(
            self.iou + other.iou,
            self.matched + other.matched,
            self.wrong + other.wrong,
            self.missed + other.missed,
        )


def count_segments(
    truth_ids: np.ndarray,
    truth: Sequence[Segment],
    predicted_ids: np.ndarray,
    predicted: Sequence[Segment],
    num_categories: int,
) -> PanopticCounts:
    """Match the segments of one image.

    A pair of the same category matches if it overlaps by more than half, in which case no other
    pair does. Pixels that belong to no true segment count for no overlap. A predicted segment that
    lies by more than half in them, or in the crowd region of its category, is neither right nor
    wrong; a crowd region need not be found.

    Args:
        truth_ids: (H, W) segment id per pixel.
        truth: S segments. Ids of pixels that are not among them are void.
        predicted_ids: (H, W) likewise; 0 is nothing.
        predicted: P segments.
        num_categories: C.

    Raises:
        ValueError: The predicted pixels and segments do not have the same ids.
    """
    _require_same_ids(predicted_ids, predicted)
    shared = _shared_pixels(truth_ids, truth, predicted_ids, predicted)
    truth_area, predicted_area, in_void = (
        shared[:-1].sum(axis=1),
        shared.sum(axis=0)[:-1],
        shared[-1, :-1],
    )
    both = shared[:-1, :-1]
    union = truth_area[:, None] + predicted_area - both - in_void
    iou = np.divide(both, union, out=np.zeros(both.shape), where=union > 0)
    categories = np.array([segment.category for segment in truth], dtype=np.int64)
    predicted_categories = np.array([segment.category for segment in predicted], dtype=np.int64)
    is_crowd = np.array([segment.is_crowd for segment in truth], dtype=bool)
    match = (iou > 0.5) & (categories[:, None] == predicted_categories) & ~is_crowd[:, None]

    counts = PanopticCounts.zeros(num_categories)
    rows, columns = np.nonzero(match)
    np.add.at(counts.iou, categories[rows], iou[rows, columns])
    np.add.at(counts.matched, categories[rows], 1)
    np.add.at(counts.missed, categories[~is_crowd & ~match.any(axis=1)], 1)
    ignored = in_void.copy()
    # Of several crowd regions of a category the last one counts, as in panopticapi; COCO has one at
    # most.
    crowd_of = {segment.category: row for row, segment in enumerate(truth) if segment.is_crowd}
    for column, segment in enumerate(predicted):
        if segment.category in crowd_of:
            ignored[column] += both[crowd_of[segment.category], column]
    is_wrong = ~match.any(axis=0) & (ignored <= 0.5 * predicted_area)
    np.add.at(counts.wrong, predicted_categories[is_wrong], 1)
    return counts


def _require_same_ids(ids: np.ndarray, segments: Sequence[Segment]) -> None:
    in_pixels, listed = set(np.unique(ids).tolist()) - {0}, [segment.id for segment in segments]
    if len(set(listed)) != len(listed):
        raise ValueError(f"segment ids must be unique, got {sorted(listed)}")
    if in_pixels != set(listed):
        raise ValueError(
            "pixels and segments must have the same ids: only pixels have"
            f" {sorted(in_pixels - set(listed))}, only segments have"
            f" {sorted(set(listed) - in_pixels)}"
        )


def _shared_pixels(
    truth_ids: np.ndarray,
    truth: Sequence[Segment],
    predicted_ids: np.ndarray,
    predicted: Sequence[Segment],
) -> np.ndarray:
    """Return (S + 1, P + 1) pixels that segments share; the last row and column are the pixels
    outside all segments.
    """
    rows, columns = _indices(truth_ids, truth), _indices(predicted_ids, predicted)
    shape = (len(truth) + 1, len(predicted) + 1)
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def _indices(ids: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """Return (H W,) the index of each pixel's segment, and the number of segments where it has
    none.
    """
    present, inverse = np.unique(ids, return_inverse=True)
    index_of = {segment.id: index for index, segment in enumerate(segments)}
    return np.array([index_of.get(i, len(segments)) for i in present.tolist()], dtype=np.int64)[
        inverse.reshape(-1)
    ]


def panoptic_metrics(counts: PanopticCounts, is_thing: np.ndarray) -> dict[str, float]:
    """Return PQ, SQ, RQ over all categories, and with _th and _st over things and stuff, in [0, 100].

    A category without any segment, true or predicted, counts in no mean; nan where that leaves
    none.

    Args:
        counts: Over all images.
        is_thing: (C,) bool.
    """
    size = counts.matched + 0.5 * counts.wrong + 0.5 * counts.missed
    there = size > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        pq, rq = counts.iou / size, counts.matched / size
        sq = np.where(counts.matched > 0, counts.iou / counts.matched, 0.0)
    metrics = {}
    for suffix, chosen in (("", there), ("_th", there & is_thing), ("_st", there & ~is_thing)):
        for name, values in (("PQ", pq), ("SQ", sq), ("RQ", rq)):
            metrics[name + suffix] = (
                100 * float(values[chosen].mean()) if chosen.any() else float("nan")
            )
    return metrics
