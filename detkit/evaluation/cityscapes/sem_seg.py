"""Cityscapes' intersection over union of classes and categories, also weighted by the size of objects.

Source: Cordts et al. 2016, "The Cityscapes dataset", arXiv 1604.01685, section 3.2, and the rules
of its evaluation scripts (`evalPixelLevelSemanticLabeling.py`), which `tests/evaluation` compares
the numbers with. iIoU counts each pixel of an object by the average size of its class over the size
of the object, so that small objects count as much.

Legend: K evaluated classes, G categories of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_FIRST_INSTANCE_ID = 1000
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
# Pixels, over the training set. Source: as above, `avgClassSize`.
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
    """Pixels of one or more images; counts of several add up."""

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


def count_pixels(
    truth: np.ndarray, instance_ids: np.ndarray, predicted: np.ndarray, labels: Sequence[int]
) -> PixelCounts:
    """Compare one image.

    Args:
        truth: (H, W) label ids, as in `*_gtFine_labelIds.png`.
        instance_ids: (H, W) as in `*_gtFine_instanceIds.png`.
        predicted: (H, W) index of the predicted class in `labels`.
        labels: (K,) label ids of the evaluated classes; pixels of all others are void.
    """
    num_classes = len(labels)
    counts = PixelCounts.zeros(num_classes)
    index_of = np.full(_FIRST_INSTANCE_ID, num_classes)
    index_of[list(labels)] = np.arange(num_classes)
    true = index_of[truth.reshape(-1)]
    counted = true < num_classes
    pairs = true[counted] * num_classes + predicted.reshape(-1)[counted]
    counts.confusion += np.bincount(pairs, minlength=num_classes**2).reshape(
        num_classes, num_classes
    )

    category_of = np.array([_category_of(label) for label in labels])
    ids, inverse = np.unique(instance_ids, return_inverse=True)
    # (objects, K) pixels of each object by predicted class.
    shares = np.bincount(
        inverse.reshape(-1) * num_classes + predicted.reshape(-1), minlength=len(ids) * num_classes
    )
    for instance_id, row in zip(ids.tolist(), shares.reshape(len(ids), num_classes), strict=True):
        label = instance_id // _FIRST_INSTANCE_ID
        if instance_id <= _FIRST_INSTANCE_ID or label not in _AVERAGE_SIZES or label not in labels:
            continue
        index = list(labels).index(label)
        weight = _AVERAGE_SIZES[label] / row.sum()
        counts.found[index] += weight * row[index]
        counts.found_category[index] += weight * row[category_of == category_of[index]].sum()
        counts.total[index] += weight * row.sum()
    return counts


def _category_of(label: int) -> str:
    return next((name for name, labels in CATEGORIES.items() if label in labels), str(label))


def semantic_metrics(
    counts: PixelCounts, labels: Sequence[int], class_names: Sequence[str]
) -> dict[str, float]:
    """Return IoU and iIoU of classes, IoU_sup and iIoU_sup of categories, and IoU-<class>, in [0, 100].

    A class or category without pixels, true or predicted, counts in no mean.

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
    members = {name: np.isin(labels, of) for name, of in CATEGORIES.items()}
    category_iou = [_category_iou(confusion, of) for of in members.values()]
    category_instance_iou = [
        _ratio(
            counts.found_category[of].sum(), counts.total[of].sum() + confusion[~of][:, of].sum()
        )
        for name, of in members.items()
        if name in _CATEGORIES_OF_THINGS
    ]
    metrics = {"IoU": _mean(iou), "iIoU": _mean(instance_iou)}
    metrics |= {"IoU_sup": _mean(category_iou), "iIoU_sup": _mean(category_instance_iou)}
    metrics |= {f"IoU-{name}": float(value) for name, value in zip(class_names, iou, strict=True)}
    return {name: 100 * value for name, value in metrics.items()}


def _category_iou(confusion: np.ndarray, of_category: np.ndarray) -> float:
    right = confusion[of_category][:, of_category].sum()
    return float(
        _ratio(right, confusion[of_category].sum() + confusion[~of_category][:, of_category].sum())
    )


def _ratio(part: np.ndarray | float, whole: np.ndarray | float) -> np.ndarray:
    whole = np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray | Sequence[float] | Sequence[np.ndarray]) -> float:
    valid = np.asarray(values, dtype=np.float64)
    valid = valid[~np.isnan(valid)]
    return float(valid.mean()) if valid.size else float("nan")
