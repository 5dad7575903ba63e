"""COCO's average precision and recall of boxes, on any registered data set.

The numbers come from faster-coco-eval, a C++ form of pycocotools that gives the same ones: `tests/evaluation`
compares all twelve on random data with crowds, ties, empty images and more than a hundred detections. Found there,
and kept by `_coco_index` and `score_boxes` (version 1.8):

- Image and category ids become double precision numbers in C++: above 2**53 they collide, and strings fail. Here
  images and classes are numbered from 1.
- An annotation without `area` counts as area 0, so as small, where pycocotools fails; a NaN box gives other numbers
  than pycocotools. The exporter always writes an area, and detections that are not finite are refused.
- It takes `COCO(dict)` without copying the annotations and writes `ignore` into them, and `loadRes` writes a polygon of
  eight numbers into every detection. It gets dicts of its own, and no `loadRes`.
- Annotation id 0 means "not matched", as in pycocotools.
- `summarize` logs a table of its own, and its list of numbers changes with the limits. It is not used: `CocoScores`
  reads the arrays, in which the entries stay where they are.
- Equal scores keep their order within an image, then the order of the image ids: so images are numbered in rising
  order of their ids in the data set, as pycocotools sorts them.

Legend: T overlap thresholds, P recall points, A area ranges, L detection limits.
"""

from __future__ import annotations

import gc
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from detkit.evaluation.coco_ground_truth import CocoGroundTruth, load_coco_ground_truth
from detkit.evaluation.coco_results import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    RECALL_POINTS,
    CocoScores,
    boxes_xywh,
    coco_metrics,
    coco_recalls,
    coco_result_dicts,
    detection_limits,
    metrics_table,
    per_class_table,
)
from detkit.evaluation.detections import (
    DetectionCollector,
    ImageDetections,
    detections_from_instances,
    detections_from_proposals,
    explain_scores,
    image_id_of,
)
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.proposal_recall import proposal_recall_metrics
from detkit.structures import ModelInput, ModelOutput

logger = logging.getLogger(__name__)

RESULTS_FILE = "coco_instances_results.json"
_TASKS = ("bbox",)
_LATER_TASKS = ("segm", "keypoints")
_DEFAULT_MAX_DETS = 100


class COCOEvaluator(DatasetEvaluator):
    """Scores boxes by COCO's AP, and the proposals of a proposal network by their recall.

    Works on every registered data set, whatever its format. A class without ground truth scores nan and does not count
    in the mean.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
    ) -> None:
        """Load the ground truth.

        Args:
            dataset_name: A registered data set.
            tasks: What to score; "bbox" is what there is. None scores what the model gives.
            distributed: Whether to score the predictions of all processes together, in the main one; else each process
                scores its own.
            output_dir: Gets `coco_instances_results.json`, in COCO's result format with the ids of the data set, or of
                `convert_to_coco_json` where the data set has other ids than numbers. None writes nothing.
            max_dets_per_image: The best so many detections per image and class are scored; None takes COCO's 100.

        Raises:
            ValueError: If a task is unknown, or the data set cannot be scored.
        """
        _check_tasks(tasks)
        if max_dets_per_image is not None and max_dets_per_image < 1:
            raise ValueError(f"max_dets_per_image must be at least 1, got {max_dets_per_image}")
        self._distributed = distributed
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._max_dets = _DEFAULT_MAX_DETS if max_dets_per_image is None else max_dets_per_image
        self._ground_truth = load_coco_ground_truth(dataset_name)
        self._detections = DetectionCollector(dataset_name, self._ground_truth.image_ids)
        self._proposals = DetectionCollector(dataset_name, self._ground_truth.image_ids)

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._detections.reset()
        self._proposals.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Take in one batch: outputs with ``instances``, ``proposals``, or both.

        Raises:
            ValueError: If an image is not in the data set or came before, or a prediction has a class that the data set
                does not have, or a number that is not finite.
        """
        truth = self._ground_truth
        for model_input, output in zip(inputs, outputs, strict=True):
            image_id = image_id_of(model_input)
            if "instances" in output:
                instances = output["instances"]
                self._detections.add(
                    detections_from_instances(image_id, instances, truth.dataset_name, truth.class_names)
                )
            if "proposals" in output:
                self._proposals.add(detections_from_proposals(image_id, output["proposals"]))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            ``bbox`` with AP, AP50, AP75, APs, APm, APl and AP-<class>, and ``box_proposals`` with AR@100, ARs@100, ...,
            ARl@1000, in [0, 100]. nan where there is no ground truth; 0 where there is some and no prediction, with a
            warning that says why. An empty dict in all processes but the main one.
        """
        detections = self._detections.gather(self._distributed)
        proposals = self._proposals.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if detections is None or proposals is None:
            return results
        if proposals:
            results["box_proposals"] = self._evaluate_proposals(proposals)
        if detections or not proposals:
            results["bbox"] = self._evaluate_boxes(detections)
        return results

    def _evaluate_proposals(self, proposals: list[ImageDetections]) -> dict[str, float]:
        metrics = proposal_recall_metrics(self._ground_truth, proposals)
        logger.info("recall of proposals on %s:\n%s", self._ground_truth.dataset_name, metrics_table(metrics))
        return metrics

    def _evaluate_boxes(self, detections: list[ImageDetections]) -> dict[str, float]:
        truth = self._ground_truth
        if self._output_dir is not None:
            results = coco_result_dicts(detections, truth.image_ids, truth.category_ids)
            self._output_dir.mkdir(parents=True, exist_ok=True)
            (self._output_dir / RESULTS_FILE).write_text(json.dumps(results), encoding="utf-8")
            logger.info("wrote %d detections to %s", len(results), self._output_dir / RESULTS_FILE)
        explain_scores(truth.dataset_name, len(truth.image_ids), truth.num_objects, detections)
        _warn_of_crowded_images(truth, self._max_dets)
        scores = score_boxes(truth, detections, self._max_dets)
        metrics = coco_metrics(scores, truth.class_names)
        overall = {name: value for name, value in metrics.items() if "-" not in name}
        name = truth.dataset_name
        logger.info("COCO average precision of boxes on %s:\n%s", name, metrics_table(overall))
        logger.info("COCO average recall of boxes on %s:\n%s", name, metrics_table(coco_recalls(scores)))
        logger.info("COCO average precision per class on %s:\n%s", name, per_class_table(metrics))
        return metrics


def score_boxes(truth: CocoGroundTruth, detections: Sequence[ImageDetections], max_dets_per_image: int) -> CocoScores:
    """Give COCO's precision and recall of boxes.

    Classes do not meet in this metric, so they are scored one by one, on the images that have to do with them. Time and
    memory then follow the number of boxes, where scoring all at once keeps a list for every pair of image and class: 24
    million for LVIS.

    Args:
        truth: The ground truth.
        detections: At most one entry per image; an image without one has no detections.
        max_dets_per_image: The best so many detections per image and class are scored.
    """
    # In the order of the data set's own ids; see the head of this file.
    numbers = {coco_id: number for number, coco_id in enumerate(sorted(truth.image_ids.values()), start=1)}
    num_classes = len(truth.class_names)
    limits = detection_limits(max_dets_per_image)
    images = [numbers[truth.image_ids[detections_i.image_id]] for detections_i in detections]
    with _garbage_collection_paused():
        objects = _objects_per_class(truth, numbers)
        found = _detections_per_class(detections, images, num_classes)
        scores = [_score_class(objects_k, found_k, limits) for objects_k, found_k in zip(objects, found, strict=True)]
    return CocoScores(
        np.stack([precision for precision, _ in scores], axis=2),
        np.stack([recall for _, recall in scores], axis=1),
        limits,
    )


def _objects_per_class(truth: CocoGroundTruth, numbers: Mapping[int, int]) -> list[list[dict[str, Any]]]:
    per_class: dict[int, list[dict[str, Any]]] = {category_id: [] for category_id in truth.category_ids}
    for annotation in truth.coco["annotations"]:
        entry = {key: annotation[key] for key in ("bbox", "area", "iscrowd")}
        entry["image_id"] = numbers[annotation["image_id"]]
        per_class[annotation["category_id"]].append(entry)
    return list(per_class.values())


def _detections_per_class(
    detections: Sequence[ImageDetections], image_numbers: Sequence[int], num_classes: int
) -> Iterator[list[dict[str, Any]]]:
    """Give the detections of one class after the other: as dicts they take ten times the memory of the arrays."""
    classes = np.concatenate([np.zeros(0, dtype=np.int64), *(d.classes for d in detections)])
    boxes = np.concatenate([np.zeros((0, 4)), *(boxes_xywh(d) for d in detections)])
    scores = np.concatenate([np.zeros(0), *(d.scores for d in detections)])
    images = np.repeat(np.array(image_numbers, dtype=np.int64), [len(d) for d in detections])
    order = np.argsort(classes, kind="stable")
    starts = np.searchsorted(classes[order], np.arange(1, num_classes))
    for of_class in np.split(order, starts):
        columns = (images[of_class], boxes[of_class], boxes[of_class, 2] * boxes[of_class, 3], scores[of_class])
        yield [
            {"image_id": image, "bbox": box, "area": area, "score": score, "iscrowd": 0}
            for image, box, area, score in zip(*(column.tolist() for column in columns), strict=True)
        ]


def _score_class(
    objects: list[dict[str, Any]], detections: list[dict[str, Any]], limits: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Give precision (T, P, A, L) and recall (T, A, L) of one class."""
    if not objects:
        shape = (len(IOU_THRESHOLDS), len(RECALL_POINTS), len(AREA_RANGES), len(limits))
        return np.full(shape, -1.0), np.full((shape[0], *shape[2:]), -1.0)
    image_numbers = sorted({entry["image_id"] for entry in (*objects, *detections)})
    evaluation = COCOeval_faster(
        _coco_index(objects, image_numbers),
        _coco_index(detections, image_numbers),
        iouType="bbox",
        print_function=logger.debug,
    )
    evaluation.params.iouThrs = IOU_THRESHOLDS
    evaluation.params.recThrs = RECALL_POINTS
    evaluation.params.areaRng = [list(area_range) for area_range in AREA_RANGES.values()]
    evaluation.params.areaRngLbl = list(AREA_RANGES)
    evaluation.params.maxDets = limits
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][:, :, 0], evaluation.eval["recall"][:, 0]


def _coco_index(annotations: list[dict[str, Any]], image_numbers: Sequence[int]) -> COCO:
    """Index annotations of one class. They get ids, counted from 1, and are changed when they are scored."""
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
        annotation["category_id"] = 1
    return COCO(
        {
            "images": [{"id": number} for number in image_numbers],
            "categories": [{"id": 1, "name": "class"}],
            "annotations": annotations,
        }
    )


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Keep Python from looking for cycles while hundreds of thousands of small dicts are made, none of which has any.

    Each look goes over everything that the process holds. With 190 thousand detections to score, and as many result
    dicts held elsewhere, that was a third of the time: 3.6 instead of 2.4 s.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _check_tasks(tasks: Sequence[str] | None) -> None:
    if isinstance(tasks, str):
        raise ValueError(f'tasks must be a list of names, such as ["{tasks}"], got the string {tasks!r}')
    for task in tasks or ():
        if task in _LATER_TASKS:
            raise ValueError(f"task {task!r} cannot be scored yet: this version of detkit scores {', '.join(_TASKS)}")
        if task not in _TASKS:
            raise ValueError(f"tasks must be among {', '.join(_TASKS)}, got {task!r}")


def _warn_of_crowded_images(truth: CocoGroundTruth, max_dets: int) -> None:
    counts = np.array([sum(not o["iscrowd"] for o in objects) for objects in truth.objects_per_image().values()])
    if counts.size and counts.max() > max_dets:
        logger.warning(
            "%d of %d images of %s have more than %d objects (up to %d), but no more detections per image are "
            "scored, so not all can be found: raise TEST.DETECTIONS_PER_IMAGE (max_dets_per_image)",
            (counts > max_dets).sum(),
            counts.size,
            truth.dataset_name,
            max_dets,
            counts.max(),
        )
