"""COCO's average precision and recall of boxes, masks and keypoints, on any registered data set."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from detkit.evaluation.coco.ground_truth import CocoGroundTruth, boxes_xyxy, load_coco_ground_truth
from detkit.evaluation.coco.results import (
    AREA_RANGES,
    AREA_SUFFIXES,
    IOU_THRESHOLDS,
    TASKS,
    CocoProtocol,
    coco_metrics,
    coco_protocol,
    coco_recalls,
    coco_result_dicts,
)
from detkit.evaluation.coco.scoring import score_detections
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.detections import (
    ImageDetections,
    detections_from_instances,
    detections_from_proposals,
    exact_iou,
    explain_scores,
    image_id_of,
)
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.testing import metrics_table, per_class_table
from detkit.structures import ImageRecord, Instances, ModelInput, ModelOutput

logger = logging.getLogger(__name__)

_FIELDS = {"segm": "pred_masks", "keypoints": "pred_keypoints"}
_SWITCHES = {"segm": "MODEL.MASK_ON", "keypoints": "MODEL.KEYPOINT_ON"}
NOUNS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


class COCOEvaluator(DatasetEvaluator):
    """Scores boxes, masks and keypoints by COCO's AP, and the proposals of a proposal network by their recall.

    Works on every registered data set, whatever its format. A class without ground truth scores nan
    and does not count in the mean.
    """

    results_file = "coco_instances_results.json"
    scored_tasks: tuple[str, ...] = TASKS

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        kpt_oks_sigmas: Sequence[float] = (),
        keypoint_max_dets_per_image: int | None = None,
        iou_thresholds: Sequence[float] = (),
        area_ranges: Sequence[Sequence[str | float]] = (),
        records: Sequence[ImageRecord] | None = None,
    ) -> None:
        """Load the ground truth.

        Args:
            dataset_name: A registered data set.
            tasks: What to score, of "bbox", "segm" and "keypoints". None scores what the model
                gives.
            distributed: Whether to score the predictions of all processes together, in the main
                one; else each process scores its own.
            output_dir: Gets `coco_instances_results.json`, in COCO's result format with the ids of
                the data set, or of `convert_to_coco_json` where the data set has other ids than
                numbers. None writes nothing.
            max_dets_per_image: The best so many detections per image and class are scored; None
                takes COCO's 100.
            kpt_oks_sigmas: Spread of each keypoint, relative to the size of the object; empty takes
                COCO's 17.
            keypoint_max_dets_per_image: As `max_dets_per_image`, for keypoints; None takes COCO's
                20.
            iou_thresholds: Overlaps that AP is averaged over; each is then given by itself as well.
                Empty takes COCO's.
            area_ranges: [name, smallest, largest] each, in square pixels. Empty takes COCO's small,
                medium and large.
            records: What the data set's loader gives, where it has been called already; None calls
                it.

        Raises:
            ValueError: A task is unknown, a number out of range, the data set cannot be scored, or
                its objects have another number of keypoints than there are spreads.
        """
        self._check_tasks(tasks)
        self._tasks = None if tasks is None else [task for task in TASKS if task in tasks]
        self._distributed = distributed
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._protocol = coco_protocol(
            iou_thresholds=iou_thresholds,
            area_ranges=area_ranges,
            max_dets_per_image=max_dets_per_image,
            keypoint_max_dets_per_image=keypoint_max_dets_per_image,
            kpt_oks_sigmas=kpt_oks_sigmas,
        )
        self._ground_truth = load_coco_ground_truth(dataset_name, records)
        if "keypoints" in (self._tasks or ()):
            self._check_keypoints_of_objects()
        self._detections = ImageCollector(
            ImageDetections, dataset_name, self._ground_truth.image_ids
        )
        self._proposals = ImageCollector(
            ImageDetections, dataset_name, self._ground_truth.image_ids
        )

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._detections.reset()
        self._proposals.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Take in one batch: outputs with `instances`, `proposals`, or both. Masks are encoded at once.

        Raises:
            ValueError: An image is not in the data set or came before, or a prediction has a class
                that the data set does not have, a number that is not finite, no masks or keypoints
                where they are to be scored, masks of another size than the image, or another number
                of keypoints than there are spreads.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            image_id = image_id_of(model_input)
            if "instances" in output:
                self._detections.add(self._take_instances(image_id, output["instances"]))
            if "proposals" in output:
                self._proposals.add(detections_from_proposals(image_id, output["proposals"]))

    def _take_instances(self, image_id: int | str, instances: Instances) -> ImageDetections:
        truth = self._ground_truth
        tasks = self.scored_tasks if self._tasks is None else self._tasks
        fields = [_FIELDS[task] for task in tasks if task in _FIELDS]
        detections = detections_from_instances(
            image_id, instances, truth.dataset_name, truth.class_names, fields
        )
        if len(detections) == 0:
            return detections
        for task in self._tasks or ():
            if task in _FIELDS and not instances.has(_FIELDS[task]):
                raise ValueError(
                    f"task {task!r} needs {_FIELDS[task]!r} in the instances of image {image_id!r},"
                    f" which have only {sorted(instances.get_fields())}: was the model built with"
                    f" {_SWITCHES[task]}?"
                )
        if detections.masks:
            truth.check_mask_size(image_id, detections.masks[0]["size"])
        if detections.keypoints is not None:
            self._check_num_keypoints(
                detections.keypoints.shape[1], f"the model's instances in image {image_id!r} have"
            )
        return detections

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `bbox` and, where they are scored, `segm` and `keypoints` with AP, AP50, AP75, APs (not
            of keypoints), APm, APl and AP-<class>; and `box_proposals` with AR@100, ARs@100, ...,
            ARl@1000, in [0, 100]. nan where there is no ground truth; 0 where there is some and no
            prediction, with a warning that says why. An empty dict in all processes but the main
            one.
        """
        detections = self._detections.gather(self._distributed)
        proposals = self._proposals.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if detections is None or proposals is None:
            return results
        if proposals:
            results["box_proposals"] = self._evaluate_proposals(proposals)
        if detections or not proposals:
            results.update(self._evaluate_detections(detections))
        return results

    def _evaluate_proposals(self, proposals: list[ImageDetections]) -> dict[str, float]:
        metrics = proposal_recall_metrics(self._ground_truth, proposals)
        logger.info(
            "recall of proposals on %s:\n%s",
            self._ground_truth.dataset_name,
            metrics_table(metrics),
        )
        return metrics

    def _evaluate_detections(
        self, detections: list[ImageDetections]
    ) -> dict[str, dict[str, float]]:
        truth = self._ground_truth
        if self._output_dir is not None:
            write_results(self._output_dir / self.results_file, truth, detections)
        explain_scores(truth.dataset_name, len(truth.image_ids), truth.num_objects, detections)
        tasks = _tasks_of(detections) if self._tasks is None else self._tasks
        return {task: self._evaluate_task(task, detections) for task in tasks}

    def _evaluate_task(self, task: str, detections: list[ImageDetections]) -> dict[str, float]:
        truth, protocol = self._ground_truth, self._protocol
        if task == "keypoints":
            self._check_keypoints_of_objects()
        _warn_of_crowded_images(truth, protocol, task)
        scores = score_detections(truth, detections, protocol, task)
        metrics = coco_metrics(scores, truth.class_names, protocol.named_thresholds)
        overall = {name: value for name, value in metrics.items() if "-" not in name}
        what, name = NOUNS[task], truth.dataset_name
        logger.info("COCO average precision of %s on %s:\n%s", what, name, metrics_table(overall))
        logger.info(
            "COCO average recall of %s on %s:\n%s", what, name, metrics_table(coco_recalls(scores))
        )
        logger.info(
            "COCO average precision of %s per class on %s:\n%s",
            what,
            name,
            per_class_table(metrics),
        )
        return metrics

    def _check_tasks(self, tasks: Sequence[str] | None) -> None:
        if isinstance(tasks, str):
            raise ValueError(
                f'tasks must be a list of names, such as ["{tasks}"], got the string {tasks!r}'
            )
        for task in tasks or ():
            if task not in self.scored_tasks:
                raise ValueError(
                    f"tasks must be among {', '.join(self.scored_tasks)}, got {task!r}"
                )

    def _check_keypoints_of_objects(self) -> None:
        for annotation in self._ground_truth.coco["annotations"]:
            if annotation.get("keypoints"):
                where = f"image {annotation['image_id']} of {self._ground_truth.dataset_name!r}"
                who = f"object {annotation['id']} in {where} has"
                self._check_num_keypoints(len(annotation["keypoints"]) // 3, who)

    def _check_num_keypoints(self, count: int, who: str) -> None:
        needed = len(self._protocol.oks_sigmas)
        if count != needed:
            raise ValueError(
                f"{who} {count} keypoints, but there are {needed} spreads to score them by: set"
                " TEST.KEYPOINT_OKS_SIGMAS (kpt_oks_sigmas) to one per keypoint; it is empty for"
                " COCO's 17"
            )


def write_results(
    path: Path, truth: CocoGroundTruth, detections: Sequence[ImageDetections]
) -> None:
    """Write detections as a COCO result file, with masks and keypoints where they have them."""
    results = coco_result_dicts(detections, truth.image_ids, truth.category_ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results), encoding="utf-8")
    logger.info("wrote %d detections to %s", len(results), path)


def _tasks_of(detections: Sequence[ImageDetections]) -> list[str]:
    given = {"bbox"}
    given |= {"segm"} if any(d.masks is not None for d in detections) else set()
    given |= {"keypoints"} if any(d.keypoints is not None for d in detections) else set()
    return [task for task in TASKS if task in given]


def _warn_of_crowded_images(truth: CocoGroundTruth, protocol: CocoProtocol, task: str) -> None:
    max_dets = protocol.max_dets_of(task)
    counts = np.array(
        [sum(_counts(o, task) for o in objects) for objects in truth.objects_per_image().values()]
    )
    if counts.size and counts.max() > max_dets:
        of_keypoints = task == "keypoints" and protocol.keypoint_max_dets == max_dets
        logger.warning(
            "%d of %d images of %s have more than %d objects (up to %d), but no more detections per"
            " image are scored, so not all can be found: raise %s",
            (counts > max_dets).sum(),
            counts.size,
            truth.dataset_name,
            max_dets,
            counts.max(),
            (
                "TEST.KEYPOINT_DETECTIONS_PER_IMAGE (keypoint_max_dets_per_image)"
                if of_keypoints
                else "TEST.DETECTIONS_PER_IMAGE (max_dets_per_image)"
            ),
        )


def _counts(annotation: dict, task: str) -> bool:
    return not annotation["iscrowd"] and (
        task != "keypoints" or annotation.get("num_keypoints", 0) > 0
    )


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
