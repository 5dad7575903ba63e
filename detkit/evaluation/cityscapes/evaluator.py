"""Cityscapes' scores of instances and of pixels, from the ground truth's pngs.

The package `cityscapesscripts` is not used: it asks NumPy for `np.in1d`, which is gone since 2.4,
ends the process where a file is missing, and writes into the current folder.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from detkit.data.catalog import MetadataCatalog
from detkit.data.datasets.builtin_meta import CITYSCAPES_LABELS
from detkit.evaluation.cityscapes.instance import (
    OVERLAPS,
    ClassRegions,
    average_precisions,
    compare_image,
)
from detkit.evaluation.cityscapes.sem_seg import PixelCounts, count_pixels, semantic_metrics
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.testing import metrics_table, per_class_table
from detkit.structures import Instances, ModelInput, ModelOutput
from detkit.utils.image import read_label_map
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

_LABEL_IDS = {label.name: label.id for label in CITYSCAPES_LABELS}
_INSTANCE_FILES = "_gtFine_instanceIds.png"
_LABEL_FILES = "_gtFine_labelIds.png"
# All label ids that the pngs may hold; what is not evaluated among them is void.
_NUM_LABELS = 34


@dataclass(frozen=True)
class _ImageRegions:
    image_id: str
    regions: list[ClassRegions]
    """(K,)"""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        names = [field.name for field in dataclasses.fields(ClassRegions)]
        arrays = {
            name: np.concatenate([getattr(r, name).reshape(-1) for r in self.regions])
            for name in names
        }
        return {"sizes": np.array([r.shared.shape for r in self.regions]), **arrays}

    @classmethod
    def from_arrays(cls, image_id: str, arrays: Mapping[str, np.ndarray]) -> _ImageRegions:
        """Return what `to_arrays` told."""
        num_predicted, num_true = arrays["sizes"].T
        ends = {"shared": num_predicted * num_true, "true_areas": num_true, "is_group": num_true}
        parts = {
            name: np.split(array, np.cumsum(ends.get(name, num_predicted))[:-1])
            for name, array in arrays.items()
            if name != "sizes"
        }
        regions = [
            ClassRegions(
                **{n: p[k].reshape(size) if n == "shared" else p[k] for n, p in parts.items()}
            )
            for k, size in enumerate(arrays["sizes"].tolist())
        ]
        return cls(image_id, regions)


@dataclass(frozen=True)
class _ImagePixels:
    image_id: str
    counts: PixelCounts

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        return vars(self.counts)

    @classmethod
    def from_arrays(cls, image_id: str, arrays: Mapping[str, np.ndarray]) -> _ImagePixels:
        """Return what `to_arrays` told."""
        return cls(image_id, PixelCounts(**arrays))


class _CityscapesFiles:
    """The pngs of a data set's ground truth: `gt_dir/CITY/CITY_SEQUENCE_FRAME_gtFine_*.png`."""

    def __init__(self, dataset_name: str, max_image_pixels: int) -> None:
        self._max_image_pixels = max_image_pixels
        folder = MetadataCatalog.get(dataset_name).get("gt_dir")
        if folder is None:
            raise ValueError(
                "Cityscapes' scores need the folder of the ground truth of data set"
                f" {dataset_name!r}: set MetadataCatalog.get({dataset_name!r}).gt_dir"
            )
        files = sorted(Path(folder).glob(f"*/*{_INSTANCE_FILES}"))
        if not files:
            raise ValueError(
                f"no ground truth of data set {dataset_name!r}: {folder} has no"
                f" CITY/*{_INSTANCE_FILES}"
            )
        self.frames = {path.name.removesuffix(_INSTANCE_FILES): path for path in files}
        """CITY_SEQUENCE_FRAME -> png of instances."""

    def frame_of(self, model_input: ModelInput) -> str:
        """Return the frame of an image, from its file name."""
        if "file_name" not in model_input:
            raise ValueError(
                "Cityscapes' scores need 'file_name' in every input, got the keys"
                f" {sorted(model_input)}"
            )
        return Path(model_input["file_name"]).stem.removesuffix("_leftImg8bit")

    def instance_ids(self, frame: str) -> np.ndarray:
        """Return (H, W) ids of instances."""
        return read_label_map(str(self.frames[frame]), max_pixels=self._max_image_pixels)

    def label_ids(self, frame: str) -> np.ndarray:
        """Return (H, W) ids of labels."""
        path = self.frames[frame]
        return read_label_map(
            str(path.with_name(frame + _LABEL_FILES)), max_pixels=self._max_image_pixels
        )


class CityscapesInstanceEvaluator(DatasetEvaluator):
    """Scores instance masks by Cityscapes' AP. A class without objects is nan, and the mean does
    not count it.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """List the ground truth's files; each is read when its image comes.

        Args:
            dataset_name: A registered data set with `gt_dir` and `thing_classes` in its metadata.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            max_image_pixels: As `max_pixels` in `read_label_map`, of the pngs.

        Raises:
            ValueError: There is no ground truth, or a class is none of Cityscapes'.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._files = _CityscapesFiles(dataset_name, max_image_pixels)
        self._class_names = list(MetadataCatalog.get(dataset_name).get("thing_classes") or ())
        self._labels = _label_ids(self._class_names, dataset_name, "thing_classes")
        self._void = sorted(set(range(_NUM_LABELS)) - set(_LABEL_IDS.values()))
        self._collector = ImageCollector(_ImageRegions, dataset_name, self._files.frames)

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._collector.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Take in one batch of outputs with `instances`.

        Raises:
            ValueError: An image is not in the data set or came before, an output has no instances
                or these no masks of the image's size, or a predicted class is not in the data set.
            FileNotFoundError: A file of the ground truth is missing.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            frame = self._files.frame_of(model_input)
            self._collector.check(frame)
            if "instances" not in output:
                raise ValueError(
                    "Cityscapes' AP needs 'instances' in the outputs, got the keys"
                    f" {sorted(output)}"
                )
            self._collector.add(_ImageRegions(frame, self._compare(frame, output["instances"])))

    def _compare(self, frame: str, instances: Instances) -> list[ClassRegions]:
        truth = self._files.instance_ids(frame)
        classes, masks = (
            instances.pred_classes.cpu().numpy(),
            np.zeros((0, *truth.shape), dtype=bool),
        )
        if len(instances):
            if not instances.has("pred_masks"):
                raise ValueError(
                    f"Cityscapes' AP needs 'pred_masks' in the instances of {frame}, which have"
                    f" only {sorted(instances.get_fields())}: was the model built with"
                    " MODEL.MASK_ON?"
                )
            masks = _masks_of(frame, instances.pred_masks, truth.shape)
            if not 0 <= classes.min() <= classes.max() < len(self._class_names):
                raise ValueError(
                    f"the model predicted the class ids {np.unique(classes).tolist()} in {frame},"
                    f" but data set {self._dataset_name!r} has {len(self._class_names)} classes."
                    " Set MODEL.ROI_HEADS.NUM_CLASSES"
                )
        labels = np.array(self._labels)[classes]
        scores = instances.scores.float().cpu().numpy()
        return compare_image(truth, masks, labels, scores, self._labels, self._void)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `segm` with AP (over the thresholds 0.50, 0.55, ..., 0.95), AP50 and AP-<class>, in [0,
            100]; objects in images that were not predicted count as missed. An empty dict in all
            processes but the main one.
        """
        images = self._collector.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if images is None:
            return results
        regions = [image.regions for image in images]
        regions += [
            self._nothing(frame) for frame in self._missing({image.image_id for image in images})
        ]
        per_class = [average_precisions(of_class) for of_class in zip(*regions, strict=True)]
        precisions = np.array(per_class).reshape(-1, len(OVERLAPS))
        known = precisions[~np.isnan(precisions).any(axis=1)]
        metrics = {"AP": _mean(known), "AP50": _mean(known[:, 0])}
        metrics |= {
            f"AP-{name}": float(row.mean())
            for name, row in zip(self._class_names, precisions, strict=True)
        }
        results["segm"] = {name: 100 * value for name, value in metrics.items()}
        _log("instances", self._dataset_name, results["segm"], "AP-")
        if images and not any(len(r.scores) for image in regions for r in image):
            logger.warning("AP is 0 on %s: nothing was detected in any image", self._dataset_name)
        return results

    def _missing(self, predicted: set[str]) -> list[str]:
        missing = [frame for frame in self._files.frames if frame not in predicted]
        if missing:
            logger.warning(
                "only %d of the %d images of %s were predicted: the objects in the others count as"
                " missed",
                len(predicted),
                len(self._files.frames),
                self._dataset_name,
            )
        return missing

    def _nothing(self, frame: str) -> list[ClassRegions]:
        truth, none = self._files.instance_ids(frame), np.zeros(0, dtype=np.int64)
        return compare_image(
            truth, np.zeros((0, *truth.shape), dtype=bool), none, none, self._labels, self._void
        )


class CityscapesSemSegEvaluator(DatasetEvaluator):
    """Scores `sem_seg` outputs by Cityscapes' IoU of classes and categories, also weighted by the
    size of objects.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """List the ground truth's files; each is read when its image comes.

        Args:
            dataset_name: A registered data set with `gt_dir` and `stuff_classes` in its metadata.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            max_image_pixels: As `max_pixels` in `read_label_map`, of the pngs.

        Raises:
            ValueError: There is no ground truth, or a class is none of Cityscapes'.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._files = _CityscapesFiles(dataset_name, max_image_pixels)
        self._class_names = list(MetadataCatalog.get(dataset_name).get("stuff_classes") or ())
        self._labels = _label_ids(self._class_names, dataset_name, "stuff_classes")
        self._collector = ImageCollector(_ImagePixels, dataset_name, self._files.frames)

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._collector.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Take in one batch of outputs with `sem_seg`, (classes, height, width) scores.

        Raises:
            ValueError: An image is not in the data set or came before, or an output has no
                `sem_seg`, or one of another shape.
            FileNotFoundError: A file of the ground truth is missing.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            frame = self._files.frame_of(model_input)
            self._collector.check(frame)
            if "sem_seg" not in output:
                raise ValueError(
                    f"Cityscapes' IoU needs 'sem_seg' in the outputs, got the keys {sorted(output)}"
                )
            truth, scores = self._files.label_ids(frame), output["sem_seg"]
            expected = (len(self._class_names), *truth.shape)
            if tuple(scores.shape) != expected:
                raise ValueError(
                    f"sem_seg of {frame} must be {expected} (classes, height, width), got"
                    f" {tuple(scores.shape)}: are MODEL.SEM_SEG_HEAD.NUM_CLASSES, and 'height' and"
                    " 'width' in the inputs, right?"
                )
            predicted = scores.argmax(dim=0).cpu().numpy()
            counts = count_pixels(truth, self._files.instance_ids(frame), predicted, self._labels)
            self._collector.add(_ImagePixels(frame, counts))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `sem_seg` with IoU, iIoU, IoU_sup, iIoU_sup and IoU-<class>, in [0, 100], over the
            images that were predicted. An empty dict in all processes but the main one.
        """
        images = self._collector.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if images is None:
            return results
        if len(images) < len(self._files.frames):
            logger.warning(
                "only %d of the %d images of %s were predicted: the scores are those of these"
                " images",
                len(images),
                len(self._files.frames),
                self._dataset_name,
            )
        counts = sum((image.counts for image in images), PixelCounts.zeros(len(self._class_names)))
        results["sem_seg"] = semantic_metrics(counts, self._labels, self._class_names)
        _log("pixels", self._dataset_name, results["sem_seg"], "IoU-")
        return results


def _label_ids(class_names: Sequence[str], dataset_name: str, key: str) -> list[int]:
    if not class_names:
        raise ValueError(
            f"data set {dataset_name!r} has no {key}: set"
            f" MetadataCatalog.get({dataset_name!r}).{key} = [...]"
        )
    for name in class_names:
        if name not in _LABEL_IDS:
            raise ValueError(
                f"{key} of data set {dataset_name!r} has {name!r}, which is no evaluated class of"
                f" Cityscapes.{did_you_mean(name, _LABEL_IDS)}"
            )
    return [_LABEL_IDS[name] for name in class_names]


def _masks_of(frame: str, masks: Tensor, image_size: tuple[int, ...]) -> np.ndarray:
    masks = getattr(masks, "tensor", masks)
    if tuple(masks.shape[1:]) != tuple(image_size):
        raise ValueError(
            f"masks of {frame} must have the size of the ground truth, {tuple(image_size)} (height,"
            f" width), got {tuple(masks.shape[1:])}: are 'height' and 'width' in the inputs of the"
            " model?"
        )
    return masks.cpu().numpy().astype(bool)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _log(what: str, dataset_name: str, metrics: dict[str, float], prefix: str) -> None:
    overall = {name: value for name, value in metrics.items() if "-" not in name}
    logger.info("Cityscapes' scores of %s on %s:\n%s", what, dataset_name, metrics_table(overall))
    logger.info("per class on %s:\n%s", dataset_name, per_class_table(metrics, prefix))
