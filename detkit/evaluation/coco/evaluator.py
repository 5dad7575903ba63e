"""COCO's average precision and recall on any registered data set, and the recall of proposals.

Legend: N proposals and M objects in one image, G objects in all images.
"""

import contextlib
import copy
import io
import itertools
import logging
import math
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval

from detkit.config import CfgNode
from detkit.data import MetadataCatalog
from detkit.evaluation.coco.ground_truth import (
    CocoGroundTruth,
    load_coco_ground_truth,
    truth_boxes,
)
from detkit.evaluation.coco.results import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    TASKS,
    CocoScores,
    Predictions,
    area_suffix,
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
from detkit.evaluation.testing import metrics_table, per_class_table, write_json
from detkit.structures import ImageRecord, Instances, ModelInput, ModelOutput
from detkit.utils import comm
from detkit.utils.env import return_freed_memory
from detkit.utils.errors import ConfigError, ContractError
from detkit.utils.logger import FILE_ONLY, log_first_n, shown_if_short

if TYPE_CHECKING:
    from pycocotools.coco import COCO

logger = logging.getLogger(__name__)

_FIELDS = {"segm": "pred_masks", "keypoints": "pred_keypoints"}
_SWITCHES = {"segm": "MODEL.MASK_ON", "keypoints": "MODEL.KEYPOINT_ON"}
_PIXELS_UNTIL_RETURN = 1 << 28  # of masks, a byte each
NOUNS = {"bbox": "boxes", "segm": "masks", "keypoints": "keypoints"}


class COCOEvaluator(DatasetEvaluator):
    """Scores boxes, masks and keypoints by COCO's AP, and proposals by their recall.

    Works on every registered data set, whatever its format. A class without ground truth scores nan
    and does not count in the mean.
    """

    results_file = "coco_instances_results.json"
    scored_tasks: tuple[str, ...] = TASKS
    rotated: ClassVar[bool] = False

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | CfgNode | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        use_fast_impl: bool = True,
        kpt_oks_sigmas: Sequence[float] = (),
        allow_cached_coco: bool = True,
        keypoint_max_dets_per_image: int | None = None,
        iou_thresholds: Sequence[float] = (),
        area_ranges: Sequence[Sequence[str | float]] = (),
        records: Sequence[ImageRecord] | None = None,
    ) -> None:
        """Load the ground truth.

        Args:
            dataset_name: A registered data set.
            tasks: What to score, of "bbox", "segm" and "keypoints". None scores what the model
                predicts, and so does a config, which old scripts pass.
            distributed: Whether to score the predictions of all processes together, in the main
                one; else each process scores its own.
            output_dir: Where `coco_instances_results.json` is written, in COCO's result format with
                the ids of the data set, or those of `convert_to_coco_json` if ids of the data set
                are not numbers. None writes nothing.
            max_dets_per_image: Detections per image and class that are scored, best score first;
                None for COCO's 100.
            use_fast_impl: Detectron2's; there is one implementation.
            kpt_oks_sigmas: Spread of each keypoint, relative to the size of the object; empty for
                COCO's 17.
            allow_cached_coco: Detectron2's; the ground truth is no cached file.
            keypoint_max_dets_per_image: As `max_dets_per_image`, for keypoints; None for COCO's 20.
            iou_thresholds: Overlaps that AP is averaged over, the AP at each of which is then
                reported separately. Empty for COCO's.
            area_ranges: [name, smallest, largest] each, in square pixels. Empty for COCO's small,
                medium and large.
            records: What the data set's loader returns, if it has been called already; None calls
                it.

        Raises:
            ValueError: A task is unknown, or the data set cannot be scored.
            ConfigError: A number is out of its range, or the objects have another number of
                keypoints than there are spreads.
        """
        if isinstance(tasks, CfgNode):
            log_first_n(
                logging.WARNING,
                "COCOEvaluator(name, cfg, ...) is an old form: pass the tasks, or nothing",
            )
            kpt_oks_sigmas = kpt_oks_sigmas or tasks.TEST.KEYPOINT_OKS_SIGMAS
            tasks = None
        if isinstance(tasks, str):
            raise ValueError(
                f'tasks must be a list of names, such as ["{tasks}"], got the string {tasks!r}'
            )
        for task in tasks or ():
            if task not in self.scored_tasks:
                raise ValueError(
                    f"tasks must be among {', '.join(self.scored_tasks)}, got {task!r}"
                )
        # In COCO's order, whatever the order of `tasks`: results are listed in it.
        self._tasks = None if tasks is None else [task for task in TASKS if task in tasks]
        self._distributed = distributed
        self._output_dir = None if output_dir is None else str(output_dir)  # subclasses add to it
        self._protocol = coco_protocol(
            iou_thresholds=iou_thresholds,
            area_ranges=area_ranges,
            max_dets_per_image=max_dets_per_image,
            keypoint_max_dets_per_image=keypoint_max_dets_per_image,
            kpt_oks_sigmas=kpt_oks_sigmas,
        )
        self._ground_truth = load_coco_ground_truth(dataset_name, records, rotated=self.rotated)
        # Now, and not after an hour of inference.
        if "keypoints" in (self._tasks or ()):
            self._check_keypoints_of_objects()
        if "segm" in (self._tasks or ()):
            self._ground_truth.encode_masks()
        image_ids = self._ground_truth.image_ids
        self._detections = ImageCollector(ImageDetections, dataset_name, image_ids)
        self._proposals = ImageCollector(ImageDetections, dataset_name, image_ids)
        self._num_mask_pixels = 0
        self._listed: list[dict[str, Any]] = []
        # What subclasses written for Detectron2 use.
        self._results: OrderedDict[str, dict[str, float]] = OrderedDict()
        self._metadata = MetadataCatalog.get(dataset_name)
        self._cpu_device = torch.device("cpu")
        self._logger = logger
        self._do_evaluation = True
        self._use_fast_impl = use_fast_impl
        self._kpt_oks_sigmas = kpt_oks_sigmas
        self._max_dets_per_image = max_dets_per_image

    @cached_property
    def _coco_api(self) -> "COCO":
        from pycocotools.coco import COCO

        api: Any = COCO()
        # Of a copy, since it writes into the annotations.
        api.dataset = copy.deepcopy({"info": {}, **self._ground_truth.coco})
        with contextlib.redirect_stdout(io.StringIO()):
            api.createIndex()
        return api

    @property
    def _predictions(self) -> list[dict[str, Any]]:
        """What was processed, as Detectron2's evaluator holds it; see `Predictions`.

        A subclass may read it, change it and append to it. What was looked at is held in this form,
        which takes much more memory.
        """
        self._listed += Predictions(self._detections.take(), self._proposals.take())
        return self._listed

    @_predictions.setter
    def _predictions(self, predictions: list[dict[str, Any]]) -> None:
        self._detections.reset()
        self._proposals.reset()
        self._listed = predictions

    def reset(self) -> None:
        """Remove what was processed."""
        self._num_mask_pixels = 0
        self._predictions = []

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Add one batch of outputs with `instances`, `proposals`, or both.

        Raises:
            ValueError: An image is not in the data set or came before, masks are not pasted into
                the image, or a number is not finite.
            ConfigError: A class is not in the data set, masks or keypoints that are to be scored
                are missing, or their number of keypoints is not that of the spreads.
            DataError: Masks have another size than the image.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            image_id = image_id_of(model_input)
            if "instances" in output:
                self._detections.add(self._checked_detections(image_id, output["instances"]))
                self._bound_memory(output["instances"])
            if "proposals" in output:
                found = detections_from_proposals(
                    image_id, output["proposals"], rotated=self.rotated
                )
                self._proposals.add(found)

    def _bound_memory(self, instances: Instances) -> None:
        """Return freed memory to the system after every 256 million pixels of masks.

        The masks of an image and what they are made of are freed as a block of some 100 MB, and
        what is kept of the image falls into that block: the next one does not fit in between, and
        60 images of 100 masks took 4 GB, of which 40 MB were in use.
        """
        if instances.has("pred_masks"):
            self._num_mask_pixels += len(instances) * math.prod(instances.image_size)
        if self._num_mask_pixels > _PIXELS_UNTIL_RETURN:
            self._num_mask_pixels = 0
            return_freed_memory()

    def _checked_detections(self, image_id: int | str, instances: Instances) -> ImageDetections:
        truth = self._ground_truth
        tasks = self.scored_tasks if self._tasks is None else self._tasks
        fields = [_FIELDS[task] for task in tasks if task in _FIELDS]
        detections = detections_from_instances(
            image_id,
            instances,
            truth.dataset_name,
            truth.class_names,
            fields,
            rotated=self.rotated,
        )
        # Some models leave out masks and keypoints of images without detections.
        if len(detections) == 0:
            return detections
        for task in self._tasks or ():
            if task in _FIELDS and not instances.has(_FIELDS[task]):
                raise ConfigError(
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

    def evaluate(self, img_ids: Collection[int | str] | None = None) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Args:
            img_ids: The images that count; None for all.

        Returns:
            `bbox` and, if they are scored, `segm` and `keypoints` with AP, AP50, AP75, APs (not of
            keypoints), APm, APl and AP-<class>; and `box_proposals` with AR@100, ARs@100, ...,
            ARl@1000, in [0, 100]. nan without ground truth; 0, with a warning that says why, with
            ground truth but without predictions. Empty in all processes but the main one.
        """
        detections = self._detections.gather(self._distributed)
        proposals = self._proposals.gather(self._distributed)
        listed = comm.gather(self._listed) if self._distributed else [self._listed]
        self._results = OrderedDict()
        if detections is None or proposals is None:
            return self._results
        predictions: Sequence[dict[str, Any]] = Predictions(detections, proposals)
        if any(listed):  # the subclass's own methods may need what it has put into the dicts
            predictions = [*itertools.chain(*listed), *predictions]
        if self._output_dir is not None:  # a method of the subclass's own may write there
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)
        found = Predictions.of(predictions)
        if found.proposals:
            self._eval_box_proposals(predictions)
        if found.detections or not found.proposals:
            self._eval_predictions(predictions, img_ids)
        return self._results

    def _in_order(self, found: Sequence[ImageDetections]) -> list[ImageDetections]:
        """Return what was found in each image as the data set has them, each at most once."""
        truth = self._ground_truth
        collector = ImageCollector(ImageDetections, truth.dataset_name, truth.image_ids)
        for of_image in found:
            collector.add(of_image)
        return collector.gather(distributed=False) or []

    # Methods of Detectron2's evaluator, which subclasses override.

    def _eval_box_proposals(self, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Put the recall of the proposals into `_results`."""
        truth = self._ground_truth
        proposals = self._in_order(Predictions.of(predictions).proposals)
        metrics = proposal_recall_metrics(truth, proposals)
        self._results["box_proposals"] = metrics
        logger.info("recall of proposals on %s:\n%s", truth.dataset_name, metrics_table(metrics))

    def _eval_predictions(
        self,
        predictions: Sequence[Mapping[str, Any]],
        img_ids: Collection[int | str] | None = None,
    ) -> None:
        """Put the scores of the detections into `_results`.

        Args:
            predictions: A dict per image; see `Predictions`.
            img_ids: The images that count; None for all.
        """
        truth = self._ground_truth
        detections = self._in_order(Predictions.of(predictions).detections)
        if self._output_dir is not None:
            dicts = coco_result_dicts(detections, truth.image_ids, truth.category_ids)
            write_json(
                Path(self._output_dir) / self.results_file, dicts, f"{len(dicts)} detections"
            )
        explain_scores(self._detections, detections, truth.num_objects)
        tasks = self._tasks
        if tasks is None:
            tasks = self._tasks_from_predictions(predictions)
        if img_ids is not None:
            detections = [d for d in detections if d.image_id in img_ids]
            self._ground_truth = truth.only(img_ids)
        try:
            for task in tasks:
                self._results[task] = self._evaluate_task(task, detections)
        finally:
            self._ground_truth = truth

    def _tasks_from_predictions(self, predictions: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what the predictions can be scored for."""
        detections = Predictions.of(predictions).detections
        tasks = ["bbox"]
        if any(d.masks is not None for d in detections):
            tasks.append("segm")
        if any(d.keypoints is not None for d in detections):
            tasks.append("keypoints")
        return tasks

    def _evaluate_task(self, task: str, detections: list[ImageDetections]) -> dict[str, float]:
        truth, protocol = self._ground_truth, self._protocol
        if task == "keypoints":
            self._check_keypoints_of_objects()
        self._warn_of_crowded_images(task)
        scores = score_detections(truth, detections, protocol, task)
        return self._derive_coco_results(scores, task, truth.class_names)

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Return the metrics of a task by name, and log them.

        Args:
            coco_eval: `CocoScores`, or a `COCOeval` of pycocotools that has accumulated.
            iou_type: The task.
            class_names: (K,) as the scores have them; None for those of the data set.
        """
        truth, task = self._ground_truth, iou_type
        class_names = truth.class_names if class_names is None else class_names
        scores = CocoScores.of(coco_eval)
        metrics = coco_metrics(scores, class_names, self._protocol.named_thresholds)
        for kind, text, shown in (
            ("average precision of %s", metrics_table(metrics), None),
            ("average recall of %s", metrics_table(coco_recalls(scores)), FILE_ONLY),
            (
                "average precision of %s per class",
                per_class_table(metrics),
                shown_if_short(len(truth.class_names)),
            ),
        ):
            what = kind % NOUNS[task]
            logger.info("COCO %s on %s:\n%s", what, truth.dataset_name, text, extra=shown)
        return metrics

    def _check_keypoints_of_objects(self) -> None:
        annotations = self._ground_truth.coco["annotations"]
        if annotations and not any(a.get("num_keypoints") for a in annotations):
            logger.warning(
                "no object of %s has a labelled keypoint: the score of keypoints is nan. They are"
                " `keypoints` in the annotations, x, y and visibility of each",
                self._ground_truth.dataset_name,
            )
        for annotation in annotations:
            if annotation.get("keypoints"):
                where = f"image {annotation['image_id']} of {self._ground_truth.dataset_name!r}"
                who = f"object {annotation['id']} in {where} has"
                self._check_num_keypoints(len(annotation["keypoints"]) // 3, who)

    def _check_num_keypoints(self, count: int, who: str) -> None:
        needed = len(self._protocol.oks_sigmas)
        if count != needed:
            raise ConfigError(
                f"{who} {count} keypoints, but there are {needed} spreads to score them by: set"
                " TEST.KEYPOINT_OKS_SIGMAS (kpt_oks_sigmas) to one per keypoint; it is empty for"
                " COCO's 17"
            )

    def _warn_of_crowded_images(self, task: str) -> None:
        max_dets = self._protocol.max_dets_of(task)
        counts: list[int] = []
        for objects in self._ground_truth.objects_per_image().values():
            # Objects that cost something to miss: no crowds, and for keypoints only labelled ones.
            found = [a for a in objects if not a["iscrowd"]]
            if task == "keypoints":
                found = [a for a in found if a.get("num_keypoints", 0) > 0]
            counts.append(len(found))
        if max(counts, default=0) <= max_dets:
            return
        key = "TEST.DETECTIONS_PER_IMAGE (max_dets_per_image)"
        if task == "keypoints" and self._protocol.keypoint_max_dets == max_dets:
            key = "TEST.KEYPOINT_DETECTIONS_PER_IMAGE (keypoint_max_dets_per_image)"
        logger.warning(
            "%d of %d images of %s have more than %d objects (up to %d), but no more detections per"
            " image are scored, so not all can be found: raise %s",
            sum(count > max_dets for count in counts),
            len(counts),
            self._ground_truth.dataset_name,
            max_dets,
            max(counts),
            key,
        )


class RotatedCOCOEvaluator(COCOEvaluator):
    """Scores rotated boxes by COCO's AP, with the overlaps of rotated boxes.

    Upright boxes of the ground truth or of the model count as boxes of angle 0. Boxes whose angles
    differ by 180 degrees are the same. The results file has five numbers per box.
    """

    scored_tasks = ("bbox",)
    rotated = True


def proposal_recall_metrics(
    truth: CocoGroundTruth,
    proposals: Iterable[ImageDetections],
    limits: tuple[int, ...] = (100, 1000),
) -> dict[str, float]:
    """Compute AR@<limit>, ARs@<limit>, ARm@<limit> and ARl@<limit> in [0, 100], over all classes.

    Crowd regions do not count. Each object counts in the area ranges that hold its own area,
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
        The metrics; nan for an area range without objects.
    """
    proposals_of = {truth.image_ids[proposals_i.image_id]: proposals_i for proposals_i in proposals}
    # Per limit and area range, the overlaps of the objects in it.
    overlaps: dict[tuple[int, str], list[np.ndarray]] = {
        (limit, area): [] for limit in limits for area in AREA_RANGES
    }
    for image_id, objects_i in truth.objects_per_image().items():
        objects = [annotation for annotation in objects_i if not annotation["iscrowd"]]
        object_areas = np.array([annotation["area"] for annotation in objects])
        iou = np.zeros((0, len(objects)))
        if image_id in proposals_of:
            found = proposals_of[image_id]
            order = np.argsort(-found.scores, kind="stable")
            iou = exact_iou(found.boxes[order], truth_boxes(objects, truth.rotated))
        for limit, area in overlaps:
            low, high = AREA_RANGES[area]
            # Both ends belong to the range, so an object of 32 x 32 is small and medium.
            in_range = (object_areas >= low) & (object_areas <= high)
            overlaps[limit, area].append(covered_overlaps(iou[:limit, in_range]))
    metrics = {}
    for (limit, area), parts in overlaps.items():
        # (G, T): whether each object is covered at each threshold.
        is_covered = np.concatenate([*parts, np.zeros(0)])[:, None] >= IOU_THRESHOLDS
        recall = 100 * float(is_covered.mean()) if is_covered.size else float("nan")
        metrics[f"AR{area_suffix(area)}@{limit}"] = recall
    return metrics


def covered_overlaps(iou: np.ndarray) -> np.ndarray:
    """Assign proposals to objects one to one, best overlap first, and return their overlaps.

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
        # The object that any free proposal covers best takes that proposal.
        obj = best.argmax()
        proposal = best_proposal[obj]
        covered[index] = best[obj]
        iou[proposal] = 0
        # -1 lies below every overlap, so the object is not chosen again.
        best[obj], best_proposal[obj] = -1, -1
        # Only objects whose best proposal was just taken look for another: with hundreds of
        # objects, comparing all pairs again each time would take seconds per image.
        without = np.flatnonzero(best_proposal == proposal)
        best_proposal[without] = iou[:, without].argmax(axis=0)
        best[without] = iou[:, without].max(axis=0)
    return covered


class COCOevalMaxDets(COCOeval):
    """A `COCOeval` of pycocotools whose AP counts detections up to the last limit, not to 100."""

    def summarize(self) -> None:
        """Print the numbers as pycocotools does, and keep them as `stats`."""
        with contextlib.redirect_stdout(io.StringIO()) as text:
            super().summarize()
        lines, limit = text.getvalue().splitlines(), self.params.maxDets[-1]
        if limit != 100 and self.params.iouType != "keypoints":
            precision = self.eval["precision"][:, :, :, 0, -1]
            counted = precision[precision > -1]
            self.stats[0] = counted.mean() if counted.size else -1
            start = lines[0].partition("maxDets")[0]
            lines[0] = f"{start}maxDets={limit:>3d} ] = {self.stats[0]:0.3f}"
        print("\n".join(lines))


def evaluate_predictions_on_coco(
    coco_gt: "COCO",
    coco_results: list[dict[str, Any]],
    iou_type: str,
    kpt_oks_sigmas: Sequence[float] | None = None,
    cocoeval_fn: Any = None,
    img_ids: Collection[int] | None = None,
    max_dets_per_image: Sequence[int] | None = None,
    use_fast_impl: bool = True,
) -> Any:
    """Return a `COCOevalMaxDets` that has scored result dicts.

    Args:
        coco_gt: The ground truth.
        coco_results: As in COCO's result files. Not changed.
        iou_type: "bbox", "segm" or "keypoints".
        kpt_oks_sigmas: Spread of each keypoint; None or empty for COCO's.
        cocoeval_fn: Another class. A truth value changes nothing: `use_fast_impl` stood here in
            Detectron2 0.6.
        img_ids: The images that count; None for all.
        max_dets_per_image: Limits of detections per image; None for COCO's.
        use_fast_impl: Detectron2's; there is one implementation.

    Raises:
        ContractError: There are no results.
    """
    if not coco_results:
        raise ContractError("there are no results to score")
    results = copy.deepcopy(coco_results)
    if iou_type == "segm":
        for result in results:
            # Otherwise a mask would be small or large by its box.
            result.pop("bbox", None)
    found = coco_gt.loadRes(cast(Any, results))
    scorer: Any = cocoeval_fn if callable(cocoeval_fn) else COCOevalMaxDets
    coco_eval = scorer(coco_gt, found, iou_type)
    if max_dets_per_image is not None and iou_type != "keypoints":
        coco_eval.params.maxDets = list(max_dets_per_image)
    if img_ids is not None:
        coco_eval.params.imgIds = list(img_ids)
    if kpt_oks_sigmas and iou_type == "keypoints":
        coco_eval.params.kpt_oks_sigmas = np.array(kpt_oks_sigmas)
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    return coco_eval
