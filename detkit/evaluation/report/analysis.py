"""The numbers of the error report, all from one `Matching`.

Legend: D detections, G objects, T thresholds, P recall points, K classes, B resamplings of images;
n detections of one class.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.evaluation.coco.results import RECALL_POINTS, CocoScores, coco_metrics
from detkit.evaluation.detections import exact_iou
from detkit.evaluation.report.matching import Matching, Outcome

BACKGROUND_OVERLAP = 0.1
"""Overlap below which a detection counts as background. Source: TIDE, section 2.2."""
ERROR_TYPES = ("classification", "localisation", "both", "duplicate", "background", "missed")
SCORE_GRID = np.round(np.linspace(0, 1, 101), 2)
_NUM_CALIBRATION_BINS = 10

Bins = list[tuple[str, str, np.ndarray, np.ndarray]]
"""Name, meaning, which objects and which unmatched detections are in it."""


def precision_at_recalls(
    is_hit: np.ndarray, is_counted: np.ndarray, num_objects: float, weights: Any = 1.0
) -> np.ndarray:
    """Compute the interpolated precision at COCO's recall points.

    Args:
        is_hit: (T, n) whether a detection found an object, best score first.
        is_counted: (T, n) whether it is right or wrong, and not ignored.
        num_objects: Number of objects that can be found, above 0.
        weights: (n,) how often each detection counts.

    Returns:
        (T, P) in [0, 1]; their mean is AP.
    """
    hits = np.cumsum(is_hit * weights, axis=1)
    counted = np.cumsum(is_counted * weights, axis=1)
    precision = hits / (counted + np.spacing(1))
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    # Beyond the highest recall, precision is 0.
    precision = np.pad(precision, [(0, 0), (0, 1)])
    recall = hits / num_objects
    at = [np.searchsorted(recall_t, RECALL_POINTS, side="left") for recall_t in recall]
    return np.take_along_axis(precision, np.array(at), axis=1)


def scores_of(matching: Matching, outcomes: Mapping[str, Outcome]) -> CocoScores:
    """Return COCO's precision and recall of outcomes, each an area range by its name."""
    num_thresholds, num_classes = len(matching.protocol.iou_thresholds), len(matching.class_names)
    precision = np.full((num_thresholds, len(RECALL_POINTS), num_classes, len(outcomes), 1), -1.0)
    recall = np.full((num_thresholds, num_classes, len(outcomes), 1), -1.0)
    for a, outcome in enumerate(outcomes.values()):
        for k, rows in enumerate(matching.class_rows):
            count = outcome.num_objects[k]
            if count:
                is_hit, is_counted = outcome.is_hit[:, rows], outcome.is_counted[:, rows]
                precision[:, :, k, a, 0] = precision_at_recalls(is_hit, is_counted, count)
                recall[:, k, a, 0] = is_hit.sum(axis=1) / count
    return CocoScores(
        precision,
        recall,
        [matching.protocol.max_dets_of(matching.task)],
        matching.protocol.iou_thresholds,
        tuple(outcomes),
    )


def metrics_of(matching: Matching) -> dict[str, float]:
    """Return the metrics that `COCOEvaluator` gives for the task, in [0, 100]."""
    outcomes = {"all": matching.outcome}
    for name, _, objects, detections in size_bins(matching):
        outcomes[name] = matching.outcome_of(objects, detections)
    named = matching.protocol.named_thresholds
    return coco_metrics(scores_of(matching, outcomes), matching.class_names, named)


def size_bins(matching: Matching) -> Bins:
    """Return the area ranges of the protocol, but for the one that holds all."""
    bins: Bins = []
    for name, (low, high) in matching.protocol.area_ranges_of(matching.task).items():
        if name != "all":
            meaning = f"{math.sqrt(low):.0f} to {math.sqrt(high):.0f} pixels a side"
            areas = (matching.objects.areas, matching.detections.areas)
            inside = [(a >= low) & (a <= high) for a in areas]
            bins.append((name, meaning.replace("to 100000", "or more"), inside[0], inside[1]))
    return bins


def aspect_bins(matching: Matching) -> Bins:
    """Return tall, compact and wide boxes."""
    kinds = []
    for items in (matching.objects, matching.detections):
        ratios = items.boxes[:, 2] / np.maximum(items.boxes[:, 3], 1e-9)
        # The borders belong to the compact ones.
        kinds.append((ratios >= 0.5).astype(int) + (ratios > 2.0))
    return [
        (name, meaning, kinds[0] == number, kinds[1] == number)
        for number, (name, meaning) in enumerate(
            (
                ("tall", "more than twice as high as wide"),
                ("compact", "neither side more than twice the other"),
                ("wide", "more than twice as wide as high"),
            )
        )
    ]


def crowding_bins(matching: Matching) -> Bins:
    """Return objects by how much the next object of any class overlaps their box.

    A detection goes with the object that it overlaps most; without one it is alone.
    """
    objects = matching.objects
    crowding = np.zeros(len(objects))
    of_detection = np.zeros(len(matching.detections))
    for found, there, overlaps in zip(
        matching.detection_rows, matching.object_rows, matching.overlaps, strict=True
    ):
        boxes = objects.boxes[there]
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        between = exact_iou(corners, corners)
        np.fill_diagonal(between, 0.0)
        crowding[there] = between.max(axis=1, initial=0.0)
        if overlaps.size:
            nearest = overlaps.argmax(axis=1)
            is_near = overlaps.max(axis=1) >= BACKGROUND_OVERLAP
            of_detection[found] = np.where(is_near, crowding[there][nearest], 0.0)
    bins: Bins = []
    for name, low, high, meaning in (
        ("alone", -1.0, 0.0, "no other object overlaps the box"),
        ("touching", 0.0, 0.3, "another object overlaps the box, IoU up to 0.3"),
        ("crowded", 0.3, 1.0, "another object overlaps the box, IoU above 0.3"),
    ):
        inside = [(c > low) & (c <= high) for c in (crowding, of_detection)]
        bins.append((name, meaning, inside[0], inside[1]))
    return bins


def breakdown(matching: Matching, score_threshold: float) -> list[dict[str, Any]]:
    """Return AP, and recall at a score, of the objects by size, aspect and crowding."""
    is_found = found_objects(matching, score_threshold)
    rows: list[dict[str, Any]] = []
    kinds: dict[str, Callable[[Matching], Bins]] = {
        "size": size_bins,
        "aspect": aspect_bins,
        "crowding": crowding_bins,
    }
    for kind, bins_of in kinds.items():
        for name, meaning, objects, detections in bins_of(matching):
            scores = scores_of(matching, {"all": matching.outcome_of(objects, detections)})
            counted = objects & ~matching.objects.is_ignored
            rows.append(
                {
                    "by": kind,
                    "name": name,
                    "meaning": meaning,
                    "objects": int(counted.sum()),
                    "AP": 100 * scores.average_precision(),
                    "AP50": 100 * scores.average_precision(0.5),
                    "recall": 100 * ratio(int((is_found & counted).sum()), int(counted.sum())),
                }
            )
    return rows


def ratio(part: float, whole: float) -> float:
    """Return part / whole; nan of nothing."""
    return part / whole if whole else math.nan


def object_scores(matching: Matching) -> np.ndarray:
    """Return the (G,) score of the detection that found each object; -1 where none did."""
    scores = np.full(len(matching.objects), -1.0)
    given = matching.outcome.matches[matching.index]
    is_matched = given >= 0
    np.maximum.at(scores, given[is_matched], matching.detections.scores[is_matched])
    return scores


def found_objects(matching: Matching, score_threshold: float) -> np.ndarray:
    """Return (G,) which objects a detection of at least that score finds."""
    # Objects are given in falling order of score: leaving out lower ones changes nothing above.
    return object_scores(matching) >= score_threshold


@dataclass(frozen=True)
class Counts:
    """Detections of a class, or of all, above each score."""

    scores: np.ndarray
    """(n,) falling."""
    hits: np.ndarray
    """(n,) objects found by the detections down to each."""
    counted: np.ndarray
    """(n,) detections down to each that are right or wrong."""
    num_objects: int

    def at(self, score: float) -> dict[str, float]:
        """Return precision, recall and F1 in [0, 1] of detections with at least a score."""
        number = int(np.searchsorted(-self.scores, -score, side="right"))
        hits = int(self.hits[number - 1]) if number else 0
        counted = int(self.counted[number - 1]) if number else 0
        return {
            "precision": ratio(hits, counted),
            "recall": ratio(hits, self.num_objects),
            "f1": ratio(2 * hits, counted + self.num_objects),
        }

    def best_threshold(self) -> float:
        """Return the score at which F1 is highest; nan without an object found."""
        if not len(self.hits) or not self.hits[-1]:
            return math.nan
        f1 = 2 * self.hits / (self.counted + self.num_objects)
        # Detections of one score are kept or left out together.
        f1[:-1][self.scores[1:] == self.scores[:-1]] = -1
        return float(self.scores[int(f1.argmax())])


def counts_of(matching: Matching, class_id: int | None = None) -> Counts:
    """Count hits and false detections at the threshold of errors, of one class or of all."""
    if class_id is None:
        rows = np.argsort(-matching.detections.scores, kind="stable")
    else:
        rows = matching.class_rows[class_id]
    outcome, number = matching.outcome, matching.index
    num_objects = outcome.num_objects
    return Counts(
        matching.detections.scores[rows],
        np.cumsum(outcome.is_hit[number, rows]),
        np.cumsum(outcome.is_counted[number, rows]),
        int(num_objects.sum() if class_id is None else num_objects[class_id]),
    )


def overall_threshold(matching: Matching) -> float:
    """Return the score, a multiple of 0.01, at which F1 of all classes together peaks."""
    counts = counts_of(matching)
    values = [counts.at(score)["f1"] for score in SCORE_GRID]
    return float(SCORE_GRID[int(np.nan_to_num(values).argmax())])


def confusion_matrix(matching: Matching, score_threshold: float) -> np.ndarray:
    """Count which class objects (rows) were taken for (columns); the last of both is background.

    An object and a detection of its class belong together as for AP, so that the diagonal over the
    sum of a row is the recall at that score. What is left on both sides is put together across
    classes, best score first, where it overlaps enough.

    Returns:
        (K + 1, K + 1) int64.
    """
    num_classes = len(matching.class_names)
    matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)
    objects, detections = matching.objects, matching.detections
    outcome, threshold = matching.outcome, matching.protocol.iou_thresholds[matching.index]
    is_shown = detections.scores >= score_threshold
    is_hit = outcome.is_hit[matching.index] & is_shown
    is_false = outcome.is_counted[matching.index] & is_shown & ~is_hit
    is_left = ~objects.is_ignored & ~found_objects(matching, score_threshold)
    np.add.at(matrix, (detections.classes[is_hit], detections.classes[is_hit]), 1)
    for found, there, overlaps in zip(
        matching.detection_rows, matching.object_rows, matching.overlaps, strict=True
    ):
        left = is_left[there].copy()
        for row in np.flatnonzero(is_false[found]):
            predicted = detections.classes[found.start + row]
            values = np.where(left, overlaps[row], -1.0)
            best = int(values.argmax()) if values.size else 0
            if values.size and values[best] >= threshold:
                left[best] = False
                matrix[objects.classes[there.start + best], predicted] += 1
            else:
                matrix[num_classes, predicted] += 1
        np.add.at(matrix[:, num_classes], objects.classes[there][left], 1)
    return matrix


def calibration(matching: Matching) -> dict[str, Any]:
    """Return how often detections of a score are right, and the expected calibration error."""
    outcome, number = matching.outcome, matching.index
    is_counted = outcome.is_counted[number]
    scores = matching.detections.scores[is_counted]
    is_hit = outcome.is_hit[number][is_counted]
    bins = np.minimum((scores * _NUM_CALIBRATION_BINS).astype(int), _NUM_CALIBRATION_BINS - 1)
    rows: list[dict[str, Any]] = []
    error = 0.0
    for number in range(_NUM_CALIBRATION_BINS):
        inside = bins == number
        count = int(inside.sum())
        mean_score = ratio(float(scores[inside].sum()), count)
        precision = ratio(int(is_hit[inside].sum()), count)
        if count:
            error += count / len(scores) * abs(mean_score - precision)
        low, high = number / _NUM_CALIBRATION_BINS, (number + 1) / _NUM_CALIBRATION_BINS
        rows.append(
            {
                "low": low,
                "high": high,
                "detections": count,
                "mean_score": mean_score,
                "precision": precision,
            }
        )
    return {"expected_calibration_error": error if len(scores) else math.nan, "bins": rows}


@dataclass(frozen=True)
class Errors:
    """TIDE's type of each error."""

    types: np.ndarray
    """(D,) index into `ERROR_TYPES`; -1 for what is right or ignored."""
    targets: np.ndarray
    """(D,) object that a detection of the wrong class or place was meant for, or -1."""
    is_missed: np.ndarray
    """(G,) objects that nothing found, nor would find by another class or place."""


def error_types(matching: Matching) -> Errors:
    """Return the type of each error.

    Source: Bolya et al. 2020, "TIDE: A General Toolbox for Identifying Object Detection Errors",
        arXiv:2008.08115, section 2.2.
    Deviation: Detections that COCO ignores, in crowds, are no errors.
    """
    objects, detections = matching.objects, matching.detections
    threshold = matching.protocol.iou_thresholds[matching.index]
    outcome = matching.outcome
    is_false = outcome.is_counted[matching.index] & ~outcome.is_hit[matching.index]
    is_found = object_scores(matching) >= 0
    types = np.full(len(detections), -1)
    targets = np.full(len(detections), -1)
    is_target = np.zeros(len(objects), dtype=bool)
    for found, there, overlaps in zip(
        matching.detection_rows, matching.object_rows, matching.overlaps, strict=True
    ):
        index = np.flatnonzero(~objects.is_ignored[there])
        rows = np.flatnonzero(is_false[found])
        values = overlaps[np.ix_(rows, index)]
        same = detections.classes[found][rows][:, None] == objects.classes[there][index]
        of_class = np.where(same, values, 0.0)
        of_other = np.where(same, 0.0, values)
        best, best_other = (v.max(axis=1, initial=0.0) for v in (of_class, of_other))
        is_place = (best >= BACKGROUND_OVERLAP) & (best < threshold)
        is_class = best_other >= threshold
        # In the order of TIDE's code: the first that fits.
        types[rows + found.start] = np.select(
            [is_place, is_class, best >= threshold, best_other < BACKGROUND_OVERLAP],
            [1, 0, 3, 4],
            default=2,
        )
        aims = np.where(is_place[:, None], of_class, of_other)
        for row in np.flatnonzero(is_place | is_class):
            target = there.start + index[aims[row].argmax()]
            targets[found.start + rows[row]] = target
            is_target[target] = True
    is_missed = ~objects.is_ignored & ~is_found & ~is_target
    return Errors(types, targets, is_missed)


def error_costs(matching: Matching, errors: Errors) -> dict[str, Any]:
    """Return the number of errors of each type and the AP that correcting them would gain.

    Source: TIDE, section 2.3: each type is corrected by itself, so that the gains do not add up.
    AP is that at the threshold of the errors, over the classes with objects.

    Returns:
        `AP`, `types` (`ERROR_TYPES` -> `count`, `cost`), and `false_positives` and
        `false_negatives`, the gains without any false detection, and without any missed object.
    """
    outcome, number = matching.outcome, matching.index
    detections, objects = matching.detections, matching.objects
    is_hit, is_counted = outcome.is_hit[number], outcome.is_counted[number]

    def mean_precision(
        hits: np.ndarray, counted: np.ndarray, classes: np.ndarray, num_objects: np.ndarray
    ) -> float:
        values = []
        order = np.argsort(-detections.scores, kind="stable")
        for k in np.flatnonzero(outcome.num_objects):
            rows = order[classes[order] == k]
            points = np.zeros(1)
            if num_objects[k]:
                points = precision_at_recalls(hits[None, rows], counted[None, rows], num_objects[k])
            values.append(points.mean())
        return 100 * float(np.mean(values)) if values else math.nan

    base = mean_precision(is_hit, is_counted, detections.classes, outcome.num_objects)
    is_found = object_scores(matching) >= 0
    fixes = _fixes(errors, detections.scores, is_found)
    num_missed = np.bincount(objects.classes[errors.is_missed], minlength=len(outcome.num_objects))
    types: dict[str, dict[str, float]] = {}
    for kind, name in enumerate(ERROR_TYPES[:-1]):
        is_kind = errors.types == kind
        is_fixed = fixes & is_kind
        classes = detections.classes.copy()
        classes[is_fixed] = objects.classes[errors.targets[is_fixed]]
        hits, counted = is_hit | is_fixed, (is_counted & ~is_kind) | is_fixed
        gain = mean_precision(hits, counted, classes, outcome.num_objects) - base
        types[name] = {"count": int(is_kind.sum()), "cost": max(gain, 0.0)}
    without = outcome.num_objects - num_missed
    gain = mean_precision(is_hit, is_counted, detections.classes, without) - base
    types["missed"] = {"count": int(num_missed.sum()), "cost": max(gain, 0.0)}
    is_lost = ~objects.is_ignored & ~is_found
    num_lost = np.bincount(objects.classes[is_lost], minlength=len(outcome.num_objects))
    all_right = mean_precision(is_hit, is_hit, detections.classes, outcome.num_objects)
    all_found = mean_precision(
        is_hit, is_counted, detections.classes, outcome.num_objects - num_lost
    )
    return {
        "AP": base,
        "types": types,
        "false_positives": all_right - base,
        "false_negatives": all_found - base,
    }


def _fixes(errors: Errors, scores: np.ndarray, is_found: np.ndarray) -> np.ndarray:
    """Return (D,) bool: which errors would find an object that no other detection does.

    Of several errors with the same object, the one with the best score could have found it.
    """
    fixes = np.zeros(len(scores), dtype=bool)
    taken = is_found.copy()
    for row in np.argsort(-scores, kind="stable").tolist():
        target = int(errors.targets[row])
        if target >= 0 and not taken[target]:
            fixes[row] = taken[target] = True
    return fixes


def bootstrap_ap(matching: Matching, num_samples: int, seed: int = 0) -> np.ndarray:
    """Return the AP of each class on images drawn anew, with replacement.

    Equal seeds draw the same images, so that the difference of two detectors is that of pairs.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".

    Returns:
        (B, T, K) in [0, 100]; nan for a class without objects in the images drawn.
    """
    outcome, num_images = matching.outcome, len(matching.image_ids)
    num_classes = len(matching.class_names)
    result = np.full((num_samples, len(matching.protocol.iou_thresholds), num_classes), math.nan)
    # (N, K) objects that can be found.
    objects = np.zeros((num_images, num_classes))
    counted = ~matching.objects.is_ignored
    np.add.at(objects, (matching.objects.images[counted], matching.objects.classes[counted]), 1)
    of_class = [
        (outcome.is_hit[:, rows], outcome.is_counted[:, rows], matching.detections.images[rows])
        for rows in matching.class_rows
    ]
    rng = np.random.default_rng(seed)
    for sample in range(num_samples):
        drawn = np.bincount(rng.integers(num_images, size=num_images), minlength=num_images)
        for k, num_objects in enumerate(drawn @ objects):
            if num_objects:
                is_hit, is_counted, images = of_class[k]
                points = precision_at_recalls(is_hit, is_counted, num_objects, drawn[images])
                result[sample, :, k] = 100 * points.mean(axis=1)
    return result


def interval(samples: np.ndarray) -> list[float]:
    """Return the bounds that leave out the lowest and highest 2.5 % of (B,) samples."""
    samples = samples[np.isfinite(samples)]
    return np.percentile(samples, [2.5, 97.5]).tolist() if len(samples) else [math.nan, math.nan]


def mean_over_classes(samples: np.ndarray) -> np.ndarray:
    """Return the (B,) means over thresholds and classes with objects of (B, T, K) samples."""
    count = np.isfinite(samples).sum(axis=(1, 2))
    return np.where(count, np.nansum(samples, axis=(1, 2)) / np.maximum(count, 1), math.nan)
