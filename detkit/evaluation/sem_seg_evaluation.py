"""Semantic segmentation: intersection over union and accuracy per class and pixel.

Source: Long et al. 2014, "Fully convolutional networks for semantic segmentation", arXiv 1411.4038,
    section 5.

Legend: K classes, S of them predicted in an image, H and W height and width of an image.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.detections import encode_masks, masks_from_arrays, masks_to_arrays
from detkit.evaluation.evaluator import DatasetEvaluator, output_of
from detkit.evaluation.testing import metrics_table, table, write_json
from detkit.structures import ImageRecord, ModelInput, ModelOutput
from detkit.structures.mask_formats import rle_record
from detkit.utils import comm
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.image import read_label_map
from detkit.utils.logger import log_first_n, shown_if_short
from detkit.utils.overriding import is_overridden, overridable

logger = logging.getLogger(__name__)

RESULTS_FILE = "sem_seg_predictions.json"
_DEFAULT_IGNORE_LABEL = 255
_NO_CLASSES = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class _ImagePrediction:
    image_id: int | str
    """The image's file name: data sets of this kind need no other id."""
    classes: np.ndarray
    """(S,) predicted classes for the result file; empty if none is written."""
    masks: list[dict[str, Any]]
    """(S,) their pixels, in COCO's run-length encoding."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        return {"classes": self.classes, **masks_to_arrays(self.masks)} if self.masks else {}

    @classmethod
    def from_arrays(cls, image_id: int | str, arrays: Mapping[str, np.ndarray]) -> _ImagePrediction:
        """Build the prediction from the arrays of `to_arrays`."""
        if not arrays:
            return cls(image_id, _NO_CLASSES, [])
        return cls(image_id, arrays["classes"], masks_from_arrays(arrays))


class SemSegEvaluator(DatasetEvaluator):
    """Scores `sem_seg` outputs by IoU and pixel accuracy.

    A class without pixels in the ground truth is nan and does not count in the means.
    """

    def __init__(
        self,
        dataset_name: str,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        sem_seg_loading_fn: Callable[[str], np.ndarray] = read_label_map,
        num_classes: int | None = None,
        ignore_label: int | None = None,
        records: Sequence[ImageRecord] | None = None,
    ) -> None:
        """List the files of the ground truth; each is read when its image comes.

        Args:
            dataset_name: A registered data set with `sem_seg_file_name` in its records and
                `stuff_classes` in its metadata. Pixels of the metadata's `ignore_label`, by default
                255, do not count.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            output_dir: Where `sem_seg_predictions.json` is written, a mask per class and image.
                None writes nothing.
            sem_seg_loading_fn: Returns the (H, W) contiguous class ids in a file.
            num_classes: Old scripts of Detectron2 pass it: must be that of the data set.
            ignore_label: Likewise; in place of that of the metadata.
            records: What the data set's loader returns, if it has been called already; None calls
                it.

        Raises:
            DataError: The data set has no class names, no ground truth of this kind, or an image
                twice.
            ConfigError: `num_classes` is not that of the data set.
        """
        metadata = MetadataCatalog.get(dataset_name)
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._output_dir = None if output_dir is None else str(output_dir)  # subclasses add to it
        self._read = sem_seg_loading_fn
        # Image file -> file of its ground truth.
        self._truth_files: dict[str, str] = {}
        for record in DatasetCatalog.get(dataset_name) if records is None else records:
            file_name = record["file_name"]
            if "sem_seg_file_name" not in record:
                raise DataError(
                    f"data set {dataset_name!r} has no semantic ground truth for {file_name}: its"
                    f" records need 'sem_seg_file_name', and have {sorted(record)}"
                )
            if file_name in self._truth_files:
                raise DataError(f"data set {dataset_name!r} has the image {file_name} twice")
            self._truth_files[file_name] = record["sem_seg_file_name"]
        self._class_names = list(metadata.get("stuff_classes") or ())
        if not self._class_names:
            raise DataError(
                f"data set {dataset_name!r} has no names of semantic classes: "
                f"set MetadataCatalog.get({dataset_name!r}).stuff_classes = [...]"
            )
        if num_classes is not None or ignore_label is not None:
            log_first_n(
                logging.WARNING,
                "SemSegEvaluator(num_classes, ignore_label) is an old form: the data set has both",
            )
        if num_classes not in (None, len(self._class_names)):
            raise ConfigError(
                f"num_classes is {num_classes}, but data set {dataset_name!r} has"
                f" {len(self._class_names)} semantic classes"
            )
        if ignore_label is None:
            ignore_label = metadata.get("ignore_label", _DEFAULT_IGNORE_LABEL)
        self._ignore_label = ignore_label
        to_contiguous: Mapping[int, int] = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        self._dataset_ids = {
            contiguous: dataset_id for dataset_id, contiguous in to_contiguous.items()
        }
        self._collector = ImageCollector(_ImagePrediction, dataset_name, self._truth_files)
        self.reset()

    def reset(self) -> None:
        """Remove what was processed."""
        self._collector.reset()
        self._own_segments: list[dict[str, Any]] = []
        self._confusion = np.zeros((len(self._class_names) + 1,) * 2, dtype=np.int64)

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Add one batch of outputs with `sem_seg`, (K, H, W) scores.

        Raises:
            ValueError: An image is not in the data set or came before, or an input has no
                `file_name`.
            ConfigError: An output has no `sem_seg`, or another number of classes than the data set.
            DataError: A prediction has another size than its ground truth, or that has a class that
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
            # Before anything is counted: the matrix adds up over images, so that the pixels of an
            # image that is refused could not be taken out again.
            self._collector.check(file_name)
            scores = output_of(output, "sem_seg", "semantic segmentation")
            if scores.ndim != 3 or len(scores) != len(self._class_names):
                raise ConfigError(
                    f"the model gives sem_seg of shape {tuple(scores.shape)} for {file_name}, but"
                    f" data set {self._dataset_name!r} has {len(self._class_names)} semantic"
                    " classes: (classes, height, width) is needed. Is"
                    " MODEL.SEM_SEG_HEAD.NUM_CLASSES right?"
                )
            predicted = scores.argmax(dim=0).cpu()
            self._confusion += self._count_pixels(file_name, predicted)
            is_own = is_overridden(self.encode_json_sem_seg)
            if is_own and self._output_dir is not None:
                labels = predicted.numpy().astype(int)
                self._own_segments += self.encode_json_sem_seg(labels, file_name)
            # Masks are encoded for the result file only; the scores need no more than the counts.
            has_masks = self._output_dir is not None and not is_own
            classes, masks = _masks_of_classes(predicted) if has_masks else (_NO_CLASSES, [])
            self._collector.add(_ImagePrediction(file_name, classes, masks))

    @overridable
    def encode_json_sem_seg(self, sem_seg: Any, input_file_name: str) -> list[dict[str, Any]]:
        """Return the entries of an image in the result file, for its (H, W) predicted classes.

        A subclass may write others.
        """
        return self._entries(input_file_name, *_masks_of_classes(torch.as_tensor(sem_seg)))

    def _count_pixels(self, file_name: str, predicted: Tensor) -> np.ndarray:
        """Count the (K + 1, K + 1) pixels by predicted and true class; the last is ignored."""
        num_classes = len(self._class_names)
        truth_file = self._truth_files[file_name]
        # int64 before the ignored pixels get class K, which may be 256: one more than uint8 holds.
        truth = self._read(truth_file).astype(np.int64)
        if truth.shape != tuple(predicted.shape):
            raise DataError(
                f"the prediction for {file_name} is {tuple(predicted.shape)}, its ground truth"
                f" {truth_file} {truth.shape} (height, width): are 'height' and 'width' in the"
                " inputs of the model?"
            )
        truth[truth == self._ignore_label] = num_classes
        if truth.size and not 0 <= truth.min() <= truth.max() <= num_classes:
            outside = np.unique(truth[(truth < 0) | (truth > num_classes)]).tolist()
            raise DataError(
                f"ground truth {truth_file} has the values {outside[:10]}, which are neither"
                f" classes of data set {self._dataset_name!r} (0 to {num_classes - 1}) nor its"
                f" ignore_label {self._ignore_label}"
            )
        # One number per pair of classes, so that one pass counts all cells of the matrix.
        pairs = predicted.numpy().reshape(-1) * (num_classes + 1) + truth.reshape(-1)
        shape = (num_classes + 1, num_classes + 1)
        return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `sem_seg` with mIoU, fwIoU (weighted by the pixels of each class), IoU-<class>, mACC,
            pACC (over all pixels), ACC-<class>, in [0, 100]. Empty in all processes but the main
            one.
        """
        predictions = self._collector.gather(self._distributed)
        own_segments = self._own_segments
        if self._distributed:
            own_segments = list(itertools.chain(*comm.gather(own_segments)))
        confusion = self._confusion
        # Counts, unlike the collector's items, add up in any order.
        if self._distributed:
            confusion = comm.sum_to_main(torch.from_numpy(confusion)).numpy()
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if predictions is None:
            return results
        consequence = "the scores are those of these images" + ("" if predictions else ", so nan")
        self._collector.warn_if_incomplete(predictions, consequence)
        if self._output_dir is not None:
            segments = own_segments or [
                entry
                for prediction in predictions
                for entry in self._entries(
                    prediction.image_id, prediction.classes, prediction.masks
                )
            ]
            write_json(Path(self._output_dir) / RESULTS_FILE, segments, f"{len(segments)} segments")
        metrics = sem_seg_metrics(confusion, self._class_names)
        per_class = [
            [name, metrics[f"IoU-{name}"], metrics[f"ACC-{name}"]] for name in self._class_names
        ]
        logger.info("semantic segmentation on %s:\n%s", self._dataset_name, metrics_table(metrics))
        logger.info(
            "per class on %s:\n%s",
            self._dataset_name,
            table(per_class, ["class", "IoU", "ACC"], name_columns=[0]),
            extra=shown_if_short(len(self._class_names)),
        )
        results["sem_seg"] = metrics
        return results

    def _entries(
        self, file_name: int | str, classes: np.ndarray, masks: Sequence[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        return [
            {
                "file_name": file_name,
                "category_id": self._dataset_ids.get(class_id, class_id),
                "segmentation": rle_record(rle),
            }
            for class_id, rle in zip(classes.tolist(), masks, strict=True)
        ]


def _masks_of_classes(predicted: Tensor) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the classes of a label map, and the pixels of each in run-length encoding."""
    classes = torch.unique(predicted)
    return classes.numpy(), encode_masks(predicted == classes[:, None, None])


def sem_seg_metrics(confusion: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Compute mIoU, fwIoU, IoU-<class>, mACC, pACC and ACC-<class> in [0, 100].

    Args:
        confusion: (K + 1, K + 1) pixels by predicted class and true class; the last true class is
            ignored.
        class_names: (K,)
    """
    counted = confusion[:-1, :-1].astype(np.float64)
    right, true, predicted = np.diag(counted), counted.sum(axis=0), counted.sum(axis=1)
    has_pixels = true > 0
    with np.errstate(invalid="ignore"):
        accuracy = right / np.where(has_pixels, true, np.nan)
        iou = right / np.where(has_pixels, true + predicted - right, np.nan)
    pixels = true[has_pixels]
    metrics = {"mIoU": _mean(iou[has_pixels]), "fwIoU": _mean(iou[has_pixels], pixels)}
    for name, value in zip(class_names, iou, strict=True):
        metrics[f"IoU-{name}"] = float(value)
    metrics["mACC"] = _mean(accuracy[has_pixels])
    # Weighted by the pixels of each class, the mean is the accuracy over all pixels.
    metrics["pACC"] = _mean(accuracy[has_pixels], pixels)
    for name, value in zip(class_names, accuracy, strict=True):
        metrics[f"ACC-{name}"] = float(value)
    return {name: 100 * value for name, value in metrics.items()}


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    return float(np.average(values, weights=weights)) if values.size else float("nan")


def load_image_into_numpy_array(filename: str, copy: bool = False, dtype: Any = None) -> np.ndarray:
    """Read a label map as an array; `copy` is Detectron2's, the array is always one's own."""
    return read_label_map(filename).astype(dtype, copy=False)
