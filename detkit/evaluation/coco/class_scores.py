"""COCO's precision and recall of one class, from its objects and detections in all images.

The rules are those of pycocotools, which goes through images, area ranges, thresholds and objects
in loops. Here the best detections of all images are matched at the same time, then the second best,
and so on, for all thresholds and area ranges in one array; only detections that overlap an object
enough take part. `tests/evaluation` compares all numbers with those of pycocotools.

Legend: D detections and G objects of the class; N detections near an object, P pairs of them;
T overlap thresholds, R recall points, A area ranges, L detection limits, J keypoints of one object.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from detkit.evaluation.coco.results import RECALL_POINTS, CocoProtocol
from detkit.evaluation.detections import exact_iou

ClassEntries = list[dict[str, Any]]
"""Objects or detections of one class: dicts as in COCO's files."""

HIGHEST_THRESHOLD = 1 - 1e-10
"""COCO's: an overlap of 1 may be rounded down."""
# About 100 bytes each.
_PAIRS_AT_A_TIME = 2**18


@dataclass(frozen=True)
class _Items:
    """Objects in the order of their images, or detections: of an image, the best score first."""

    entries: ClassEntries
    images: np.ndarray
    areas: np.ndarray

    @classmethod
    def of(cls, entries: ClassEntries, scores: np.ndarray) -> "_Items":
        """Sort entries by image and falling score; equal ones keep their order."""
        images = np.array([entry["image_id"] for entry in entries], dtype=np.int64)
        order = np.lexsort((-scores, images))
        areas = np.array([entry["area"] for entry in entries], dtype=np.float64)
        return cls([entries[i] for i in order.tolist()], images[order], areas[order])

    def __len__(self) -> int:
        return len(self.entries)

    def column(self, key: str) -> np.ndarray:
        """Return the values of a key, one row each."""
        return np.array([entry[key] for entry in self.entries], dtype=np.float64)

    def flags(self, key: str) -> np.ndarray:
        """Return whether each entry has a key whose value counts as true."""
        return np.array([bool(entry.get(key)) for entry in self.entries], dtype=bool)


def score_class(
    objects: ClassEntries, detections: ClassEntries, protocol: CocoProtocol, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, R, A, L) and recall (T, A, L) of one class.

    Both are -1, as COCO marks what has no ground truth, where there is no object to find.

    Args:
        objects: With `image_id`, `bbox`, `area`, `iscrowd`, and what the task compares. Crowds, and
            objects with `num_keypoints` 0, need not be found.
        detections: With `image_id`, `score`, `bbox`, `area`. Those with `lvis_mark` cost nothing
            where they find nothing.
        protocol: Thresholds, area ranges and detection limits.
        task: What is compared: "bbox", "segm" or "keypoints".
    """
    ranges, limits = protocol.area_ranges_of(task), protocol.limits(task)
    thresholds = np.minimum(np.array(protocol.iou_thresholds), HIGHEST_THRESHOLD)
    shape = (len(thresholds), len(RECALL_POINTS), len(ranges), len(limits))
    precision, recall = np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    if not objects:
        return precision, recall
    truth = _Items.of(objects, np.zeros(len(objects)))
    scores = np.array([entry["score"] for entry in detections], dtype=np.float64)
    found = _Items.of(detections, scores)
    places = np.arange(len(found)) - np.searchsorted(found.images, found.images)
    if len(found) and places.max() >= limits[-1]:
        best = [found.entries[i] for i in np.flatnonzero(places < limits[-1]).tolist()]
        found = _Items.of(best, np.array([entry["score"] for entry in best]))
        places = places[places < limits[-1]]
    lows, highs = np.array(list(ranges.values()), dtype=np.float64).T[:, :, None]
    need_not = truth.flags("iscrowd")
    if task == "keypoints":
        need_not = need_not | ~truth.flags("num_keypoints")
    is_ignored = need_not | (truth.areas < lows) | (truth.areas > highs)  # (A, G)
    counts = (found.areas >= lows) & (found.areas <= highs) & ~found.flags("lvis_mark")  # (A, D)
    near, matches = _match(found, truth, is_ignored, thresholds, protocol, task)
    scores = found.column("score")
    order = np.argsort(-scores, kind="stable")
    for a, num_objects in enumerate((~is_ignored).sum(axis=1).tolist()):
        if num_objects == 0:
            continue
        is_hit = np.zeros((len(thresholds), len(found)), dtype=bool)
        is_hit[:, near] = (matches[a] >= 0) & ~is_ignored[a][matches[a]]
        is_counted = np.repeat(counts[a][None], len(thresholds), axis=0)
        is_counted[:, near] = np.where(matches[a] >= 0, is_hit[:, near], is_counted[:, near])
        for number, limit in enumerate(limits):
            rows = order[places[order] < limit]
            hits = is_hit[:, rows]
            precision[:, :, a, number] = _precision_at_recalls(
                hits, is_counted[:, rows], num_objects
            )
            recall[:, a, number] = hits.sum(axis=1) / num_objects
    return precision, recall


def _match(
    found: _Items,
    truth: _Items,
    is_ignored: np.ndarray,
    thresholds: np.ndarray,
    protocol: CocoProtocol,
    task: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Give objects to detections: each in turn, the best score of an image first.

    A detection gets, of the objects that it overlaps enough and that are free or crowds, the one
    that it overlaps most, of equal ones the last; an ignored one only if there is no other.

    Returns:
        (N,) rising indices of the detections near an object, and (A, T, N) the object of each,
        or -1.
    """
    blocks = list(_near_pairs(found, truth, thresholds[0], protocol, task))
    # An empty array in front, for where there is none.
    pair_d = np.concatenate([np.zeros(0, dtype=np.int64), *(d for d, _, _ in blocks)])
    pair_g = np.concatenate([np.zeros(0, dtype=np.int64), *(g for _, g, _ in blocks)])
    overlap = np.concatenate([np.zeros(0), *(values for _, _, values in blocks)])
    near, pair_n = np.unique(pair_d, return_inverse=True)
    matches = np.full((len(is_ignored), len(thresholds), len(near)), -1, dtype=np.int32)
    if not len(near):
        return near, matches
    images = found.images[near]
    turns = np.arange(len(near)) - np.searchsorted(images, images)
    # For each area range, the pairs by turn and detection, the preferred object last.
    orders = [
        np.lexsort((pair_g, overlap, ~ignored[pair_g], pair_n, turns[pair_n]))
        for ignored in is_ignored
    ]
    objects = np.stack([pair_g[order] for order in orders])  # (A, P)
    is_reached = np.stack([overlap[order] for order in orders])[:, None] >= thresholds[:, None]
    of_pair = pair_n[orders[0]]
    # Where each detection's pairs start, and where each turn's.
    firsts = np.flatnonzero(np.diff(of_pair, prepend=-1))
    ends = np.searchsorted(turns[of_pair], np.arange(turns.max() + 1), side="right").tolist()
    is_crowd = truth.flags("iscrowd")
    is_free = np.ones((len(is_ignored), len(thresholds), len(truth)), dtype=bool)
    range_, threshold = np.ogrid[: len(is_ignored), : len(thresholds)]
    for begin, end in zip([0, *ends], ends, strict=False):
        starts = firsts[np.searchsorted(firsts, begin) : np.searchsorted(firsts, end)]
        there = objects[:, None, begin:end]  # (A, 1, p)
        can_get = is_free[range_[..., None], threshold[..., None], there] | is_crowd[there]
        places = np.where(is_reached[..., begin:end] & can_get, np.arange(1, end - begin + 1), 0)
        last = np.maximum.reduceat(places, starts - begin, axis=2)  # (A, T, n)
        a, t, n = np.nonzero(last)
        given = there[a, 0, last[a, t, n] - 1]
        matches[a, t, of_pair[starts[n]]] = given
        is_free[a, t, given] = False
    return near, matches


def _near_pairs(
    found: _Items, truth: _Items, lowest: float, protocol: CocoProtocol, task: str
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield detections, objects and their overlaps, where these reach the lowest threshold."""
    first = np.searchsorted(truth.images, found.images)
    counts = np.searchsorted(truth.images, found.images, side="right") - first
    is_crowd = truth.flags("iscrowd")
    if task == "bbox" and len(truth.entries[0]["bbox"]) == 4 and len(found):
        boxes, true_boxes = found.column("bbox"), truth.column("bbox")
        blocks = np.cumsum(counts) // _PAIRS_AT_A_TIME
        for rows in np.split(np.arange(len(found)), np.flatnonzero(np.diff(blocks)) + 1):
            ends = np.cumsum(counts[rows])
            pair_d = np.repeat(rows, counts[rows])
            shifts = np.repeat(first[rows] - ends + counts[rows], counts[rows])
            pair_g = np.arange(ends[-1]) + shifts
            overlap = _box_overlaps(boxes[pair_d], true_boxes[pair_g], is_crowd[pair_g])
            is_near = overlap >= lowest
            yield pair_d[is_near], pair_g[is_near], overlap[is_near]
        return
    # Where each image's detections begin.
    begins = [*np.flatnonzero(np.diff(found.images, prepend=-1)).tolist(), len(found)]
    for begin, end in itertools.pairwise(begins):
        if counts[begin]:
            rows = slice(begin, end)
            there = slice(first[begin], first[begin] + counts[begin])
            overlaps = _overlaps(
                found.entries[rows], truth.entries[there], is_crowd[there], protocol, task
            )
            d, g = np.nonzero(overlaps >= lowest)
            yield d + begin, g + there.start, overlaps[d, g]


def _box_overlaps(boxes: np.ndarray, truth: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Return the IoU of pairs of boxes (P, 4) XYWH; in a crowd, the part of the box within it."""
    corners = np.minimum(boxes[:, :2] + boxes[:, 2:], truth[:, :2] + truth[:, 2:])
    sides = np.maximum(corners - np.maximum(boxes[:, :2], truth[:, :2]), 0)
    shared = sides[:, 0] * sides[:, 1]
    area, true_area = boxes[:, 2] * boxes[:, 3], truth[:, 2] * truth[:, 3]
    union = np.where(is_crowd, area, area + true_area - shared)
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _overlaps(
    found: ClassEntries,
    truth: ClassEntries,
    is_crowd: np.ndarray,
    protocol: CocoProtocol,
    task: str,
) -> np.ndarray:
    """Return the (n, m) overlaps of masks, keypoints or rotated boxes in one image."""
    if task == "segm":
        masks = [[entry["segmentation"] for entry in entries] for entries in (found, truth)]
        return np.asarray(mask_util.iou(masks[0], masks[1], is_crowd.astype(np.uint8).tolist()))
    boxes = np.array([entry["bbox"] for entry in truth], dtype=np.float64)
    if task == "keypoints":
        points = [np.array([entry["keypoints"] for entry in entries]) for entries in (found, truth)]
        areas = np.array([entry["area"] for entry in truth])
        return keypoint_similarity(points[0], points[1], boxes, areas, protocol.oks_sigmas)
    own = np.array([entry["bbox"] for entry in found], dtype=np.float64)
    iou = exact_iou(own, boxes)
    # What lies in a crowd counts by its own area: the shared area over that of the detection.
    area, true_area = own[:, 2:4].prod(axis=1)[:, None], boxes[:, 2:4].prod(axis=1)
    covered = iou * (area + true_area) / (1 + iou) / np.maximum(area, 1e-12)
    return np.where(is_crowd, covered, iou)


def keypoint_similarity(
    found: np.ndarray,
    there: np.ndarray,
    boxes: np.ndarray,
    areas: np.ndarray,
    sigmas: Sequence[float],
) -> np.ndarray:
    """Compute the object keypoint similarity (OKS).

    Source: COCO, https://cocodataset.org/#keypoints-eval.

    Args:
        found: (n, 3 J) predicted keypoints.
        there: (m, 3 J) labelled ones; those of visibility 0 do not count.
        boxes: (m, 4) XYWH of the objects.
        areas: (m,) of the objects.
        sigmas: (J,) spread of each keypoint.

    Returns:
        (n, m) in [0, 1]. For an object without a labelled keypoint, how close the predicted ones
        are to twice its box, by which COCO leaves out detections near it.
    """
    points = found.reshape(len(found), 1, -1, 3)[..., :2]
    labelled = there.reshape(1, len(there), -1, 3)
    is_labelled = np.asarray(labelled[..., 2] > 0)
    low = boxes[:, None, :2] - boxes[:, None, 2:]
    high = boxes[:, None, :2] + 2 * boxes[:, None, 2:]
    outside = np.maximum(low[None] - points, 0) + np.maximum(points - high[None], 0)
    has_any = np.asarray(is_labelled.any(axis=2, keepdims=True))
    offsets = np.where(has_any[..., None], points - labelled[..., :2], outside)
    variances = (np.array(sigmas) * 2) ** 2
    exponents = (offsets**2).sum(axis=3) / variances / (areas[:, None] + np.spacing(1)) / 2
    counts = is_labelled | ~has_any
    return (np.exp(-exponents) * counts).sum(axis=2) / counts.sum(axis=2)


def _precision_at_recalls(
    is_hit: np.ndarray, is_counted: np.ndarray, num_objects: int
) -> np.ndarray:
    """Return (T, R) the highest precision from each recall on; 0 where that is not reached.

    Args:
        is_hit: (T, D) whether each detection found an object, in falling order of score.
        is_counted: (T, D) whether it counts: hits and false detections.
        num_objects: That can be found.
    """
    counted = np.cumsum(is_counted, axis=1, dtype=np.int32)
    result = np.zeros((len(is_hit), len(RECALL_POINTS)))
    for result_t, is_hit_t, counted_t in zip(result, is_hit, counted, strict=True):
        # Precision falls from one hit to the next, so that its maxima lie at hits.
        at = np.flatnonzero(is_hit_t)
        hits = np.arange(1, len(at) + 1)
        highest = np.maximum.accumulate((hits / (counted_t[at] + np.spacing(1)))[::-1])[::-1]
        index = np.searchsorted(hits / num_objects, RECALL_POINTS, side="left")
        result_t[index < len(at)] = highest[index[index < len(at)]]
    return result
