"""COCO's average precision and recall of boxes, masks and keypoints.

The numbers come from faster-coco-eval, a C++ form of pycocotools that gives the same ones:
`tests/evaluation` compares all of them on random data with crowds, ties, empty images and more than
a hundred detections. Found there, and kept by `_coco_index` and `score_detections` (version 1.8):

- Image and category ids become double precision numbers in C++: above 2**53 they collide, and
  strings fail. Here images and classes are numbered from 1.
- An annotation without `area` counts as area 0, so as small, where pycocotools fails; a NaN box
  gives other numbers than pycocotools. The exporter always writes an area, and detections that are
  not finite are refused.
- It takes `COCO(dict)` without copying the annotations and writes `ignore` into them, and `loadRes`
  writes a polygon of eight numbers into every detection. It gets dicts of its own, and no
  `loadRes`.
- Annotation id 0 means "not matched", as in pycocotools.
- `summarize` logs a table of its own, and its list of numbers changes with the limits. It is not
  used: `CocoScores` reads the arrays, in which the entries stay where they are.
- Equal scores keep their order within an image, then the order of the image ids: so images are
  numbered in rising order of their ids in the data set, as pycocotools sorts them.
- Masks of different sizes have overlap -1 without a word, in pycocotools as well. All masks come
  compressed, by pycocotools' own code, and of the size of the image.
- A detection's area decides whether it counts where it matches nothing: that of its mask for masks,
  as Detectron2 arranges it, and of its box for boxes and keypoints.
- An object without labelled keypoints is ignored: it costs nothing to miss, and detections near it
  are not wrong.
- An unmatched detection with `lvis_mark` is ignored, which is what LVIS's metric needs.

Legend: T overlap thresholds, P recall points, A area ranges, L detection limits, J keypoints of one
    object.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as mask_util

from detkit.evaluation.coco.ground_truth import CocoGroundTruth
from detkit.evaluation.coco.results import (
    RECALL_POINTS,
    CocoProtocol,
    CocoScores,
    boxes_xywh,
    keypoints_flat,
)
from detkit.evaluation.detections import ImageDetections

logger = logging.getLogger(__name__)

ClassEntries = list[dict[str, Any]]
"""Objects or detections of one class."""


def score_detections(
    truth: CocoGroundTruth,
    detections: Sequence[ImageDetections],
    protocol: CocoProtocol,
    task: str = "bbox",
) -> CocoScores:
    """Return COCO's precision and recall.

    Classes do not meet in this metric, so they are scored one by one, on the images that have to do
    with them. Time and memory then follow the number of detections, where scoring all at once keeps
    a list for every pair of image and
    class: 24 million for LVIS.

    Args:
        truth: The ground truth.
        detections: At most one entry per image; an image without one has no detections.
        protocol: What counts.
        task: "bbox", "segm" or "keypoints": what is compared.

    Raises:
        ValueError: The ground truth does not fit the task.
    """
    numbers = image_numbers(truth)
    images = [numbers[truth.image_ids[detections_i.image_id]] for detections_i in detections]
    with garbage_collection_paused():
        objects = objects_per_class(truth, numbers, task, len(protocol.oks_sigmas))
        found = detections_per_class(detections, images, len(truth.class_names), task)
        return score_classes(zip(objects, found, strict=True), protocol, task)


def score_classes(
    classes: Iterator[tuple[ClassEntries, ClassEntries]], protocol: CocoProtocol, task: str
) -> CocoScores:
    """Return precision and recall of objects and detections that are already sorted by class."""
    scores = [_score_class(objects_k, found_k, protocol, task) for objects_k, found_k in classes]
    return CocoScores(
        np.stack([precision for precision, _ in scores], axis=2),
        np.stack([recall for _, recall in scores], axis=1),
        protocol.limits(task),
        protocol.iou_thresholds,
        tuple(protocol.area_ranges_of(task)),
    )


def image_numbers(truth: CocoGroundTruth) -> dict[int, int]:
    """Number the images from 1 in the order of the data set's own ids; see the head of this file."""
    return {
        coco_id: number for number, coco_id in enumerate(sorted(truth.image_ids.values()), start=1)
    }


def objects_per_class(
    truth: CocoGroundTruth, numbers: Mapping[int, int], task: str, num_keypoints: int
) -> list[ClassEntries]:
    """Return the objects of each class, with what the task compares."""
    per_class: dict[int, ClassEntries] = {category_id: [] for category_id in truth.category_ids}
    for annotation in truth.coco["annotations"]:
        entry = {key: annotation[key] for key in ("bbox", "area", "iscrowd")}
        entry["image_id"] = numbers[annotation["image_id"]]
        if task == "segm":
            entry |= truth.mask_entry(annotation)
        if task == "keypoints":
            entry |= _keypoint_entry(annotation, num_keypoints)
        per_class[annotation["category_id"]].append(entry)
    return list(per_class.values())


def _keypoint_entry(annotation: Mapping[str, Any], num_keypoints: int) -> dict[str, Any]:
    keypoints = annotation.get("keypoints") or [0.0] * (3 * num_keypoints)
    return {"keypoints": keypoints, "num_keypoints": annotation.get("num_keypoints", 0)}


def detections_per_class(
    detections: Sequence[ImageDetections], image_numbers: Sequence[int], num_classes: int, task: str
) -> Iterator[ClassEntries]:
    """Return the detections of one class after the other: as dicts they take ten times the memory
    of the arrays.
    """
    classes = np.concatenate([np.zeros(0, dtype=np.int64), *(d.classes for d in detections)])
    boxes = np.concatenate([np.zeros((0, 4)), *(boxes_xywh(d) for d in detections)])
    scores = np.concatenate([np.zeros(0), *(d.scores for d in detections)])
    images = np.repeat(np.array(image_numbers, dtype=np.int64), [len(d) for d in detections])
    shapes = _Shapes(detections, task, boxes)
    order = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[order], np.arange(1, num_classes))
    for of_class in np.split(order, starts):
        columns = (images[of_class], boxes[of_class], scores[of_class])
        entries = [
            {"image_id": image, "bbox": box, "score": score, "iscrowd": 0}
            for image, box, score in zip(*(column.tolist() for column in columns), strict=True)
        ]
        shapes.complete(entries, of_class)
        yield entries


def _mask_areas(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """Areas of run-length masks, (R,) float64."""
    # pycocotools 2.0.11 puts the number of masks of one call into a byte: NumPy 2 refuses more than
    # 255.
    blocks = [masks[start : start + 255] for start in range(0, len(masks), 255)]
    areas = [mask_util.area(block) for block in blocks]  # pyright: ignore[reportArgumentType]
    return np.concatenate([np.zeros(0), *areas])


class _Shapes:
    """What a task compares besides boxes, for all detections."""

    def __init__(self, detections: Sequence[ImageDetections], task: str, boxes: np.ndarray) -> None:
        self._areas = boxes[:, 2] * boxes[:, 3]
        self._masks: list[dict[str, Any]] | None = None
        self._keypoints: np.ndarray | None = None
        if task == "segm":
            self._masks = [rle for d in detections for rle in d.masks or ()]
            self._areas = _mask_areas(self._masks)
        if task == "keypoints":
            self._keypoints = np.concatenate(
                [
                    keypoints_flat(d.keypoints)
                    for d in detections
                    if d.keypoints is not None and len(d)
                ]
                or [np.zeros(0)]
            )

    def complete(self, entries: ClassEntries, indices: np.ndarray) -> None:
        """Add area and shape to the entries of one class, which are the detections at `indices`."""
        for entry, area in zip(entries, self._areas[indices].tolist(), strict=True):
            entry["area"] = area
        if self._masks is not None:
            for entry, index in zip(entries, indices.tolist(), strict=True):
                entry["segmentation"] = self._masks[index]
        if self._keypoints is not None and entries:
            for entry, keypoints in zip(entries, self._keypoints[indices].tolist(), strict=True):
                entry["keypoints"] = keypoints


def _score_class(
    objects: ClassEntries, detections: ClassEntries, protocol: CocoProtocol, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, P, A, L) and recall (T, A, L) of one class."""
    area_ranges, limits = protocol.area_ranges_of(task), protocol.limits(task)
    if not objects:
        shape = (len(protocol.iou_thresholds), len(RECALL_POINTS), len(area_ranges), len(limits))
        return np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    numbers = sorted({entry["image_id"] for entry in (*objects, *detections)})
    evaluation = COCOeval_faster(
        _coco_index(objects, numbers),
        _coco_index(detections, numbers),
        iouType=task,  # pyright: ignore[reportArgumentType]
        print_function=logger.debug,
    )
    evaluation.params.iouThrs = np.array(protocol.iou_thresholds)
    evaluation.params.recThrs = RECALL_POINTS
    evaluation.params.areaRng = [list(area_range) for area_range in area_ranges.values()]
    evaluation.params.areaRngLbl = list(area_ranges)
    evaluation.params.maxDets = limits
    # For keypoints it takes the classes from the objects, which are the same here.
    evaluation.params.catIds = [1]
    evaluation.params.kpt_oks_sigmas = np.array(protocol.oks_sigmas)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _coco_index(annotations: ClassEntries, numbers: Sequence[int]) -> COCO:
    """Index annotations of one class. They get ids, counted from 1, and are changed when they are
    scored.
    """
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation["category_id"] = 1
    return COCO(
        {
            # Masks are compressed already, so that the sizes are not used; they have to be there.
            "images": [{"id": number, "height": 0, "width": 0} for number in numbers],
            "categories": [{"id": 1, "name": "class"}],
            "annotations": annotations,
        }
    )


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Keep Python from looking for cycles while hundreds of thousands of small dicts are made, none of which has any.

    Each look goes over everything that the process holds. With 190 thousand detections to score,
    and as many result dicts held elsewhere, that was a third of the time: 3.6 instead of 2.4 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
