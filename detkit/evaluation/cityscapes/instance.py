"""Cityscapes' average precision of instance masks.

Source: Cordts et al. 2016, "The Cityscapes dataset", arXiv 1604.01685, section 4.2, and the rules
of its evaluation scripts (`evalInstanceLevelSemanticLabeling.py`), which `tests/evaluation`
compares the numbers with. Where they differ from COCO's: a prediction belongs to the one object
that it overlaps by more than the threshold, and of several the best scored is right; regions of
several objects, void, and objects below 100 pixels need not be found, and excuse the predictions
that lie in them; the curve is integrated as it is, by trapezoids of half steps.

Legend: R predictions and M regions of one class in one image, T overlap thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# As the scripts count them; unlike COCO's list, some of these lie a little above their hundredth.
OVERLAPS = np.arange(0.5, 1.0, 0.05)
_SMALLEST_OBJECT = 100
_FIRST_INSTANCE_ID = 1000


@dataclass(frozen=True)
class ClassRegions:
    """The predictions and true regions of one class in one image."""

    scores: np.ndarray
    """(R,)"""
    areas: np.ndarray
    """(R,) pixels of each prediction, at least one."""
    in_void: np.ndarray
    """(R,) of these, those that lie where nothing is evaluated."""
    shared: np.ndarray
    """(R, M) pixels that predictions and regions share."""
    true_areas: np.ndarray
    """(M,)"""
    is_group: np.ndarray
    """(M,) whether a region holds several objects."""

    @property
    def counts(self) -> np.ndarray:
        """(M,) whether a region is an object that should be found."""
        return ~self.is_group & (self.true_areas >= _SMALLEST_OBJECT)


def compare_image(
    instance_ids: np.ndarray,
    masks: np.ndarray,
    label_ids: np.ndarray,
    scores: np.ndarray,
    evaluated: Sequence[int],
    void: Sequence[int],
) -> list[ClassRegions]:
    """Return what predictions and ground truth of one image share, per evaluated label.

    Args:
        instance_ids: (H, W) as in `*_gtFine_instanceIds.png`: 1000 times the label and the object's
            number; below 1000 the label itself, for void, stuff and groups of objects.
        masks: (N, H, W) bool predictions.
        label_ids: (N,) their labels.
        scores: (N,)
        evaluated: Labels of things.
        void: Labels that are not evaluated.
    """
    ids, inverse, areas = np.unique(instance_ids, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    shared = np.array(
        [np.bincount(inverse[mask.reshape(-1)], minlength=len(ids)) for mask in masks],
        dtype=np.int64,
    ).reshape(-1, len(ids))
    label_of = np.where(ids < _FIRST_INSTANCE_ID, ids, ids // _FIRST_INSTANCE_ID)
    predicted_areas, in_void = shared.sum(axis=1), shared[:, np.isin(ids, void)].sum(axis=1)
    regions = []
    for label in evaluated:
        rows, columns = (label_ids == label) & (predicted_areas > 0), label_of == label
        regions.append(
            ClassRegions(
                scores=scores[rows].astype(np.float64),
                areas=predicted_areas[rows],
                in_void=in_void[rows],
                shared=shared[rows][:, columns],
                true_areas=areas[columns],
                is_group=ids[columns] < _FIRST_INSTANCE_ID,
            )
        )
    return regions


def average_precisions(images: Sequence[ClassRegions]) -> np.ndarray:
    """Return (T,) AP in [0, 1] of one class over all images; nan without objects to find."""
    if not any(image.counts.any() for image in images):
        return np.full(len(OVERLAPS), np.nan)
    return np.array([_average_precision(images, overlap) for overlap in OVERLAPS])


def _average_precision(images: Sequence[ClassRegions], overlap: float) -> float:
    outcomes = [_outcome(image, overlap) for image in images]
    scores = np.concatenate([scores for scores, _, _ in outcomes])
    is_right = np.concatenate([right for _, right, _ in outcomes])
    num_missed = sum(missed for _, _, missed in outcomes)
    if not len(scores):
        return 0.0
    # At each score, what has that score or a better one.
    thresholds = np.unique(scores)
    order = np.argsort(scores, kind="stable")
    first = np.searchsorted(scores[order], thresholds)
    right = is_right.sum() - np.concatenate([[0], np.cumsum(is_right[order])])[first]
    precision = np.append(right / (len(scores) - first), 1.0)
    num_objects = is_right.sum() + num_missed
    recall = np.append(right / num_objects if num_objects else np.zeros(len(right)), 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)


def _outcome(image: ClassRegions, overlap: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return scores and whether they are right, of the predictions that count, and the number of
    objects missed.
    """
    union = image.areas[:, None] + image.true_areas - image.shared
    # Above a half at most one region per prediction.
    on_region = image.shared / union > overlap
    counts = image.counts
    is_right = np.zeros(len(image.scores), dtype=bool)
    for column in np.flatnonzero(counts):
        candidates = np.flatnonzero(on_region[:, column])
        if candidates.size:
            is_right[candidates[image.scores[candidates].argmax()]] = True
    # A group below the smallest size counts twice here, as it does in the scripts.
    excused = image.shared @ (
        image.is_group.astype(np.int64) + (image.true_areas < _SMALLEST_OBJECT)
    )
    ignored = (image.in_void + excused) / image.areas > overlap
    is_scored = np.where(on_region.any(axis=1), on_region[:, counts].any(axis=1), ~ignored)
    num_missed = int((counts & ~on_region.any(axis=0)).sum())
    return image.scores[is_scored], is_right[is_scored], num_missed
