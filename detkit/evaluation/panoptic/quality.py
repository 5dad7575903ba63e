"""Panoptic quality: how well non-overlapping segments of things and stuff match the true ones.

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
    """Value of its pixels; not 0."""
    category: int
    """In [0, C)."""
    is_crowd: bool = False


@dataclass
class PanopticCounts:
    """The sums behind panoptic quality, per category; the counts of several images add up."""

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

    Two segments of the same category match if they overlap by more than half. Pixels that belong to
    no true segment are void, and count for no overlap. An unmatched predicted segment is wrong
    unless more than half of it lies in void and the crowd region of its category. Crowd regions
    need not be found.

    Args:
        truth_ids: (H, W) segment id per pixel.
        truth: S segments. Pixels with other ids are void.
        predicted_ids: (H, W) likewise; 0 is no segment.
        predicted: P segments.
        num_categories: C.

    Raises:
        ValueError: The predicted pixels and segments do not have the same ids.
    """
    _require_same_ids(predicted_ids, predicted)
    # One pass over the pixels counts every pair of segments; the last row and column, of index S
    # and P, are the pixels outside all segments.
    rows, columns = _segment_indices(truth_ids, truth), _segment_indices(predicted_ids, predicted)
    shape = (len(truth) + 1, len(predicted) + 1)
    shared = np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)
    truth_area, predicted_area = shared[:-1].sum(axis=1), shared[:, :-1].sum(axis=0)
    both, in_void = shared[:-1, :-1], shared[-1, :-1]
    union = truth_area[:, None] + predicted_area - both - in_void
    iou = np.divide(both, union, out=np.zeros(both.shape), where=union > 0)

    categories = np.array([segment.category for segment in truth], dtype=np.int64)
    predicted_categories = np.array([segment.category for segment in predicted], dtype=np.int64)
    is_crowd = np.array([segment.is_crowd for segment in truth], dtype=bool)
    # Segments do not overlap, so above a half at most one pair matches in each row and column.
    match = (iou > 0.5) & (categories[:, None] == predicted_categories) & ~is_crowd[:, None]

    counts = PanopticCounts.zeros(num_categories)
    matched_rows, matched_columns = np.nonzero(match)
    # `add.at` and not `+=`: categories repeat, of which `+=` would count each once.
    np.add.at(counts.iou, categories[matched_rows], iou[matched_rows, matched_columns])
    np.add.at(counts.matched, categories[matched_rows], 1)
    np.add.at(counts.missed, categories[~is_crowd & ~match.any(axis=1)], 1)
    ignored = in_void.copy()
    # The last crowd region of a category counts, as in panopticapi; COCO has at most one.
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


def _segment_indices(ids: np.ndarray, segments: Sequence[Segment]) -> np.ndarray:
    """Return the (H W,) index of each pixel's segment; the number of segments for other ids."""
    present, inverse = np.unique(ids, return_inverse=True)
    index_of = {segment.id: index for index, segment in enumerate(segments)}
    indices = [index_of.get(segment_id, len(segments)) for segment_id in present.tolist()]
    return np.array(indices, dtype=np.int64)[inverse.reshape(-1)]


def panoptic_metrics(counts: PanopticCounts, is_thing: np.ndarray) -> dict[str, float]:
    """Compute PQ, SQ, RQ of all categories, and of things (_th) and stuff (_st), in [0, 100].

    A category without any segment, true or predicted, does not count in the mean; nan if none has.

    Args:
        counts: Over all images.
        is_thing: (C,) bool.
    """
    size = counts.matched + 0.5 * counts.wrong + 0.5 * counts.missed
    has_segments = size > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        pq, rq = counts.iou / size, counts.matched / size
        # 0 and not nan where nothing matched: such a category counts in the mean.
        sq = np.where(counts.matched > 0, counts.iou / counts.matched, 0.0)
    metrics = {}
    for suffix, group in (("", True), ("_th", is_thing), ("_st", ~is_thing)):
        chosen = has_segments & group
        for name, values in (("PQ", pq), ("SQ", sq), ("RQ", rq)):
            mean = float(values[chosen].mean()) if chosen.any() else float("nan")
            metrics[name + suffix] = 100 * mean
    return metrics
