"""Cityscapes' intersection over union of classes and categories, also weighted by object size.

Source: Cordts et al. 2016, "The Cityscapes dataset", arXiv 1604.01685, section 3.2, and the rules
of its evaluation scripts (`evalPixelLevelSemanticLabeling.py`), which `tests/evaluation` compares
the numbers with. iIoU weights each pixel of an object by the average size of its class over the
size of the object, so that small objects count as much as large ones.

Legend: K evaluated classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detkit.evaluation.cityscapes.evaluator import FIRST_INSTANCE_ID, CityscapesEvaluator
from detkit.evaluation.evaluator import output_of
from detkit.structures import ModelOutput
from detkit.utils.errors import ConfigError

# Label ids of the evaluated classes. Source: cityscapesscripts/helpers/labels.py.
CATEGORIES: Mapping[str, tuple[int, ...]] = {
    "flat": (7, 8),
    "construction": (11, 12, 13),
    "object": (17, 19, 20),
    "nature": (21, 22),
    "sky": (23,),
    "human": (24, 25),
    "vehicle": (26, 27, 28, 31, 32, 33),
}
_CATEGORIES_OF_THINGS = ("human", "vehicle")
_CATEGORY_OF = {label: name for name, labels in CATEGORIES.items() for label in labels}
# Pixels, over the training set. Source: evalPixelLevelSemanticLabeling.py, `avgClassSize`.
_AVERAGE_SIZES: Mapping[int, float] = {
    24: 3462.4756337644,
    25: 3930.4788056518,
    26: 12794.0202738185,
    27: 27855.1264367816,
    28: 35732.1511111111,
    31: 67583.7075812274,
    32: 6298.7200839748,
    33: 4672.3249222261,
}


@dataclass
class PixelCounts:
    """Pixels of one or more images; the counts of several images add up."""

    confusion: np.ndarray
    """(K, K) pixels by true and predicted class, in the order of the labels."""
    found: np.ndarray
    """(K,) weighted pixels of objects of a class that are predicted as it."""
    found_category: np.ndarray
    """(K,) weighted pixels of objects of a class that are predicted as any of its category."""
    total: np.ndarray
    """(K,) weighted pixels of objects of a class."""

    @classmethod
    def zeros(cls, num_classes: int) -> PixelCounts:
        """Return the counts of no image."""
        return cls(
            np.zeros((num_classes, num_classes), np.int64),
            *(np.zeros(num_classes) for _ in range(3)),
        )

    def __add__(self, other: PixelCounts) -> PixelCounts:
        return PixelCounts(
            self.confusion + other.confusion,
            self.found + other.found,
            self.found_category + other.found_category,
            self.total + other.total,
        )


@dataclass(frozen=True)
class _ImagePixels:
    image_id: str
    counts: PixelCounts

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        return vars(self.counts)

    @classmethod
    def from_arrays(cls, image_id: str, arrays: Mapping[str, np.ndarray]) -> _ImagePixels:
        """Build the counts from the arrays of `to_arrays`."""
        return cls(image_id, PixelCounts(**arrays))


class CityscapesSemSegEvaluator(CityscapesEvaluator):
    """Scores semantic segmentation by Cityscapes' IoU of classes and categories.

    The results have `sem_seg` with IoU, iIoU, IoU_sup, iIoU_sup and IoU-<class>, over the images
    that were predicted.
    """

    task = "sem_seg"
    classes_key = "stuff_classes"
    item_type = _ImagePixels
    scored = "pixels"
    class_prefix = "IoU-"

    def _truth_files(self, frame: str) -> Iterator[tuple[Path, np.ndarray]]:
        yield from super()._truth_files(frame)
        yield self._label_file(frame), self._label_ids(frame)

    def _compare(self, frame: str, output: ModelOutput) -> _ImagePixels:
        scores = output_of(output, "sem_seg", "Cityscapes' IoU")
        truth = self._label_ids(frame)
        expected = (len(self._class_names), *truth.shape)
        if tuple(scores.shape) != expected:
            raise ConfigError(
                f"sem_seg of {frame} must be {expected} (classes, height, width), got"
                f" {tuple(scores.shape)}: are MODEL.SEM_SEG_HEAD.NUM_CLASSES, and 'height' and"
                " 'width' in the inputs, right?"
            )
        predicted = scores.argmax(dim=0).cpu().numpy()
        counts = count_pixels(truth, self._instance_ids(frame), predicted, self._labels)
        return _ImagePixels(frame, counts)

    def _score(self, images: Sequence[_ImagePixels]) -> dict[str, float]:
        self._collector.warn_if_incomplete(images, "the scores are those of these images")
        counts = sum((image.counts for image in images), PixelCounts.zeros(len(self._labels)))
        return semantic_metrics(counts, self._labels, self._class_names)


def count_pixels(
    truth: np.ndarray, instance_ids: np.ndarray, predicted: np.ndarray, labels: Sequence[int]
) -> PixelCounts:
    """Count the pixels of one image by true and predicted class.

    Args:
        truth: (H, W) label ids, as in `*_gtFine_labelIds.png`.
        instance_ids: (H, W) as in `*_gtFine_instanceIds.png`.
        predicted: (H, W) index of the predicted class in `labels`.
        labels: (K,) label ids of the evaluated classes; pixels of all others are void.
    """
    num_classes = len(labels)
    counts = PixelCounts.zeros(num_classes)
    # A table from label id to index; K for void.
    index_of = np.full(FIRST_INSTANCE_ID, num_classes)
    index_of[list(labels)] = np.arange(num_classes)
    true = index_of[truth.reshape(-1)]
    counted = true < num_classes
    # One number per pair of classes, so that one pass counts all cells of the matrix.
    pairs = true[counted] * num_classes + predicted.reshape(-1)[counted]
    confusion = np.bincount(pairs, minlength=num_classes**2)
    counts.confusion += confusion.reshape(num_classes, num_classes)

    category_of = np.array([_CATEGORY_OF.get(label, str(label)) for label in labels])
    ids, inverse = np.unique(instance_ids, return_inverse=True)
    # (objects, K) pixels of each object by predicted class.
    shares = np.bincount(
        inverse.reshape(-1) * num_classes + predicted.reshape(-1), minlength=len(ids) * num_classes
    )
    for instance_id, row in zip(ids.tolist(), shares.reshape(len(ids), num_classes), strict=True):
        # 0, so no label of a thing, for groups and stuff: their ids are labels themselves.
        label = instance_id // FIRST_INSTANCE_ID
        if label not in _AVERAGE_SIZES or label not in labels:
            continue
        index = list(labels).index(label)
        weight = _AVERAGE_SIZES[label] / row.sum()
        counts.found[index] += weight * row[index]
        counts.found_category[index] += weight * row[category_of == category_of[index]].sum()
        counts.total[index] += weight * row.sum()
    return counts


def semantic_metrics(
    counts: PixelCounts, labels: Sequence[int], class_names: Sequence[str]
) -> dict[str, float]:
    """Compute IoU, iIoU, IoU_sup, iIoU_sup and IoU-<class> in [0, 100].

    A class or category without pixels, true or predicted, does not count in the mean.

    Args:
        counts: Over all images.
        labels: (K,) label ids.
        class_names: (K,)
    """
    confusion = counts.confusion
    right, wrong = np.diag(confusion), confusion.sum(axis=0) - np.diag(confusion)
    is_thing = np.array([label in _AVERAGE_SIZES for label in labels], dtype=bool)
    iou = _ratio(right, confusion.sum(axis=1) + wrong)
    instance_iou = _ratio(counts.found, counts.total + wrong)[is_thing]

    category_iou, category_instance_iou = [], []
    for category, members in CATEGORIES.items():
        of = np.isin(labels, members)
        # Confusing two classes of one category is no mistake here.
        right = confusion[of][:, of].sum()
        wrong = confusion[~of][:, of].sum()
        category_iou.append(_ratio(right, confusion[of].sum() + wrong))
        if category in _CATEGORIES_OF_THINGS:
            found, total = counts.found_category[of].sum(), counts.total[of].sum()
            category_instance_iou.append(_ratio(found, total + wrong))

    metrics = {
        "IoU": 100 * _mean(iou),
        "iIoU": 100 * _mean(instance_iou),
        "IoU_sup": 100 * _mean(category_iou),
        "iIoU_sup": 100 * _mean(category_instance_iou),
    }
    for name, value in zip(class_names, iou, strict=True):
        metrics[f"IoU-{name}"] = 100 * float(value)
    return metrics


def _ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    whole = np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray | Sequence[np.ndarray]) -> float:
    valid = np.asarray(values, dtype=np.float64)
    valid = valid[~np.isnan(valid)]
    return float(valid.mean()) if valid.size else float("nan")
