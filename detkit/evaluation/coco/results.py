"""COCO's rules, its result dicts, and its scores as numbers.

Legend: R detections in one image, T overlap thresholds, P recall points, K classes, A area ranges,
L detection limits, J keypoints of one object.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from detkit.evaluation.detections import (
    ImageDetections,
    detections_from_proposals,
    take_instances,
)
from detkit.structures import Instances, RotatedBoxes
from detkit.structures.mask_formats import rle_record
from detkit.utils.errors import ConfigError

TASKS = ("bbox", "segm", "keypoints")
"""What is compared: boxes, masks, keypoints."""

AREA_RANGES: dict[str, tuple[float, float]] = {
    "all": (0.0, 1e5**2),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e5**2),
}
"""Name -> smallest and largest area in square pixels, both included.

Source: COCO, https://cocodataset.org/#detection-eval.
"""
# linspace, as in COCO's tools: np.arange would give 0.6500000000000001 and the like, so an overlap
# of exactly 0.65 would not reach its threshold.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)

_SIGMAS_PER_MILLE = (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
# Divided in two steps, as in COCO's tools, which keeps equal similarities equal: 0.26 / 10 and
# 26 / 1000 differ in the last bit.
COCO_OKS_SIGMAS = tuple(value / 100 / 10 for value in _SIGMAS_PER_MILLE)
"""Spread of COCO's 17 keypoints of a person, nose to ankles.

Source: https://cocodataset.org/#keypoints-eval.
"""


@dataclass(frozen=True)
class CocoProtocol:
    """How detections are scored. The defaults are COCO's."""

    iou_thresholds: tuple[float, ...] = tuple(IOU_THRESHOLDS.tolist())
    """(T,) sufficient overlaps (of keypoints: similarities); AP is the mean over them."""
    named_thresholds: tuple[float, ...] = (0.5, 0.75)
    """Those among them whose AP is also reported separately, such as AP50."""
    area_ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: dict(AREA_RANGES)
    )
    """Name -> smallest and largest area, both included; the first is "all"."""
    max_dets: int = 100
    """Detections per image and class that are scored, best score first."""
    keypoint_max_dets: int = 20
    """As `max_dets`, for keypoints."""
    oks_sigmas: tuple[float, ...] = COCO_OKS_SIGMAS
    """(J,) spread of each keypoint, relative to the size of the object."""

    def max_dets_of(self, task: str) -> int:
        """Return the number of detections per image and class that are scored for a task."""
        return min(self.max_dets, self.keypoint_max_dets) if task == "keypoints" else self.max_dets

    def limits(self, task: str) -> list[int]:
        """Return the (L,) rising limits of detections per image and class to report recall at."""
        most = self.max_dets_of(task)
        if task == "keypoints":
            return [most]
        # COCO's tools sort this list and score by its last entry: [1, 10, 5] would score ten
        # detections where five are asked for.
        return [*(limit for limit in (1, 10) if limit < most), most]

    def area_ranges_of(self, task: str) -> dict[str, tuple[float, float]]:
        """Return the area ranges that a task is scored for."""
        ranges = dict(self.area_ranges)
        # COCO labels no keypoints on small objects.
        if task == "keypoints" and ranges == AREA_RANGES:
            del ranges["small"]
        return ranges


def coco_protocol(
    *,
    iou_thresholds: Sequence[float] = (),
    area_ranges: Sequence[Sequence[str | float]] = (),
    max_dets_per_image: int | None = None,
    keypoint_max_dets_per_image: int | None = None,
    kpt_oks_sigmas: Sequence[float] = (),
) -> CocoProtocol:
    """Return COCO's rules with changes.

    Args:
        iou_thresholds: Rising overlaps in (0, 1], the AP at each of which is reported separately.
            Empty for COCO's.
        area_ranges: [name, smallest, largest] each, in square pixels; "all" is added in front.
            Empty for COCO's.
        max_dets_per_image: None for COCO's 100.
        keypoint_max_dets_per_image: None for COCO's 20.
        kpt_oks_sigmas: Empty for COCO's.

    Raises:
        ConfigError: A value is out of its range.
    """
    thresholds = tuple(float(threshold) for threshold in iou_thresholds)
    in_range = all(0 < threshold <= 1 for threshold in thresholds)
    if not in_range or list(thresholds) != sorted(set(thresholds)):
        raise ConfigError(
            "TEST.IOU_THRESHOLDS (iou_thresholds) must rise and lie in (0, 1], got"
            f" {list(iou_thresholds)}"
        )
    sigmas = tuple(float(sigma) for sigma in kpt_oks_sigmas)
    if not all(0 < sigma < math.inf for sigma in sigmas):
        raise ConfigError(
            "TEST.KEYPOINT_OKS_SIGMAS (kpt_oks_sigmas) must be above 0 and finite, got"
            f" {list(kpt_oks_sigmas)}"
        )
    for name, value in (
        ("max_dets_per_image", max_dets_per_image),
        ("keypoint_max_dets_per_image", keypoint_max_dets_per_image),
    ):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    coco = CocoProtocol()
    return CocoProtocol(
        iou_thresholds=thresholds or coco.iou_thresholds,
        named_thresholds=thresholds or coco.named_thresholds,
        area_ranges=_checked_area_ranges(area_ranges) or coco.area_ranges,
        max_dets=max_dets_per_image or coco.max_dets,
        keypoint_max_dets=keypoint_max_dets_per_image or coco.keypoint_max_dets,
        oks_sigmas=sigmas or coco.oks_sigmas,
    )


def _checked_area_ranges(
    ranges: Sequence[Sequence[str | float]],
) -> dict[str, tuple[float, float]]:
    checked: dict[str, tuple[float, float]] = {}
    for entry in ranges:
        # A string of three letters would unpack into three parts as well.
        name, low, high = entry if len(entry) == 3 and not isinstance(entry, str) else ("", "", "")
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"\w+", name)
            or isinstance(low, str)
            or isinstance(high, str)
            or not 0 <= low < high
        ):
            raise ConfigError(
                "TEST.AREA_RANGES (area_ranges) must have entries [name, smallest, largest] with a"
                " name of letters, digits and underscores and 0 <= smallest < largest in square"
                f" pixels, got {entry!r}"
            )
        if name in checked or name == "all":
            raise ConfigError(
                f"TEST.AREA_RANGES (area_ranges) has the name {name!r} twice; 'all' is always there"
            )
        checked[name] = (float(low), float(high))
    return {"all": AREA_RANGES["all"], **checked} if checked else {}


def area_suffix(name: str) -> str:
    """Return what an area range adds to the name of a metric: s for small, _tiny for tiny."""
    return {"all": "", "small": "s", "medium": "m", "large": "l"}.get(name, f"_{name}")


def instances_to_coco_json(instances: Instances, image_id: int | str) -> list[dict[str, Any]]:
    """Return the detections of one image as COCO result dicts, contiguous class ids as categories.

    Args:
        instances: With `pred_boxes`, `scores`, `pred_classes`, and optionally `pred_masks`
            (R, H, W) and `pred_keypoints` (R, J, 3).
        image_id: Written as `image_id`.

    Example:
        >>> import torch
        >>> from detkit.structures import Boxes, Instances
        >>> instances = Instances(
        ...     (480, 640),
        ...     pred_boxes=Boxes([[10.0, 20.0, 110.0, 70.0]]),
        ...     scores=torch.tensor([0.5]),
        ...     pred_classes=torch.tensor([3]),
        ... )
        >>> instances_to_coco_json(instances, image_id=7)
        [{'image_id': 7, 'category_id': 3, 'bbox': [10.0, 20.0, 100.0, 50.0], 'score': 0.5}]
    """
    rotated = isinstance(instances.pred_boxes, RotatedBoxes)
    fields = ("pred_masks", "pred_keypoints")
    detections = take_instances(image_id, instances, fields, rotated=rotated)
    category_ids = range(int(detections.classes.max(initial=-1)) + 1)
    results = coco_result_dicts([detections], {image_id: 0}, category_ids)
    return [{**result, "image_id": image_id} for result in results]


def coco_result_dicts(
    detections: Iterable[ImageDetections],
    image_ids: Mapping[int | str, int],
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Return detections in the format of COCO's result files, in full precision.

    Args:
        detections: Those of each image.
        image_ids: Image id to write per image id of the detections.
        category_ids: Category id to write per contiguous class id.
    """
    results: list[dict[str, Any]] = []
    for detections_i in detections:
        columns: dict[str, list[Any]] = {"bbox": boxes_xywh(detections_i).tolist()}
        columns["score"] = detections_i.scores.tolist()
        if detections_i.masks is not None:
            columns["segmentation"] = [rle_record(rle) for rle in detections_i.masks]
        if detections_i.keypoints is not None:
            columns["keypoints"] = keypoints_flat(detections_i.keypoints).tolist()
        image_id = image_ids[detections_i.image_id]
        for class_id, *values in zip(detections_i.classes.tolist(), *columns.values(), strict=True):
            ids = {"image_id": image_id, "category_id": category_ids[class_id]}
            results.append(ids | dict(zip(columns, values, strict=True)))
    return results


def detections_from_results(
    results: Iterable[Mapping[str, Any]], image_id: int | str
) -> ImageDetections:
    """Return the detections of COCO result dicts of one image; inverts `instances_to_coco_json`."""
    results = list(results)
    boxes = np.array([result["bbox"] for result in results], dtype=np.float64)
    if boxes.ndim == 1 or boxes.shape[1] == 4:
        boxes = boxes.reshape(-1, 4)
        boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    masks = keypoints = None
    if results and "segmentation" in results[0]:
        masks = [
            {
                **rle,
                "counts": rle["counts"].encode()
                if isinstance(rle["counts"], str)
                else rle["counts"],
            }
            for rle in (result["segmentation"] for result in results)
        ]
    if results and "keypoints" in results[0]:
        flat = np.array([result["keypoints"] for result in results])
        keypoints = flat.reshape(len(flat), -1, 3) + np.array([0.5, 0.5, 0.0])
    return ImageDetections(
        image_id,
        boxes,
        np.array([result["score"] for result in results], dtype=np.float64),
        np.array([result["category_id"] for result in results], dtype=np.int64),
        masks,
        keypoints,
    )


class Predictions(Sequence[dict[str, Any]]):
    """The predictions of all images, in the form in which Detectron2's evaluators pass them on.

    That is a list of dicts with `image_id` and `instances`, a list of COCO result dicts with
    contiguous class ids, or `proposals`. They are made when they are looked at.
    """

    def __init__(
        self, detections: Sequence[ImageDetections], proposals: Sequence[ImageDetections]
    ) -> None:
        """Keep the detections and the proposals, each at most one entry per image."""
        self.detections = detections
        self.proposals = proposals

    def __len__(self) -> int:
        return len(self.detections) + len(self.proposals)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        index = range(len(self))[index]
        if index >= len(self.detections):
            found = self.proposals[index - len(self.detections)]
            return {"image_id": found.image_id, "proposals": found}
        found = self.detections[index]
        category_ids = range(int(found.classes.max(initial=-1)) + 1)
        results = coco_result_dicts([found], {found.image_id: 0}, category_ids)
        instances = [{**result, "image_id": found.image_id} for result in results]
        return {"image_id": found.image_id, "instances": instances}

    @classmethod
    def of(cls, predictions: Sequence[Mapping[str, Any]]) -> "Predictions":
        """Return the predictions of dicts as this class makes them."""
        if isinstance(predictions, Predictions):
            return predictions
        return cls(
            [
                detections_from_results(prediction["instances"], prediction["image_id"])
                for prediction in predictions
                if "instances" in prediction
            ],
            [
                found
                if isinstance(found, ImageDetections)
                else detections_from_proposals(prediction["image_id"], found)
                for prediction in predictions
                if (found := prediction.get("proposals")) is not None
            ],
        )


def keypoints_flat(keypoints: np.ndarray) -> np.ndarray:
    """Return (R, J, 3) keypoints in COCO's layout and pixel coordinates, (R, 3 J) float64."""
    # COCO numbers pixels, where a model's coordinates are continuous: the center of pixel 0 is 0.5.
    flat = keypoints.astype(np.float64) - np.array([0.5, 0.5, 0.0])
    return flat.reshape(len(flat), 3 * keypoints.shape[1])


def boxes_xywh(detections: ImageDetections) -> np.ndarray:
    """Return the float64 boxes of detections: (R, 4) XYWH, or (R, 5) XYWHA of rotated ones."""
    boxes = detections.boxes.astype(np.float64)
    if boxes.shape[1] == 5:
        return boxes
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


@dataclass(frozen=True)
class CocoScores:
    """Precision and recall as COCO accumulates them; -1 where there is no ground truth."""

    precision: np.ndarray
    """(T, P, K, A, L) precision at each recall point."""
    recall: np.ndarray
    """(T, K, A, L) recall reached."""
    limits: list[int]
    """(L,) detections per image and class, rising."""
    iou_thresholds: tuple[float, ...] = CocoProtocol.iou_thresholds
    """(T,)"""
    areas: tuple[str, ...] = tuple(AREA_RANGES)
    """(A,) names of the ranges."""

    def average_precision(
        self,
        iou_threshold: float | None = None,
        area: str = "all",
        class_ids: Sequence[int] | None = None,
    ) -> float:
        """Return AP in [0, 1] at the highest limit; nan without ground truth.

        Args:
            iou_threshold: One of `iou_thresholds`; None averages over them.
            area: One of `areas`.
            class_ids: The classes to average over, as far as they have ground truth; None for all.
        """
        values = self.precision[self._rows(iou_threshold), :, :, self.areas.index(area), -1]
        return _mean_of_valid(values if class_ids is None else values[:, :, list(class_ids)])

    def average_recall(
        self, limit: int | None = None, area: str = "all", iou_threshold: float | None = None
    ) -> float:
        """Return AR in [0, 1]; nan without ground truth.

        Args:
            limit: One of `limits`; None for the highest.
            area: One of `areas`.
            iou_threshold: One of `iou_thresholds`; None averages over them.
        """
        index = -1 if limit is None else self.limits.index(limit)
        rows = self._rows(iou_threshold)
        return _mean_of_valid(self.recall[rows, :, self.areas.index(area), index])

    # As `pycocotools.cocoeval.COCOeval` has them, for evaluators written for Detectron2.

    @property
    def eval(self) -> dict[str, np.ndarray]:
        """`precision` (T, P, K, A, L) and `recall` (T, K, A, L)."""
        return {"precision": self.precision, "recall": self.recall}

    @property
    def params(self) -> SimpleNamespace:
        """`iouThrs`, `recThrs`, `maxDets` and `areaRngLbl`: what the axes stand for."""
        return SimpleNamespace(
            iouThrs=np.array(self.iou_thresholds),
            recThrs=RECALL_POINTS,
            maxDets=self.limits,
            areaRngLbl=list(self.areas),
        )

    @property
    def stats(self) -> np.ndarray:
        """AP, AP50, AP75 and AP by area, then AR by limit and by area, in [0, 1]; -1 if unknown."""
        sizes = self.areas[1:]
        values = [
            *(self.average_precision(threshold) for threshold in (None, 0.5, 0.75)),
            *(self.average_precision(area=area) for area in sizes),
            *(self.average_recall(limit) for limit in self.limits),
            *(self.average_recall(area=area) for area in sizes),
        ]
        return np.nan_to_num(np.array(values), nan=-1.0)

    @classmethod
    def of(cls, coco_eval: Any) -> "CocoScores":
        """Return the scores of an object with the `eval` and `params` of pycocotools."""
        if isinstance(coco_eval, CocoScores):
            return coco_eval
        params = coco_eval.params
        return cls(
            np.asarray(coco_eval.eval["precision"]),
            np.asarray(coco_eval.eval["recall"]),
            list(params.maxDets),
            tuple(np.asarray(params.iouThrs).tolist()),
            tuple(params.areaRngLbl),
        )

    def _rows(self, iou_threshold: float | None) -> slice:
        if iou_threshold is None:
            return slice(None)
        # The nearest: 0.75 computed in another way may differ from linspace's in the last bit.
        index = int(np.abs(np.array(self.iou_thresholds) - iou_threshold).argmin())
        return slice(index, index + 1)


def coco_metrics(
    scores: CocoScores,
    class_names: Sequence[str],
    named_thresholds: Sequence[float] = CocoProtocol.named_thresholds,
) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl and AP-<class> in [0, 100]; nan without ground truth.

    Args:
        scores: Of one task.
        class_names: (K,)
        named_thresholds: Those of its thresholds whose AP is reported separately.
    """
    metrics = {"AP": 100 * scores.average_precision()}
    for threshold in named_thresholds:
        metrics[f"AP{100 * threshold:g}"] = 100 * scores.average_precision(threshold)
    for area in scores.areas[1:]:
        metrics[f"AP{area_suffix(area)}"] = 100 * scores.average_precision(area=area)
    for class_id, name in enumerate(class_names):
        metrics[f"AP-{name}"] = 100 * scores.average_precision(class_ids=[class_id])
    return metrics


def coco_recalls(scores: CocoScores) -> dict[str, float]:
    """Return AR@<limit>, and ARs, ARm, ARl at the highest limit, in [0, 100], or nan."""
    metrics = {f"AR@{limit}": 100 * scores.average_recall(limit) for limit in scores.limits}
    for area in scores.areas[1:]:
        metrics[f"AR{area_suffix(area)}"] = 100 * scores.average_recall(area=area)
    return metrics


def _mean_of_valid(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else math.nan
