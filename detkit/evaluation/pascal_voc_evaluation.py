"""Pascal VOC's average precision, on any registered data set.

Source: the VOC development kit, `VOCevaldet.m` (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/).
Where its rules differ from COCO's:

- A detection belongs to the object that it overlaps most, even if another detection has that
  object already; it is then wrong, and does not fall back on the next object.
- An overlap equal to the threshold is enough, as in COCO.
- Detections of a `difficult` object are neither right nor wrong.

Deviations: boxes and scores are in full precision, where Detectron2 rounds them for the kit's
files. The kit counts pixels, `xmax - xmin + 1`; the reader has turned such boxes into continuous
coordinates (`xmin - 1`), in which the same overlap comes out without the 1. Crowd regions of COCO
data sets are treated as difficult.

Legend: R detections of one class in all images, M objects in one image, K classes, T overlap
    thresholds.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.coco_export import class_names_of, coco_image_ids
from detkit.evaluation.coco.results import IOU_THRESHOLDS
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.detections import (
    ImageDetections,
    detections_from_instances,
    exact_iou,
    explain_scores,
    image_id_of,
)
from detkit.evaluation.evaluator import DatasetEvaluator, output_of
from detkit.evaluation.testing import metrics_table, per_class_table
from detkit.structures import BoxMode, ImageRecord, ModelInput, ModelOutput, as_flag
from detkit.utils.errors import DataError
from detkit.utils.logger import shown_if_short
from detkit.utils.text import distinct_names, printable

logger = logging.getLogger(__name__)

# As the kit and its ports compute them: the fourth is 0.30000000000000004, so a recall of exactly
# 3/10 does not reach it.
_RECALL_POINTS_2007 = np.arange(11) * 0.1


class PascalVOCDetectionEvaluator(DatasetEvaluator):
    """Scores boxes by Pascal VOC's AP.

    A class without ground truth scores nan and does not count in the mean.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        use_07_metric: bool | None = None,
        output_dir: str | None = None,
        distributed: bool = True,
        records: Sequence[ImageRecord] | None = None,
    ) -> None:
        """Load the ground truth.

        Args:
            dataset_name: A registered data set of any format, with an image id and annotations in
                each record.
            use_07_metric: Average the precision at 11 points of recall, as in VOC 2007, instead of
                the area under the curve, as since 2010. None decides by the `year` in the data
                set's metadata.
            output_dir: Where the detections are written in the development kit's format, as
                `voc_results/comp4_det_<split>_<class>.txt`. None writes nothing.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            records: What the data set's loader returns, if it has been called already; None calls
                it.

        Raises:
            ValueError: The data set has no class names, or an image id twice.
            DataError: An object has a class id outside of the classes.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = None if output_dir is None else Path(output_dir) / "voc_results"
        self._use_07_metric = (
            metadata.get("year") == 2007 if use_07_metric is None else use_07_metric
        )
        records = DatasetCatalog.get(dataset_name) if records is None else records
        coco_image_ids(dataset_name, records)  # raises for an id that two images share
        self._class_names = class_names_of(dataset_name)
        self._truth = {
            record["image_id"]: _image_truth(dataset_name, record, len(self._class_names))
            for record in records
        }
        self._split = metadata.get("split") or dataset_name
        self._collector = ImageCollector(ImageDetections, dataset_name, self._truth)

    def reset(self) -> None:
        """Remove what was processed."""
        self._collector.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Add one batch of outputs with `instances`.

        Raises:
            ValueError: An image is not in the data set or came before, or a number is not finite.
            ConfigError: An output has no `instances`, or a class is not in the data set.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            image_id = image_id_of(model_input)
            instances = output_of(output, "instances", "VOC's AP")
            self._collector.add(
                detections_from_instances(
                    image_id, instances, self._dataset_name, self._class_names
                )
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `bbox` with AP (the mean over the thresholds 0.50, 0.55, ..., 0.95), AP50, AP75, and per
            class AP-<class> (likewise a mean) and AP50-<class>, in [0, 100]. nan without ground
            truth; 0, with a warning that says why, with ground truth but without predictions. Empty
            in all processes but the main one.
        """
        detections = self._collector.gather(self._distributed)
        if detections is None:
            return {}
        if self._output_dir is not None:
            write_devkit_files(self._output_dir, self._split, self._class_names, detections)
        num_objects = sum(int((~truth.ignored).sum()) for truth in self._truth.values())
        explain_scores(self._collector, detections, num_objects)
        metrics = self._metrics(self._score(detections))
        kind = "11-point" if self._use_07_metric else "all-point"
        per_class = shown_if_short(len(self._class_names))
        for what, text, shown in (
            ("average precision", metrics_table(metrics), None),
            ("AP per class", per_class_table(metrics, "AP-"), per_class),
            ("AP50 per class", per_class_table(metrics, "AP50-"), per_class),
        ):
            what = f"Pascal VOC {kind} {what}"
            logger.info("%s on %s:\n%s", what, self._dataset_name, text, extra=shown)
        return OrderedDict(bbox=metrics)

    def _score(self, detections: list[ImageDetections]) -> np.ndarray:
        """Return the (K, T) AP in [0, 1]; nan for a class without objects."""
        matches = _match(detections, self._truth)
        # Stable: of equal scores the first image, and in it the first detection, goes first.
        ranked = matches[np.argsort(-matches["score"], kind="stable")]
        num_objects = np.zeros(len(self._class_names), dtype=np.int64)
        for truth in self._truth.values():
            np.add.at(num_objects, truth.classes[~truth.ignored], 1)
        scores = np.full((len(self._class_names), len(IOU_THRESHOLDS)), np.nan)
        for class_id in np.flatnonzero(num_objects):
            of_class = ranked[ranked["class_id"] == class_id]
            for column, threshold in enumerate(IOU_THRESHOLDS):
                recall, precision = _precision_recall(of_class, num_objects[class_id], threshold)
                scores[class_id, column] = voc_average_precision(
                    recall, precision, use_07_metric=self._use_07_metric
                )
        return scores

    def _metrics(self, scores: np.ndarray) -> dict[str, float]:
        # The mean over the classes first: nan rows are left out as a whole.
        known = scores[~np.isnan(scores).any(axis=1)]
        mean = known.mean(axis=0) if len(known) else np.full(scores.shape[1], np.nan)
        threshold_75 = int(np.abs(IOU_THRESHOLDS - 0.75).argmin())
        metrics = {
            "AP": 100 * float(mean.mean()),
            "AP50": 100 * float(mean[0]),
            "AP75": 100 * float(mean[threshold_75]),
        }
        for name, row in zip(self._class_names, scores, strict=True):
            metrics[f"AP-{name}"] = 100 * float(row.mean())
        for name, row in zip(self._class_names, scores, strict=True):
            metrics[f"AP50-{name}"] = 100 * float(row[0])
        return metrics


@dataclass(frozen=True)
class _ImageTruth:
    boxes: np.ndarray
    """(M, 4) float64 XYXY."""
    classes: np.ndarray
    """(M,) int64."""
    ignored: np.ndarray
    """(M,) bool: difficult or crowd."""


# A detection with the object of its class that it overlaps most: -1 and overlap 0 if there is none.
_MATCH = np.dtype(
    [("class_id", int), ("score", float), ("overlap", float), ("object_id", int), ("ignored", bool)]
)


def voc_average_precision(
    recall: np.ndarray, precision: np.ndarray, *, use_07_metric: bool
) -> float:
    """Compute the average precision of one class, in [0, 1].

    Args:
        recall: (R,) after each detection, in falling order of score: not falling.
        precision: (R,) likewise.
        use_07_metric: Average the best precision at recall >= 0, 0.1, ..., 1, instead of the area
            under the curve.

    Example:
        >>> recall, precision = np.array([0.5, 0.5, 1.0]), np.array([1.0, 0.5, 2 / 3])
        >>> round(voc_average_precision(recall, precision, use_07_metric=False), 4)
        0.8333
    """
    if len(recall) == 0:
        return 0.0
    # Precision is made monotonic: the best at this recall or a higher one.
    best_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    if use_07_metric:
        # "left": a recall equal to the point reaches it. Points beyond the last recall get 0.
        first = np.searchsorted(recall, _RECALL_POINTS_2007, side="left")
        return float(np.append(best_from_here, 0.0)[first].mean())
    return float(np.sum(np.diff(recall, prepend=0.0) * best_from_here))


def write_devkit_files(
    folder: Path, split: str, class_names: Sequence[str], detections: Sequence[ImageDetections]
) -> None:
    """Write detections in the format of the VOC development kit, one file per class.

    Args:
        folder: Created if missing.
        split: Part of the files' names, such as "test".
        class_names: Name per contiguous class id.
        detections: Those of each image, in the order to write them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines: list[list[str]] = [[] for _ in class_names]
    for detections_i in detections:
        # The kit counts pixels from 1, and its boxes include their last one.
        boxes = (detections_i.boxes + np.array([1, 1, 0, 0])).tolist()
        for class_id, score, box in zip(
            detections_i.classes.tolist(), detections_i.scores.tolist(), boxes, strict=True
        ):
            lines[class_id].append(" ".join(map(str, [detections_i.image_id, score, *box])) + "\n")
    # A class called "car/truck" would name a folder.
    names = [printable(f"comp4_det_{split}_{name}.txt").replace("/", "_") for name in class_names]
    for file_name, lines_of_class in zip(distinct_names(names), lines, strict=True):
        (folder / file_name).write_text("".join(lines_of_class), encoding="utf-8")
    logger.info("wrote detections in the format of the VOC development kit to %s", folder)


def _image_truth(dataset_name: str, record: ImageRecord, num_classes: int) -> _ImageTruth:
    boxes, classes, ignored = [], [], []
    for annotation in record.get("annotations", ()):
        class_id = annotation["category_id"]
        if not 0 <= class_id < num_classes:
            raise DataError(
                f"data set {dataset_name!r} has {num_classes} class names, but an object of class"
                f" id {class_id} in image {record['image_id']!r} ({record['file_name']})"
            )
        box = list(annotation["bbox"])
        if not np.isfinite(box).all():
            raise DataError(
                f"an object in image {record['image_id']!r} ({record['file_name']}) of data set"
                f" {dataset_name!r} has the box {box}, which is not finite: correct or remove it"
            )
        boxes.append(BoxMode.convert(box, annotation["bbox_mode"], BoxMode.XYXY_ABS))
        classes.append(class_id)
        ignored.append(any(as_flag(annotation.get(key)) for key in ("difficult", "iscrowd")))
    return _ImageTruth(
        np.array(boxes, dtype=np.float64).reshape(-1, 4),
        np.array(classes, dtype=np.int64),
        np.array(ignored, dtype=bool),
    )


def _match(
    detections: Sequence[ImageDetections], truth: Mapping[int | str, _ImageTruth]
) -> np.ndarray:
    """Return the (all detections,) matches, in the order of the detections."""
    parts = [np.zeros(0, dtype=_MATCH)]
    num_objects = 0
    for detections_i in detections:
        truth_i = truth[detections_i.image_id]
        matches = np.zeros(len(detections_i), dtype=_MATCH)
        matches["class_id"] = detections_i.classes
        matches["score"] = detections_i.scores
        matches["object_id"] = -1
        if len(detections_i) and len(truth_i.classes):
            same_class = detections_i.classes[:, None] == truth_i.classes
            overlaps = exact_iou(detections_i.boxes, truth_i.boxes) * same_class
            # The first of equal overlaps, as in the VOC devkit.
            best = overlaps.argmax(axis=1)
            matches["overlap"] = overlaps.max(axis=1)
            # Object ids go on from image to image.
            matches["object_id"] = np.where(matches["overlap"] > 0, num_objects + best, -1)
            matches["ignored"] = truth_i.ignored[best]
        num_objects += len(truth_i.classes)
        parts.append(matches)
    return np.concatenate(parts)


def _precision_recall(
    matches: np.ndarray, num_objects: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return recall and precision (R,) after each detection of one class.

    Args:
        matches: In falling order of score.
        num_objects: Objects of the class that count, at least one.
        threshold: Overlap that is enough.
    """
    on_object = matches["overlap"] >= threshold
    ignored = on_object & matches["ignored"]
    candidates = np.flatnonzero(on_object & ~ignored)
    # The first detection on each object is right, all others of it are wrong.
    _, first = np.unique(matches["object_id"][candidates], return_index=True)
    is_right = np.zeros(len(matches), dtype=bool)
    is_right[candidates[first]] = True
    num_right = np.cumsum(is_right)
    num_counted = np.cumsum(~ignored)
    # maximum: before the first detection that counts, 0 right ones of 0.
    return num_right / num_objects, num_right / np.maximum(num_counted, 1)
