"""COCO's result dicts, and COCO's scores as numbers and tables.

Legend: R detections in one image, T overlap thresholds, P recall points, K classes, A area ranges, L detection limits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from detkit.evaluation.detections import ImageDetections
from detkit.structures import Instances

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
# As COCO writes them: np.arange would give 0.6500000000000001 and the like, and exact ties would turn out otherwise.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALL_POINTS = np.linspace(0.0, 1.0, 101)


def instances_to_coco_json(instances: Instances, image_id: int | str) -> list[dict[str, Any]]:
    """Give the detections in one image as COCO result dicts, with contiguous class ids as category ids.

    Args:
        instances: With ``pred_boxes``, ``scores``, ``pred_classes``.
        image_id: What to write as ``image_id``.
    """
    detections = ImageDetections(
        image_id,
        instances.pred_boxes.tensor.cpu().numpy(),
        instances.scores.cpu().numpy(),
        instances.pred_classes.cpu().numpy(),
    )
    boxes = boxes_xywh(detections).tolist()
    return [
        {"image_id": image_id, "category_id": class_id, "bbox": box, "score": score}
        for class_id, box, score in zip(detections.classes.tolist(), boxes, detections.scores.tolist(), strict=True)
    ]


def coco_result_dicts(
    detections: Iterable[ImageDetections], image_ids: Mapping[int | str, int], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Give detections in the format of COCO's result files, in full precision.

    Args:
        detections: Those of each image.
        image_ids: Image id to write per image id of the detections.
        category_ids: Category id to write per contiguous class id.
    """
    return [
        {
            "image_id": image_ids[detections_i.image_id],
            "category_id": category_ids[class_id],
            "bbox": box,
            "score": score,
        }
        for detections_i in detections
        for class_id, box, score in zip(
            detections_i.classes.tolist(), boxes_xywh(detections_i).tolist(), detections_i.scores.tolist(), strict=True
        )
    ]


def boxes_xywh(detections: ImageDetections) -> np.ndarray:
    """Give the (R, 4) float64 XYWH boxes of detections."""
    boxes = detections.boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def detection_limits(max_dets_per_image: int) -> list[int]:
    """Give the detections per image and class that recall is reported at: 1, 10 and the most that are scored at all.

    COCO's tools sort such a list and take the last: [1, 10, 5] would score ten detections where five are asked for.
    """
    return [*(limit for limit in (1, 10) if limit < max_dets_per_image), max_dets_per_image]


@dataclass(frozen=True)
class CocoScores:
    """What COCO's accumulation gives: -1 where there is no ground truth."""

    precision: np.ndarray
    """(T, P, K, A, L) precision at each recall point."""
    recall: np.ndarray
    """(T, K, A, L) recall reached."""
    limits: list[int]
    """(L,) detections per image and class, rising."""

    def average_precision(
        self, iou_threshold: float | None = None, area: str = "all", class_id: int | None = None
    ) -> float:
        """Give AP in [0, 1] at the highest limit; nan without ground truth.

        Args:
            iou_threshold: One of ``IOU_THRESHOLDS``; None averages over them.
            area: A name in ``AREA_RANGES``.
            class_id: None averages over the classes that have ground truth.
        """
        values = self.precision[_thresholds(iou_threshold), :, :, list(AREA_RANGES).index(area), -1]
        return _mean_of_valid(values if class_id is None else values[:, :, class_id])

    def average_recall(self, limit: int | None = None, area: str = "all") -> float:
        """Give AR in [0, 1]; nan without ground truth.

        Args:
            limit: One of ``limits``; None takes the highest.
            area: A name in ``AREA_RANGES``.
        """
        index = -1 if limit is None else self.limits.index(limit)
        return _mean_of_valid(self.recall[:, :, list(AREA_RANGES).index(area), index])


def coco_metrics(scores: CocoScores, class_names: Sequence[str]) -> dict[str, float]:
    """Give AP, AP50, AP75, APs, APm, APl and AP-<class> in [0, 100]; nan where there is no ground truth."""
    metrics = {
        "AP": scores.average_precision(),
        "AP50": scores.average_precision(iou_threshold=0.5),
        "AP75": scores.average_precision(iou_threshold=0.75),
        "APs": scores.average_precision(area="small"),
        "APm": scores.average_precision(area="medium"),
        "APl": scores.average_precision(area="large"),
    }
    metrics |= {f"AP-{name}": scores.average_precision(class_id=index) for index, name in enumerate(class_names)}
    return {name: 100 * value for name, value in metrics.items()}


def coco_recalls(scores: CocoScores) -> dict[str, float]:
    """Give AR@<limit> for each limit, and ARs, ARm, ARl at the highest, in [0, 100]; nan without ground truth."""
    metrics = {f"AR@{limit}": scores.average_recall(limit) for limit in scores.limits}
    metrics |= {f"AR{AREA_SUFFIXES[area]}": scores.average_recall(area=area) for area in ("small", "medium", "large")}
    return {name: 100 * value for name, value in metrics.items()}


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Give metrics as a table of one row."""
    return tabulate([list(metrics.values())], headers=list(metrics), tablefmt="pipe", floatfmt=".3f", numalign="left")


def per_class_table(metrics: Mapping[str, float], prefix: str = "AP-", num_columns: int = 3) -> str:
    """Give the metrics whose name starts with ``prefix`` as a table, several classes side by side."""
    cells = [
        cell for name, value in metrics.items() if name.startswith(prefix) for cell in (name[len(prefix) :], value)
    ]
    width = min(2 * num_columns, len(cells))
    rows = [cells[start : start + width] for start in range(0, len(cells), max(width, 1))]
    headers = ["class", prefix.rstrip("-")] * (width // 2)
    of_names = list(range(0, width, 2))  # a class may be called 7
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left", disable_numparse=of_names)


def _thresholds(iou_threshold: float | None) -> slice:
    if iou_threshold is None:
        return slice(None)
    index = int(np.abs(IOU_THRESHOLDS - iou_threshold).argmin())
    return slice(index, index + 1)


def _mean_of_valid(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else float("nan")
