"""Keypoints of objects through the augmentations and into what a model takes.

Legend: M objects in one image, K keypoints of an object.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from detkit.data import transforms as T
from detkit.data.catalog import MetadataCatalog
from detkit.structures import AnnotationRecord, Keypoints

logger = logging.getLogger(__name__)


def keypoints_of(
    annotations: Sequence[AnnotationRecord], num_keypoints: int, file_name: str = "the image"
) -> np.ndarray:
    """Return the keypoints of M annotations, (M, K, 3) float64; those of an object that has none are not labelled.

    Args:
        annotations: Objects of one image.
        num_keypoints: K.
        file_name: Of the image, for messages.

    Raises:
        ValueError: An object has another number of them.
    """
    keypoints = np.zeros((len(annotations), num_keypoints, 3))
    for points, annotation in zip(keypoints, annotations, strict=True):
        values = np.asarray(annotation.get("keypoints", ()), dtype=np.float64).reshape(-1)
        if len(values) == 0:
            continue
        if len(values) != 3 * num_keypoints:
            which = (
                f"annotation {annotation['id']}"
                if "id" in annotation
                else f"the object at {annotation['bbox']}"
            )
            raise ValueError(
                f"{which} of {file_name} has {len(values)} keypoint numbers, but {num_keypoints}"
                f" keypoints (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS) need {3 * num_keypoints}: x, y"
                " and visibility of each"
            )
        points[:] = values.reshape(-1, 3)
    return keypoints


def transform_keypoints(
    keypoints: np.ndarray,
    transforms: T.Transform,
    image_size: tuple[int, int],
    keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
) -> np.ndarray:
    """Return keypoints, (M, K, 3), after the image was transformed.

    Those outside of the new image are no longer labelled, and what is not labelled lies at (0, 0),
    as in COCO. In a mirrored image, a left hand has become a right one.

    Args:
        keypoints: (M, K, 3) x, y, visibility; they are not changed.
        transforms: What was done to the image.
        image_size: `(height, width)` of the transformed image.
        keypoint_hflip_indices: (K,) which keypoint each one is in a mirrored image; see
            `create_keypoint_hflip_indices`.

    Raises:
        ValueError: The image was mirrored, and there are no indices.
    """
    height, width = image_size
    points = transforms.apply_coords(keypoints[..., :2].reshape(-1, 2)).reshape(
        keypoints[..., :2].shape
    )
    is_inside = ((points >= 0) & (points <= (width, height))).all(axis=-1, keepdims=True)
    visibility = keypoints[..., 2:] * is_inside
    moved = np.concatenate([points, visibility], axis=-1) * (visibility > 0)
    if not _is_mirrored(transforms):
        return moved
    if keypoint_hflip_indices is None:
        raise ValueError(
            "the image was mirrored, and it is not known which keypoints that exchanges: give"
            " keypoint_hflip_indices, or set INPUT.RANDOM_FLIP none"
        )
    return moved[..., np.asarray(keypoint_hflip_indices), :]


def _is_mirrored(transforms: T.Transform) -> bool:
    """Whether left and right are exchanged: an odd number of horizontal flips. A vertical one leaves them, as in
    Detectron2.
    """
    return (
        sum(isinstance(transform, T.HFlipTransform) for transform in _flattened(transforms)) % 2
        == 1
    )


def _flattened(transforms: T.Transform) -> Iterable[T.Transform]:
    if not isinstance(transforms, T.TransformList):
        return [transforms]
    return [single for transform in transforms for single in _flattened(transform)]


def as_keypoints(keypoints: np.ndarray) -> Keypoints:
    """Return (M, K, 3) keypoints as a model takes them."""
    return Keypoints(torch.from_numpy(keypoints.astype(np.float32)))


def create_keypoint_hflip_indices(dataset_names: str | Sequence[str]) -> np.ndarray:
    """Return which keypoint each one is in a mirrored image, (K,) int64, from `keypoint_flip_map` of the metadata.

    Args:
        dataset_names: Data sets that are used together; their keypoints must be the same.

    Raises:
        ValueError: A data set has no keypoint names or pairs, they differ, or a pair names an
            unknown keypoint.
    """
    dataset_names = [dataset_names] if isinstance(dataset_names, str) else list(dataset_names)
    if not dataset_names:
        raise ValueError(
            "no data set is named, whose metadata could say what a mirror does to keypoints"
        )
    names = _same_metadata(dataset_names, "keypoint_names")
    pairs = [tuple(pair) for pair in _same_metadata(dataset_names, "keypoint_flip_map")]
    stray = sorted({name for pair in pairs for name in pair} - set(names))
    if stray:
        raise ValueError(
            f"keypoint_flip_map of data set {dataset_names[0]!r} names {', '.join(stray)}, which is"
            f" not among its keypoints: {', '.join(names)}"
        )
    if not pairs and len(names) > 1:
        logger.warning(
            "no keypoints of data set %r change places in a mirror (keypoint_flip_map is empty): is"
            " that so? %s",
            dataset_names[0],
            ", ".join(names),
        )
    mirrored = dict(pairs) | {right: left for left, right in pairs}
    return np.array([names.index(mirrored.get(name, name)) for name in names], dtype=np.int64)


def _same_metadata(dataset_names: Sequence[str], key: str) -> list:
    values = {name: MetadataCatalog.get(name).get(key) for name in dataset_names}
    for name, value in values.items():
        if value is None:
            raise ValueError(
                f"data set {name!r} has no {key}: name `keypoints` in the category of its json"
                f" file, under its entry in DATASETS.REGISTER, or in MetadataCatalog.get({name!r})"
            )
        if list(value) != list(values[dataset_names[0]]):
            raise ValueError(
                f"data sets that are used together need the same {key}: {dataset_names[0]!r} has "
                f"{values[dataset_names[0]]}, {name!r} has {value}"
            )
    return list(values[dataset_names[0]])
