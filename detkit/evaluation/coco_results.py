"""COCO's result dicts, and COCO's scores as numbers and tables.

Legend: R detections in one image, T overlap thresholds, P recall points, K classes, A area ranges,
L detection limits, J keypoints of one object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tabulate import tabulate

from detkit.evaluation.coco_protocol import AREA_RANGES, CocoProtocol, area_suffix
from detkit.evaluation.detections import ImageDetections, take_instances
from detkit.structures import Instances


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


def metrics_table(metrics: Mapping[str, float]) -> str:
    """Return metrics as a table of one row."""
    return tabulate(
        [list(metrics.values())],
        headers=list(metrics),
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
    )


def per_class_table(metrics: Mapping[str, float], prefix: str = "AP-", num_columns: int = 3) -> str:
    """Return the metrics whose name starts with `prefix` as a table, several classes side by side."""
    cells = [
        cell
        for name, value in metrics.items()
        if name.startswith(prefix)
        for cell in (name[len(prefix) :], value)
    ]
    width = min(2 * num_columns, len(cells))
    rows = [cells[start : start + width] for start in range(0, len(cells), max(width, 1))]
    headers = ["class", prefix.rstrip("-")] * (width // 2)
    of_names = list(range(0, width, 2))  # a class may be called 7
    return tabulate(
        rows,
        headers=headers,
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
        disable_numparse=of_names,
    )


def _mean_of_valid(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else float("nan")
