"""Average recall of proposals: how much of the ground truth a proposal network covers, whatever the class.

Legend: N proposals and M objects in one image, G objects in all images.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from detkit.evaluation.coco_ground_truth import CocoGroundTruth, boxes_xyxy
from detkit.evaluation.coco_protocol import AREA_RANGES, AREA_SUFFIXES, IOU_THRESHOLDS
from detkit.evaluation.detections import ImageDetections, exact_iou

_LIMITS = (100, 1000)


def proposal_recall_metrics(
    truth: CocoGroundTruth, proposals: Iterable[ImageDetections], limits: tuple[int, ...] = _LIMITS
) -> dict[str, float]:
    """Return AR@<limit>, ARs@<limit>, ARm@<limit> and ARl@<limit> in [0, 100].

    Crowd regions do not count. Each object counts in the ranges of area that hold its own area,
    whatever the size of the proposal that covers it.

    Source: Hosang et al. 2015, "What makes for effective detection proposals?", arXiv:1502.05082,
        section 4.
    Deviation: COCO's thresholds.

    Args:
        truth: The ground truth.
        proposals: At most one entry per image, in any order of score. An image without one has no
            proposals.
        limits: Proposals per image that count, best score first.

    Returns:
        The metrics; nan for a range of area without objects.
    """
    proposals_of = {truth.image_ids[proposals_i.image_id]: proposals_i for proposals_i in proposals}
    # Per limit and range of area: the overlaps of the objects that lie in it.
    overlaps: dict[tuple[int, str], list[np.ndarray]] = {
        (limit, area): [] for limit in limits for area in AREA_RANGES
    }
    for image_id, objects_i in truth.objects_per_image().items():
        objects = [annotation for annotation in objects_i if not annotation["iscrowd"]]
        object_areas = np.array([annotation["area"] for annotation in objects])
        iou = _iou_by_falling_score(proposals_of.get(image_id), boxes_xyxy(objects))
        for limit, area in overlaps:
            low, high = AREA_RANGES[area]
            in_range = (object_areas >= low) & (object_areas <= high)
            overlaps[limit, area].append(covered_overlaps(iou[:limit, in_range]))
    return {
        f"AR{AREA_SUFFIXES[area]}@{limit}": (
            100 * _average_recall(np.concatenate([*parts, np.zeros(0)]))
        )
        for (limit, area), parts in overlaps.items()
    }


def covered_overlaps(iou: np.ndarray) -> np.ndarray:
    """Assign proposals to objects one to one, best overlap first, and give the overlap of each pair.

    The object that any free proposal covers best goes first and takes that proposal, then the next:
    so no proposal covers two objects.

    Args:
        iou: (N, M) overlap of proposals with objects.

    Returns:
        (M,) overlaps, falling; 0 for objects that got no proposal.
    """
    num_proposals, num_objects = iou.shape
    covered = np.zeros(num_objects)
    if iou.size == 0:
        return covered
    iou = iou.copy()
    best_proposal, best = iou.argmax(axis=0), iou.max(axis=0)
    for index in range(min(num_proposals, num_objects)):
        obj = best.argmax()
        proposal = best_proposal[obj]
        covered[index] = best[obj]
        iou[proposal] = 0
        best[obj], best_proposal[obj] = -1, -1
        # Only objects that wanted the proposal just taken look for another: with hundreds of
        # objects, looking at all pairs again each time would take seconds per image.
        bereft = np.flatnonzero(best_proposal == proposal)
        best_proposal[bereft] = iou[:, bereft].argmax(axis=0)
        best[bereft] = iou[:, bereft].max(axis=0)
    return covered


def _iou_by_falling_score(proposals: ImageDetections | None, objects: np.ndarray) -> np.ndarray:
    if proposals is None:
        return np.zeros((0, len(objects)))
    order = np.argsort(-proposals.scores, kind="stable")
    return exact_iou(proposals.boxes[order], objects)


def _average_recall(overlaps: np.ndarray) -> float:
    """Average over the thresholds the share of objects (G,) that are covered at least that far; nan
    without objects.
    """
    if overlaps.size == 0:
        return float("nan")
    return float((overlaps[:, None] >= IOU_THRESHOLDS).mean())
