"""Semantic segmentation: intersection over union and accuracy per class and pixel.

Source: Long et al. 2014, "Fully convolutional networks for semantic segmentation", arXiv 1411.4038,
    section 5.

Legend: K classes, S of them predicted in an image, H and W height and width of an image.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.detections import encode_masks, masks_from_arrays, masks_to_arrays
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.testing import metrics_table
from detkit.structures import ImageRecord, ModelInput, ModelOutput
from detkit.utils import comm
from detkit.utils.image import read_label_map

logger = logging.getLogger(__name__)

RESULTS_FILE = "sem_seg_predictions.json"
_DEFAULT_IGNORE_LABEL = 255
_NO_CLASSES = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _ImagePrediction:
    image_id: int | str
    """The image's file name: data sets of this kind need no other id."""
    classes: np.ndarray
    """(S,) predicted classes for the result file; empty where none is written."""
    masks: list[dict[str, Any]]
    """(S,) their pixels, in COCO's run-length encoding."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        return {"classes": self.classes, **masks_to_arrays(self.masks)} if self.masks else {}

    @classmethod
    def from_arrays(cls, image_id: int | str, arrays: Mapping[str, np.ndarray]) -> _ImagePrediction:
        """Return what `to_arrays` told."""
        return (
            cls(image_id, arrays["classes"], masks_from_arrays(arrays))
            if arrays
            else cls(image_id, _NO_CLASSES, [])
        )


class SemSegEvaluator(DatasetEvaluator):
    """Scores `sem_seg` outputs. A class without pixels in the ground truth is nan, and no mean
    counts it.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[[str], np.ndarray] = read_label_map,
        records: Sequence[ImageRecord] | None = None,
    ) -> None:
        """Look up the ground truth's files; each is read when its image comes.

        Args:
            dataset_name: A registered data set with `sem_seg_file_name` in its records and
                `stuff_classes` in its metadata. Pixels of the metadata's `ignore_label`, else 255,
                do not count.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            output_dir: Gets `sem_seg_predictions.json`, a mask per class and image. None writes
                nothing.
            sem_seg_loading_fn: Gives the (H, W) contiguous class ids in a file.
            records: What the data set's loader gives, where it has been called already; None calls
                it.

        Raises:
            ValueError: The data set has no class names, no ground truth of this kind, or an image
                twice.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._read = sem_seg_loading_fn
        self._truth_files = _truth_files(
            dataset_name, DatasetCatalog.get(dataset_name) if records is None else records
        )
        self._class_names = list(metadata.get("stuff_classes") or ())
        if not self._class_names:
            raise ValueError(
                f"data set {dataset_name!r} has no names of semantic classes: "
                f"set MetadataCatalog.get({dataset_name!r}).stuff_classes = [...]"
            )
        self._ignore_label = metadata.get("ignore_label", _DEFAULT_IGNORE_LABEL)
        to_contiguous: Mapping[int, int] = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_ids = {
            contiguous: dataset_id for dataset_id, contiguous in to_contiguous.items()
        }
        self._collector = ImageCollector(_ImagePrediction, dataset_name, self._truth_files)
        self.reset()

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._collector.reset()
        self._confusion = np.zeros((len(self._class_names) + 1,) * 2, dtype=np.int64)

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Take in one batch of outputs with `sem_seg`, (K, H, W) scores.

        Raises:
            ValueError: An image is not in the data set or came before, an output has no `sem_seg`,
                or another number of classes or size than the ground truth, or that has a class that
                is not in the metadata.
            FileNotFoundError: A file of the ground truth is missing.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            if "file_name" not in model_input:
                raise ValueError(
                    "semantic scores need 'file_name' in every input, got the keys"
                    f" {sorted(model_input)}"
                )
            file_name = model_input["file_name"]
            self._collector.check(file_name)
            predicted = self._predicted_classes(file_name, output)
            self._confusion += self._count_pixels(file_name, predicted)
            classes = _NO_CLASSES if self._output_dir is None else torch.unique(predicted).numpy()
            masks = encode_masks(predicted == torch.from_numpy(classes)[:, None, None])
            self._collector.add(_ImagePrediction(file_name, classes, masks))

    def _predicted_classes(self, file_name: str, output: ModelOutput) -> Tensor:
        if "sem_seg" not in output:
            raise ValueError(
                "semantic scores need 'sem_seg' in the model's outputs, got the keys"
                f" {sorted(output)}"
            )
        scores = output["sem_seg"]
        if scores.ndim != 3 or len(scores) != len(self._class_names):
            raise ValueError(
                f"the model gives sem_seg of shape {tuple(scores.shape)} for {file_name}, but data"
                f" set {self._dataset_name!r} has {len(self._class_names)} semantic classes:"
                " (classes, height, width) is needed. Is MODEL.SEM_SEG_HEAD.NUM_CLASSES right?"
            )
        return scores.argmax(dim=0).cpu()

    def _count_pixels(self, file_name: str, predicted: Tensor) -> np.ndarray:
        """Return (K + 1, K + 1) pixels by predicted class and true class; the last is what is
        ignored.
        """
        num_classes = len(self._class_names)
        truth_file = self._truth_files[file_name]
        truth = self._read(truth_file).astype(np.int64)
        if truth.shape != tuple(predicted.shape):
            raise ValueError(
                f"the prediction for {file_name} is {tuple(predicted.shape)}, its ground truth"
                f" {truth_file} {truth.shape} (height, width): are 'height' and 'width' in the"
                " inputs of the model?"
            )
        truth[truth == self._ignore_label] = num_classes
        if truth.size and not 0 <= truth.min() <= truth.max() <= num_classes:
            outside = np.unique(truth[(truth < 0) | (truth > num_classes)]).tolist()
            raise ValueError(
                f"ground truth {truth_file} has the values {outside[:10]}, which are neither"
                f" classes of data set {self._dataset_name!r} (0 to {num_classes - 1}) nor its"
                f" ignore_label {self._ignore_label}"
            )
        pairs = predicted.numpy().reshape(-1) * (num_classes + 1) + truth.reshape(-1)
        return np.bincount(pairs, minlength=(num_classes + 1) ** 2).reshape(
            num_classes + 1, num_classes + 1
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `sem_seg` with mIoU, fwIoU (weighted by the pixels of each class), IoU-<class>, mACC,
            pACC (over all pixels), ACC-<class>, in [0, 100]. An empty dict in all processes but the
            main one.
        """
        predictions = self._collector.gather(self._distributed)
        confusion = self._confusion
        if self._distributed:
            confusion = comm.sum_to_main(torch.from_numpy(confusion)).numpy()
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if predictions is None:
            return results
        self._report_missing(len(predictions))
        if self._output_dir is not None:
            self._write(predictions)
        metrics = sem_seg_metrics(confusion, self._class_names)
        overall = {name: value for name, value in metrics.items() if "-" not in name}
        logger.info("semantic segmentation on %s:\n%s", self._dataset_name, metrics_table(overall))
        logger.info(
            "per class on %s:\n%s", self._dataset_name, class_table(metrics, self._class_names)
        )
        results["sem_seg"] = metrics
        return results

    def _report_missing(self, num_predicted: int) -> None:
        if num_predicted < len(self._truth_files):
            logger.warning(
                "only %d of the %d images of %s were predicted: the scores are those of these"
                " images%s",
                num_predicted,
                len(self._truth_files),
                self._dataset_name,
                "" if num_predicted else ", so nan",
            )

    def _write(self, predictions: Sequence[_ImagePrediction]) -> None:
        assert self._output_dir is not None
        segments = [
            {
                "file_name": prediction.image_id,
                "category_id": self._dataset_ids.get(class_id, class_id),
                "segmentation": {**rle, "counts": rle["counts"].decode("ascii")},
            }
            for prediction in predictions
            for class_id, rle in zip(prediction.classes.tolist(), prediction.masks, strict=True)
        ]
        self._output_dir.mkdir(parents=True, exist_ok=True)
        (self._output_dir / RESULTS_FILE).write_text(json.dumps(segments), encoding="utf-8")
        logger.info("wrote %d segments to %s", len(segments), self._output_dir / RESULTS_FILE)


def _truth_files(dataset_name: str, records: Sequence[ImageRecord]) -> dict[str, str]:
    """Image file -> file of its ground truth."""
    files: dict[str, str] = {}
    for record in records:
        file_name = record["file_name"]
        if "sem_seg_file_name" not in record:
            raise ValueError(
                f"data set {dataset_name!r} has no semantic ground truth for {file_name}: its"
                f" records need 'sem_seg_file_name', and have {sorted(record)}"
            )
        if file_name in files:
            raise ValueError(f"data set {dataset_name!r} has the image {file_name} twice")
        files[file_name] = record["sem_seg_file_name"]
    return files


def sem_seg_metrics(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Return mIoU, fwIoU, IoU-<class>, mACC, pACC and ACC-<class> in [0, 100].

    Args:
        confusion: (K + 1, K + 1) pixels by predicted class and true class; the last true class is
            what is ignored.
        class_names: (K,)
    """
    counted = confusion[:-1, :-1].astype(np.float64)
    right, true, predicted = np.diag(counted), counted.sum(axis=0), counted.sum(axis=1)
    there = true > 0
    with np.errstate(invalid="ignore"):
        accuracy = right / np.where(there, true, np.nan)
        iou = right / np.where(there, true + predicted - right, np.nan)
    metrics = {"mIoU": _mean(iou[there]), "fwIoU": _mean(iou[there], true[there])}
    metrics |= {f"IoU-{name}": float(value) for name, value in zip(class_names, iou, strict=True)}
    metrics |= {"mACC": _mean(accuracy[there]), "pACC": _mean(accuracy[there], true[there])}
    metrics |= {
        f"ACC-{name}": float(value) for name, value in zip(class_names, accuracy, strict=True)
    }
    return {name: 100 * value for name, value in metrics.items()}


def class_table(metrics: Mapping[str, float], class_names: Sequence[str]) -> str:
    """Return IoU and accuracy of each class as a table."""
    rows = [[name, metrics[f"IoU-{name}"], metrics[f"ACC-{name}"]] for name in class_names]
    headers = ["class", "IoU", "ACC"]
    return tabulate(
        rows,
        headers=headers,
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
        disable_numparse=[0],
    )


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    return float(np.average(values, weights=weights)) if values.size else float("nan")
