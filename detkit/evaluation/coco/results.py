"""COCO's rules, its result dicts, and its scores as numbers.

Legend: R detections in one image, T overlap thresholds, P recall points, K classes, A area ranges,
L detection limits, J keypoints of one object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from detkit.evaluation.detections import ImageDetections, take_instances
from detkit.structures import Instances

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
AREA_SUFFIXES = {"all": "", "small": "s", "medium": "m", "large": "l"}
# As COCO writes them: np.arange would give 0.6500000000000001 and the like, and exact ties would
# turn out otherwise.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)

_SIGMAS_PER_MILLE = (26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89)
# Divided as COCO's tools divide them, so that equal similarities stay equal.
COCO_OKS_SIGMAS = tuple(value / 100 / 10 for value in _SIGMAS_PER_MILLE)
"""Spread of COCO's 17 keypoints of a person, nose to ankles. Source:
https://cocodataset.org/#keypoints-eval.
"""

_COCO_NAMED_THRESHOLDS = (0.5, 0.75)
_COCO_MAX_DETS = 100
_COCO_KEYPOINT_MAX_DETS = 20


@dataclass(frozen=True)
class CocoProtocol:
    """How detections are scored. The defaults are COCO's."""

    iou_thresholds: tuple[float, ...] = tuple(IOU_THRESHOLDS.tolist())
    """(T,) overlaps (of keypoints: similarities) that are enough; AP is the mean over them."""
    named_thresholds: tuple[float, ...] = _COCO_NAMED_THRESHOLDS
    """Those among them whose AP is given by itself, such as AP50."""
    area_ranges: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: dict(AREA_RANGES)
    )
    """Name -> smallest and largest area, both included; the first is "all"."""
    max_dets: int = _COCO_MAX_DETS
    """The best so many detections per image and class are scored."""
    keypoint_max_dets: int = _COCO_KEYPOINT_MAX_DETS
    """Likewise, for keypoints."""
    oks_sigmas: tuple[float, ...] = COCO_OKS_SIGMAS
    """(J,) spread of each keypoint, relative to the size of the object."""

    def max_dets_of(self, task: str) -> int:
        """Return the detections per image and class that are scored for a task."""
        return min(self.max_dets, self.keypoint_max_dets) if task == "keypoints" else self.max_dets

    def limits(self, task: str) -> list[int]:
        """Return the detections per image and class that recall is reported at, the highest last
        (L,).
        """
        most = self.max_dets_of(task)
        return [most] if task == "keypoints" else detection_limits(most)

    def area_ranges_of(self, task: str) -> dict[str, tuple[float, float]]:
        """Return the ranges of area that a task is scored for. COCO labels no keypoints on small
        objects.
        """
        ranges = dict(self.area_ranges)
        if task == "keypoints" and ranges == AREA_RANGES:
            del ranges["small"]
        return ranges


def detection_limits(max_dets_per_image: int) -> list[int]:
    """Return the detections per image and class that recall is reported at: 1, 10 and the most that are scored at all.

    COCO's tools sort such a list and take the last: [1, 10, 5] would score ten detections where
    five are asked for.
    """
    return [*(limit for limit in (1, 10) if limit < max_dets_per_image), max_dets_per_image]


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
        iou_thresholds: Overlaps in (0, 1], rising; the AP at each is then given by itself. Empty
            takes COCO's.
        area_ranges: [name, smallest, largest] each, in square pixels; "all" comes on top. Empty
            takes COCO's.
        max_dets_per_image: None takes COCO's 100.
        keypoint_max_dets_per_image: None takes COCO's 20.
        kpt_oks_sigmas: Empty takes COCO's.

    Raises:
        ValueError: A value is out of its range; the message names its key.
    """
    thresholds = _checked_thresholds(iou_thresholds)
    return CocoProtocol(
        iou_thresholds=thresholds or CocoProtocol.iou_thresholds,
        named_thresholds=thresholds or _COCO_NAMED_THRESHOLDS,
        area_ranges=_checked_ranges(area_ranges) or dict(AREA_RANGES),
        max_dets=_at_least_one("max_dets_per_image", max_dets_per_image, _COCO_MAX_DETS),
        keypoint_max_dets=_at_least_one(
            "keypoint_max_dets_per_image", keypoint_max_dets_per_image, _COCO_KEYPOINT_MAX_DETS
        ),
        oks_sigmas=_checked_sigmas(kpt_oks_sigmas) or COCO_OKS_SIGMAS,
    )


def area_suffix(name: str) -> str:
    """Return what a range of area adds to the name of a metric: s for small, _tiny for tiny."""
    return AREA_SUFFIXES.get(name, f"_{name}")


def _at_least_one(name: str, value: int | None, default: int) -> int:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return default if value is None else value


def _checked_thresholds(thresholds: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(threshold) for threshold in thresholds)
    if any(not 0 < value <= 1 for value in values) or any(a >= b for a, b in pairwise(values)):
        raise ValueError(
            "TEST.IOU_THRESHOLDS (iou_thresholds) must rise and lie in (0, 1], got"
            f" {list(thresholds)}"
        )
    return values


def _checked_ranges(ranges: Sequence[Sequence[str | float]]) -> dict[str, tuple[float, float]]:
    checked: dict[str, tuple[float, float]] = {}
    for entry in ranges:
        name, low, high = _range_entry(entry)
        if name in checked or name == "all":
            raise ValueError(
                f"TEST.AREA_RANGES (area_ranges) has the name {name!r} twice; 'all' is always there"
            )
        checked[name] = (low, high)
    return {"all": AREA_RANGES["all"], **checked} if checked else {}


def _range_entry(entry: Sequence[str | float]) -> tuple[str, float, float]:
    problem = (
        "TEST.AREA_RANGES (area_ranges) takes [name, smallest, largest] with a name of letters,"
        f" digits and underscores and 0 <= smallest < largest in square pixels, got {entry!r}"
    )
    if isinstance(entry, str) or len(entry) != 3:
        raise ValueError(problem)
    name, low, high = entry
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise ValueError(problem)
    if isinstance(low, str) or isinstance(high, str) or not 0 <= low < high:
        raise ValueError(problem)
    return name, float(low), float(high)


def _checked_sigmas(sigmas: Sequence[float]) -> tuple[float, ...]:
    values = tuple(float(sigma) for sigma in sigmas)
    if any(not 0 < value < float("inf") for value in values):
        raise ValueError(
            f"TEST.KEYPOINT_OKS_SIGMAS (kpt_oks_sigmas) must be above 0, got {list(sigmas)}"
        )
    return values


def instances_to_coco_json(instances: Instances, image_id: int | str) -> list[dict[str, Any]]:
    """Return the detections in one image as COCO result dicts, with contiguous class ids as category ids.

    Args:
        instances: With `pred_boxes`, `scores`, `pred_classes`; `pred_masks` (R, H, W) and
            `pred_keypoints` (R, J, 3) come along where they are there.
        image_id: What to write as `image_id`.
    """
    detections = take_instances(image_id, instances, ("pred_masks", "pred_keypoints"))
    category_ids = range(int(detections.classes.max(initial=-1)) + 1)
    return [
        {**result, "image_id": image_id}
        for result in coco_result_dicts([detections], {image_id: 0}, category_ids)
    ]


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
            columns["segmentation"] = [
                {**rle, "counts": rle["counts"].decode("ascii")} for rle in detections_i.masks
            ]
        if detections_i.keypoints is not None:
            columns["keypoints"] = keypoints_flat(detections_i.keypoints).tolist()
        image_id = image_ids[detections_i.image_id]
        for class_id, *values in zip(detections_i.classes.tolist(), *columns.values(), strict=True):
            ids = {"image_id": image_id, "category_id": category_ids[class_id]}
            results.append(ids | dict(zip(columns, values, strict=True)))
    return results


def keypoints_flat(keypoints: np.ndarray) -> np.ndarray:
    """Return (R, J, 3) keypoints as COCO writes them, (R, 3 J) float64.

    COCO numbers pixels, where a model's coordinates are continuous: its pixel 0 is the one whose
    middle is 0.5.
    """
    flat = keypoints.astype(np.float64) - np.array([0.5, 0.5, 0.0])
    return flat.reshape(len(flat), 3 * keypoints.shape[1])


def boxes_xywh(detections: ImageDetections) -> np.ndarray:
    """Return the (R, 4) float64 XYWH boxes of detections."""
    boxes = detections.boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


@dataclass(frozen=True)
class CocoScores:
    """What COCO's accumulation gives: -1 where there is no ground truth."""

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
        class_id: int | None = None,
        *,
        class_ids: Sequence[int] | None = None,
    ) -> float:
        """Return AP in [0, 1] at the highest limit; nan without ground truth.

        Args:
            iou_threshold: One of `iou_thresholds`; None averages over them.
            area: One of `areas`.
            class_id: None averages over the classes that have ground truth.
            class_ids: Average over these classes only.
        """
        values = self.precision[self._thresholds(iou_threshold), :, :, self.areas.index(area), -1]
        if class_ids is not None:
            values = values[:, :, list(class_ids)]
        return _mean_of_valid(values if class_id is None else values[:, :, class_id])

    def average_recall(
        self, limit: int | None = None, area: str = "all", iou_threshold: float | None = None
    ) -> float:
        """Return AR in [0, 1]; nan without ground truth.

        Args:
            limit: One of `limits`; None takes the highest.
            area: One of `areas`.
            iou_threshold: One of `iou_thresholds`; None averages over them.
        """
        index = -1 if limit is None else self.limits.index(limit)
        return _mean_of_valid(
            self.recall[self._thresholds(iou_threshold), :, self.areas.index(area), index]
        )

    def _thresholds(self, iou_threshold: float | None) -> slice:
        if iou_threshold is None:
            return slice(None)
        index = int(np.abs(np.array(self.iou_thresholds) - iou_threshold).argmin())
        return slice(index, index + 1)


def coco_metrics(
    scores: CocoScores,
    class_names: Sequence[str],
    named_thresholds: Sequence[float] = CocoProtocol.named_thresholds,
) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl and AP-<class> in [0, 100]; nan where there is no ground truth.

    Args:
        scores: Of one task.
        class_names: (K,)
        named_thresholds: Those of its thresholds whose AP is given by itself.
    """
    metrics = {"AP": scores.average_precision()}
    metrics |= {
        f"AP{100 * t:g}": scores.average_precision(iou_threshold=t) for t in named_thresholds
    }
    metrics |= {
        f"AP{area_suffix(area)}": scores.average_precision(area=area) for area in scores.areas[1:]
    }
    metrics |= {
        f"AP-{name}": scores.average_precision(class_id=index)
        for index, name in enumerate(class_names)
    }
    return {name: 100 * value for name, value in metrics.items()}


def coco_recalls(scores: CocoScores) -> dict[str, float]:
    """Return AR@<limit> for each limit, and ARs, ARm, ARl at the highest, in [0, 100]; nan without
    ground truth.
    """
    metrics = {f"AR@{limit}": scores.average_recall(limit) for limit in scores.limits}
    metrics |= {
        f"AR{area_suffix(area)}": scores.average_recall(area=area) for area in scores.areas[1:]
    }
    return {name: 100 * value for name, value in metrics.items()}


def _mean_of_valid(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else float("nan")
