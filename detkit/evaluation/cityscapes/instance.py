"""Cityscapes' average precision of instance masks.

Source: Cordts et al. 2016, "The Cityscapes dataset", arXiv 1604.01685, section 4.2, and the rules
of its evaluation scripts (`evalInstanceLevelSemanticLabeling.py`), which `tests/evaluation`
compares the numbers with. Where they differ from COCO's:

- A prediction belongs to the one object that it overlaps by more than the threshold; of several
  predictions of an object, the best scored is right.
- Groups of objects, void, and objects below 100 pixels need not be found, and predictions in them
  are ignored.
- The precision-recall curve is integrated as it is, by trapezoids of half steps.

Legend: R predictions and M regions of one class in one image, T overlap thresholds, K classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detkit.evaluation.cityscapes.evaluator import (
    FIRST_INSTANCE_ID,
    LABEL_IDS,
    CityscapesEvaluator,
)
from detkit.evaluation.evaluator import output_of
from detkit.structures import Instances, ModelOutput
from detkit.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

# arange, as in the scripts: unlike COCO's linspace, it puts some thresholds a little above their
# hundredth.
OVERLAPS = np.arange(0.5, 1.0, 0.05)
_SMALLEST_OBJECT = 100
# The pngs hold label ids below 34; those that are not evaluated are void.
_VOID = sorted(set(range(34)) - set(LABEL_IDS.values()))


@dataclass(frozen=True)
class ClassRegions:
    """The predictions and true regions of one class in one image."""

    scores: np.ndarray
    """(R,)"""
    areas: np.ndarray
    """(R,) pixels of each prediction, at least one."""
    in_void: np.ndarray
    """(R,) pixels of each prediction that lie in void."""
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


@dataclass(frozen=True)
class _ImageRegions:
    image_id: str
    regions: list[ClassRegions]
    """(K,)"""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        arrays = {"sizes": np.array([regions.shared.shape for regions in self.regions])}
        for name in vars(self.regions[0]):
            parts = [getattr(regions, name).reshape(-1) for regions in self.regions]
            arrays[name] = np.concatenate(parts)
        return arrays

    @classmethod
    def from_arrays(cls, image_id: str, arrays: Mapping[str, np.ndarray]) -> _ImageRegions:
        """Build the regions from the arrays of `to_arrays`."""
        regions = []
        row = column = cell = 0
        for num_rows, num_columns in arrays["sizes"].tolist():
            rows = slice(row, row + num_rows)
            columns = slice(column, column + num_columns)
            cells = slice(cell, cell + num_rows * num_columns)
            row, column, cell = rows.stop, columns.stop, cells.stop
            regions.append(
                ClassRegions(
                    scores=arrays["scores"][rows],
                    areas=arrays["areas"][rows],
                    in_void=arrays["in_void"][rows],
                    shared=arrays["shared"][cells].reshape(num_rows, num_columns),
                    true_areas=arrays["true_areas"][columns],
                    is_group=arrays["is_group"][columns],
                )
            )
        return cls(image_id, regions)


class CityscapesInstanceEvaluator(CityscapesEvaluator):
    """Scores instance masks by Cityscapes' AP.

    The results have `segm` with AP (over the thresholds 0.50, 0.55, ..., 0.95), AP50 and
    AP-<class>. A class without objects is nan and does not count in the mean; objects in images
    that were not predicted count as missed.
    """

    task = "segm"
    classes_key = "thing_classes"
    item_type = _ImageRegions
    scored = "instances"
    class_prefix = "AP-"

    def _compare(self, frame: str, output: ModelOutput) -> _ImageRegions:
        truth = self._instance_ids(frame)
        # Panoptic models leave instances out of an image in which they see none: Panoptic-DeepLab.
        if "instances" not in output and "panoptic_seg" in output:
            none = torch.zeros(0, dtype=torch.long)
            instances = Instances(truth.shape, pred_classes=none, scores=none)
        else:
            instances = output_of(output, "instances", "Cityscapes' AP")
        classes = instances.pred_classes.cpu().numpy()
        masks = np.zeros((0, *truth.shape), dtype=bool)
        if len(instances):
            if not instances.has("pred_masks"):
                raise ConfigError(
                    f"Cityscapes' AP needs 'pred_masks' in the instances of {frame}, which have"
                    f" only {sorted(instances.get_fields())}: was the model built with"
                    " MODEL.MASK_ON?"
                )
            predicted = getattr(instances.pred_masks, "tensor", instances.pred_masks)
            if tuple(predicted.shape[1:]) != truth.shape:
                raise DataError(
                    f"masks of {frame} must have the size of the ground truth, {truth.shape}"
                    f" (height, width), got {tuple(predicted.shape[1:])}: are 'height' and 'width'"
                    " in the inputs of the model?"
                )
            masks = predicted.cpu().numpy().astype(bool)
            if not 0 <= classes.min() <= classes.max() < len(self._class_names):
                raise ConfigError(
                    f"the model predicted the class ids {np.unique(classes).tolist()} in {frame},"
                    f" but data set {self._dataset_name!r} has {len(self._class_names)} classes."
                    " Set MODEL.ROI_HEADS.NUM_CLASSES"
                )
        labels = np.array(self._labels)[classes]
        scores = instances.scores.float().cpu().numpy()
        return _ImageRegions(frame, compare_image(truth, masks, labels, scores, self._labels))

    def _score(self, images: Sequence[_ImageRegions]) -> dict[str, float]:
        regions = [image.regions for image in images]
        if self._collector.warn_if_incomplete(images, "the objects in the others count as missed"):
            predicted = {image.image_id for image in images}
            nothing = np.zeros(0, dtype=np.int64)
            # As if nothing had been predicted there: objects of each class are missed.
            for frame in self._frames:
                if frame not in predicted:
                    truth = self._instance_ids(frame)
                    no_masks = np.zeros((0, *truth.shape), dtype=bool)
                    regions.append(compare_image(truth, no_masks, nothing, nothing, self._labels))
        if images and not any(len(r.scores) for image in regions for r in image):
            logger.warning("AP is 0 on %s: nothing was detected in any image", self._dataset_name)

        per_class = [average_precisions(of_class) for of_class in zip(*regions, strict=True)]
        precisions = np.array(per_class).reshape(-1, len(OVERLAPS))
        known = precisions[~np.isnan(precisions).any(axis=1)]
        metrics = {"AP": math.nan, "AP50": math.nan}
        if known.size:
            metrics = {"AP": 100 * float(known.mean()), "AP50": 100 * float(known[:, 0].mean())}
        for name, row in zip(self._class_names, precisions, strict=True):
            metrics[f"AP-{name}"] = 100 * float(row.mean())
        return metrics


def compare_image(
    instance_ids: np.ndarray,
    masks: np.ndarray,
    label_ids: np.ndarray,
    scores: np.ndarray,
    evaluated: Sequence[int],
) -> list[ClassRegions]:
    """Count the pixels that predictions and ground truth of one image share, per evaluated label.

    Args:
        instance_ids: (H, W) as in `*_gtFine_instanceIds.png`: 1000 times the label and the object's
            number; below 1000 the label itself, for void, stuff and groups of objects.
        masks: (N, H, W) bool predictions.
        label_ids: (N,) their labels.
        scores: (N,)
        evaluated: Labels of things.
    """
    ids, inverse, areas = np.unique(instance_ids, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    # One pass per mask counts its pixels in every region of the image.
    shared = np.zeros((len(masks), len(ids)), dtype=np.int64)
    for row, mask in zip(shared, masks, strict=True):
        row[:] = np.bincount(inverse[mask.reshape(-1)], minlength=len(ids))
    label_of = np.where(ids < FIRST_INSTANCE_ID, ids, ids // FIRST_INSTANCE_ID)
    predicted_areas, in_void = shared.sum(axis=1), shared[:, np.isin(ids, _VOID)].sum(axis=1)
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
                is_group=ids[columns] < FIRST_INSTANCE_ID,
            )
        )
    return regions


def average_precisions(images: Sequence[ClassRegions]) -> np.ndarray:
    """Compute the (T,) AP in [0, 1] of one class over all images; nan without objects to find."""
    if not any(image.counts.any() for image in images):
        return np.full(len(OVERLAPS), np.nan)
    precisions = []
    for overlap in OVERLAPS:
        scores, is_right, num_missed = _outcomes(images, overlap)
        precisions.append(_area_under_curve(scores, is_right, num_missed) if len(scores) else 0.0)
    return np.array(precisions)


def _outcomes(images: Sequence[ClassRegions], overlap: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return scores of predictions that count, whether they are right, and the objects missed."""
    scores, is_right, num_missed = [], [], 0
    for image in images:
        union = image.areas[:, None] + image.true_areas - image.shared
        # Regions do not overlap, so above a half this is at most one region per prediction.
        on_region = image.shared / union > overlap
        counts = image.counts
        is_right_i = np.zeros(len(image.scores), dtype=bool)
        for column in np.flatnonzero(counts):
            candidates = np.flatnonzero(on_region[:, column])
            if candidates.size:
                # argmax: of equal scores the first is right.
                is_right_i[candidates[image.scores[candidates].argmax()]] = True
        # A group below the smallest size counts twice here, as it does in the scripts.
        is_small = image.true_areas < _SMALLEST_OBJECT
        excused = image.shared @ (image.is_group.astype(np.int64) + is_small)
        is_ignored = (image.in_void + excused) / image.areas > overlap
        is_scored = np.where(on_region.any(axis=1), on_region[:, counts].any(axis=1), ~is_ignored)
        scores.append(image.scores[is_scored])
        is_right.append(is_right_i[is_scored])
        num_missed += int((counts & ~on_region.any(axis=0)).sum())
    return np.concatenate(scores), np.concatenate(is_right), num_missed


def _area_under_curve(scores: np.ndarray, is_right: np.ndarray, num_missed: int) -> float:
    # One point of the curve per distinct score: what has that score or a better one.
    thresholds = np.unique(scores)
    order = np.argsort(scores, kind="stable")
    first = np.searchsorted(scores[order], thresholds)
    right = is_right.sum() - np.concatenate([[0], np.cumsum(is_right[order])])[first]
    precision = np.append(right / (len(scores) - first), 1.0)
    num_objects = is_right.sum() + num_missed
    recall = np.append(right / num_objects if num_objects else np.zeros(len(right)), 0.0)
    # Each precision is weighted by half the distance between its neighbours' recalls.
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (padded[:-2] - padded[2:]) / 2)
