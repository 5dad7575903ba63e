"""COCO's average precision and recall of boxes, masks and keypoints.

The numbers come from faster-coco-eval, a C++ port of pycocotools that computes the same ones:
`tests/evaluation` compares all of them on random data with crowds, ties, empty images and more than
a hundred detections. What the tests found, and this file takes care of (version 1.8):

- Image and category ids become double precision numbers in C++: above 2**53 they collide, and
  strings fail. Here images and classes are numbered from 1.
- An annotation without `area` counts as area 0, so as small, where pycocotools fails; a NaN box
  gives other numbers than pycocotools. The exporter always writes an area, and detections that are
  not finite are refused.
- `COCO(dict)` does not copy the annotations and writes `ignore` into them, and `loadRes` writes a
  polygon of eight numbers into every detection. It gets dicts of its own, and no `loadRes`.
- Annotation id 0 means "not matched", as in pycocotools.
- `summarize` logs a table of its own, and its list of numbers changes with the limits. It is not
  used: `CocoScores` reads the arrays, whose layout does not change.
- Equal scores keep their order within an image, then the order of the image ids: so images are
  numbered in rising order of their ids in the data set, as pycocotools sorts them.
- Masks of different sizes have overlap -1 without an error, in pycocotools as well. All masks are
  compressed by pycocotools' own code, and have the size of the image.
- A detection's area decides whether it counts where it matches nothing: that of its mask for masks,
  as Detectron2 arranges it, and of its box for boxes and keypoints.
- An object without labelled keypoints is ignored: it costs nothing to miss, and detections near it
  are not wrong.
- An unmatched detection with `lvis_mark` is ignored, which is what LVIS's metric needs.

Legend: T overlap thresholds, P recall points, A area ranges, L detection limits, J keypoints of one
    object.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from pycocotools import mask as mask_util
from pycocotools.cocoeval import COCOeval

from detkit.evaluation.coco.ground_truth import CocoGroundTruth, image_numbers
from detkit.evaluation.coco.results import (
    RECALL_POINTS,
    CocoProtocol,
    CocoScores,
    boxes_xywh,
    keypoints_flat,
)
from detkit.evaluation.detections import ImageDetections, exact_iou
from detkit.utils.env import garbage_collection_off

logger = logging.getLogger(__name__)

ClassEntries = list[dict[str, Any]]
"""Objects or detections of one class, as the C++ code takes them."""


def score_detections(
    truth: CocoGroundTruth,
    detections: Sequence[ImageDetections],
    protocol: CocoProtocol,
    task: str = "bbox",
) -> CocoScores:
    """Compute COCO's precision and recall.

    Args:
        truth: The ground truth.
        detections: At most one entry per image; an image without one has no detections.
        protocol: Thresholds, area ranges and detection limits.
        task: What is compared: "bbox", "segm" or "keypoints".

    Raises:
        DataError: A mask of the ground truth cannot be used.
    """
    return score_classes(class_entries(truth, detections, task, protocol), protocol, task)


def score_classes(
    classes: Iterator[tuple[ClassEntries, ClassEntries]], protocol: CocoProtocol, task: str
) -> CocoScores:
    """Compute precision and recall from the objects and detections of each class in turn."""
    # Classes do not interact in this metric, so they are scored one by one, on the images that
    # have objects or detections of the class. Time and memory then grow with the detections, where
    # scoring all at once keeps a list per pair of image and class: 24 million for LVIS.
    precisions, recalls = [], []
    # With 190 thousand detections, as many small dicts: 2.4 instead of 3.6 s.
    with garbage_collection_off():
        for objects, detections in classes:
            precision, recall = _score_class(objects, detections, protocol, task)
            precisions.append(precision)
            recalls.append(recall)
    return CocoScores(
        np.stack(precisions, axis=2),
        np.stack(recalls, axis=1),
        protocol.limits(task),
        protocol.iou_thresholds,
        tuple(protocol.area_ranges_of(task)),
    )


def class_entries(
    truth: CocoGroundTruth,
    detections: Sequence[ImageDetections],
    task: str,
    protocol: CocoProtocol,
) -> Iterator[tuple[ClassEntries, ClassEntries]]:
    """Yield the objects and the detections of each class, in the order of the contiguous ids."""
    annotations: dict[int, list[dict[str, Any]]] = {id_: [] for id_ in truth.category_ids}
    for annotation in truth.coco["annotations"]:
        annotations[annotation["category_id"]].append(annotation)
    numbers = image_numbers(truth)
    images = [numbers[truth.image_ids[detections_i.image_id]] for detections_i in detections]
    num_classes = len(truth.class_names)
    entries = _detection_entries(detections, images, num_classes, task)
    for objects_k, detections_k in zip(annotations.values(), entries, strict=True):
        yield [_object_entry(truth, a, numbers, task, protocol) for a in objects_k], detections_k


def _object_entry(
    truth: CocoGroundTruth,
    annotation: Mapping[str, Any],
    numbers: Mapping[int, int],
    task: str,
    protocol: CocoProtocol,
) -> dict[str, Any]:
    """Return a copy of an annotation, since C++ writes into it, with what the task compares."""
    entry = {key: annotation[key] for key in ("bbox", "area", "iscrowd")}
    entry["image_id"] = numbers[annotation["image_id"]]
    if task == "segm":
        entry |= truth.mask_entry(annotation)
    if task == "keypoints":
        unlabelled = [0.0] * (3 * len(protocol.oks_sigmas))
        entry["keypoints"] = annotation.get("keypoints") or unlabelled
        entry["num_keypoints"] = annotation.get("num_keypoints", 0)
    return entry


def _detection_entries(
    detections: Sequence[ImageDetections], images: Sequence[int], num_classes: int, task: str
) -> Iterator[ClassEntries]:
    """Yield the detections of each class, with what the task compares; `images` numbers theirs."""
    # The empty arrays in front keep shape and type where there are no detections.
    classes = np.concatenate([np.zeros(0, dtype=np.int64), *(d.classes for d in detections)])
    given_boxes = [boxes_xywh(d) for d in detections if len(d)]
    boxes = np.concatenate(given_boxes or [np.zeros((0, 4))])
    scores = np.concatenate([np.zeros(0), *(d.scores for d in detections)])
    image_of = np.repeat(np.array(images, dtype=np.int64), [len(d) for d in detections])
    areas = boxes[:, 2] * boxes[:, 3]
    masks: list[dict[str, Any]] = []
    keypoints = np.zeros(0)
    if task == "segm":
        masks = [rle for d in detections for rle in d.masks or ()]
        areas = mask_areas(masks)
    if task == "keypoints":
        given = [d.keypoints for d in detections if d.keypoints is not None and len(d)]
        keypoints = np.concatenate([keypoints_flat(k) for k in given] or [keypoints])

    # Stable, so that equal scores of one image stay in the order in which the model gave them.
    order = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[order], np.arange(1, num_classes))
    # Only one class at a time as dicts: they take ten times the memory of the arrays.
    for indices in np.split(order, starts):
        columns = (image_of[indices], boxes[indices], scores[indices], areas[indices])
        entries = [
            {"image_id": image, "bbox": box, "score": score, "area": area, "iscrowd": 0}
            for image, box, score, area in zip(*(c.tolist() for c in columns), strict=True)
        ]
        if task == "segm":
            for entry, index in zip(entries, indices.tolist(), strict=True):
                entry["segmentation"] = masks[index]
        if task == "keypoints" and entries:
            for entry, flat in zip(entries, keypoints[indices].tolist(), strict=True):
                entry["keypoints"] = flat
        yield entries


def mask_areas(masks: Sequence[dict[str, Any]]) -> np.ndarray:
    """Compute the areas of run-length masks, (R,) float64."""
    # pycocotools 2.0.11 puts the number of masks of one call into a byte: NumPy 2 refuses more than
    # 255.
    blocks: list[Any] = [masks[start : start + 255] for start in range(0, len(masks), 255)]
    areas = [mask_util.area(block) for block in blocks]
    return np.concatenate([np.zeros(0), *areas])


def _score_class(
    objects: ClassEntries, detections: ClassEntries, protocol: CocoProtocol, task: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return precision (T, P, A, L) and recall (T, A, L) of one class."""
    area_ranges, limits = protocol.area_ranges_of(task), protocol.limits(task)
    if not objects:
        # -1, as COCO marks what has no ground truth.
        shape = (len(protocol.iou_thresholds), len(RECALL_POINTS), len(area_ranges), len(limits))
        return np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    # Images with neither objects nor detections of the class would change nothing.
    images = sorted({entry["image_id"] for entry in (*objects, *detections)})
    evaluation_class = COCOeval_faster if len(objects[0]["bbox"]) == 4 else _RotatedCOCOeval
    evaluation = evaluation_class(
        _coco_index(objects, images),
        _coco_index(detections, images),
        iouType=cast(Any, task),
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


class COCOeval_opt(COCOeval_faster):
    """What Detectron2 calls a `COCOeval` in C++: with the summary, and `stats`, of pycocotools."""

    def summarize(self) -> None:
        """Print the twelve numbers, ten of keypoints, as `pycocotools.cocoeval` does."""
        COCOeval.summarize(cast(Any, self))


class _RotatedCOCOeval(COCOeval_faster):
    """The same with the overlaps of boxes XYWHA."""

    def computeIoU(self, imgId: int, catId: int) -> Any:
        """Return the (N, M) overlaps of detections, in falling order of score, with objects."""
        objects, detections = (
            data.get_instances([imgId], [catId], True)[0][0]
            for data in (self.gt_dataset, self.dt_dataset)
        )
        if not objects or not detections:
            return []
        order = np.argsort([-d["score"] for d in detections], kind="stable")
        detections = [detections[i] for i in order[: self.params.maxDets[-1]]]
        boxes, truth = (np.array([o["bbox"] for o in all_]) for all_ in (detections, objects))
        iou = exact_iou(boxes, truth)
        # What lies in a crowd counts by its own area: the shared area over that of the detection.
        area, truth_area = boxes[:, 2:4].prod(axis=1)[:, None], truth[:, 2:4].prod(axis=1)
        covered = iou * (area + truth_area) / (1 + iou) / np.maximum(area, 1e-12)
        return np.where([bool(o["iscrowd"]) for o in objects], covered, iou)


def _coco_index(entries: ClassEntries, images: Sequence[int]) -> COCO:
    """Index the entries of one class, which get ids and which the evaluation writes into."""
    # Counted from 1: id 0 means "not matched".
    for number, entry in enumerate(entries, start=1):
        entry["id"] = number
        entry["category_id"] = 1
    return COCO(
        {
            # Masks are compressed already, so that the sizes are not used; they have to be there.
            "images": [{"id": number, "height": 0, "width": 0} for number in images],
            "categories": [{"id": 1, "name": "class"}],
            "annotations": entries,
        }
    )
