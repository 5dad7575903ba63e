"""The dicts that travel between packages, with their keys and the types of their values.

A record describes one image of a data set on disk, a model input is one image ready for a model, a
model output its predictions for one image. A class whose name starts with an underscore holds the
required keys of the class that follows it.

Legend: C channels, H and W height and width, K classes.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict

import numpy as np
from torch import Tensor

from detkit.structures.box_mode import BoxMode
from detkit.structures.instances import Instances
from detkit.structures.mask_formats import RLERecord
from detkit.utils.errors import DataError


class _AnnotationKeys(TypedDict):
    bbox: list[float]
    bbox_mode: BoxMode
    category_id: int


class AnnotationRecord(_AnnotationKeys, total=False):
    """One object of an image."""

    id: int
    """The annotation's number in its file: error messages name it."""
    iscrowd: int
    """1 for a group of objects in one annotation: not trained on, ignored by COCO evaluation.

    Read it, and the other flags, by `as_flag`.
    """
    difficult: int
    """1 for an object that Pascal VOC evaluation ignores."""
    segmentation: list[list[float]] | RLERecord | np.ndarray
    """Polygons, each `[x0, y0, x1, y1, ...]` in pixels; run-length encoding; or (H, W) bool."""
    keypoints: list[float]
    """`[x, y, visibility, ...]`; visibility 0 not labelled, 1 labelled and hidden, 2 visible.

    x and y are continuous: the middle of the first pixel is (0.5, 0.5). COCO's files number pixels
    instead; reader and export convert.
    """
    area: float
    """Area in square pixels as the data set gives it: COCO's small, medium and large go by it."""


_FLAGS = {0: 0, 1: 1, None: 0, "": 0, "0": 0, "false": 0, "no": 0, "1": 1, "true": 1, "yes": 1}


def as_flag(value: Any) -> int:
    """Return 1 or 0 for a flag such as `iscrowd`, in any form that annotation tools write it in.

    Readers, filters, mapper, export and evaluators all ask here: a text "0" that is true for one of
    them and false for another silently takes objects out of training or of the score.

    Args:
        value: A boolean, a number (all but 0 mean 1), or text of one, yes or no, true or false.
            None, NaN and empty text mean 0, as does a missing flag.

    Raises:
        DataError: The value is none of these.

    Example:
        >>> [as_flag(value) for value in (None, "0", 0.0, False, "1", True)]
        [0, 0, 0, 0, 1, 1]
    """
    try:
        return _FLAGS[value]  # numbers and booleans that are equal have equal hashes
    except (KeyError, TypeError):
        pass
    if isinstance(value, str):
        text = value.strip().lower()
        if text in _FLAGS:
            return _FLAGS[text]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if math.isinf(number):
        raise DataError(f"a flag is 0 or 1, got {repr(value)[:80]}")
    return int(number == number and number != 0)


class _SegmentKeys(TypedDict):
    id: int
    category_id: int


class SegmentRecord(_SegmentKeys, total=False):
    """One segment of a panoptic png, whose pixels hold `id`."""

    isthing: bool
    iscrowd: int
    area: int
    bbox: list[float]


class _ImageKeys(TypedDict):
    file_name: str
    image_id: int | str


class ImageRecord(_ImageKeys, total=False):
    """One image of a data set. `category_id` of its annotations is contiguous, in [0, K)."""

    height: int
    width: int
    annotations: list[AnnotationRecord]
    """Absent for images without annotation (test images); empty if there is no object."""
    sem_seg_file_name: str
    """A png whose pixels hold the class, or `ignore_label`."""
    pan_seg_file_name: str
    """A png whose pixels hold the segment: red + 256 green + 65536 blue."""
    segments_info: list[SegmentRecord]
    proposal_boxes: np.ndarray
    """(P, 4) precomputed proposals, in falling order of `proposal_objectness_logits` (P,)."""
    proposal_objectness_logits: np.ndarray
    proposal_bbox_mode: BoxMode
    not_exhaustive_category_ids: list[int]
    """LVIS: categories, by the ids of the file, of which not all objects are annotated."""
    neg_category_ids: list[int]
    """LVIS: categories, by the ids of the file, that are known not to be there."""
    dataset_name: str
    """The data set, where DATASETS.TRAIN_RATIOS asks for it."""


class _ModelInputKeys(TypedDict):
    image: Tensor
    """(C, H, W) uint8 or float, in the channel order that the model wants."""


class ModelInput(_ModelInputKeys, total=False):
    """One image for a model."""

    instances: Instances
    """Ground truth: `gt_boxes`, `gt_classes`, ... in the coordinates of `image`."""
    height: int
    """Height of the wanted output, in pixels: that of the file. Absent: that of `image`."""
    width: int
    image_id: int | str
    file_name: str
    proposals: Instances
    """Precomputed proposals: `proposal_boxes`, `objectness_logits`, in the coordinates of `image`.
    """
    sem_seg: Tensor
    """(H, W) int64 class per pixel."""


class ModelOutput(TypedDict, total=False):
    """Predictions for an image, in pixels of `ModelInput`'s `height` and `width`."""

    instances: Instances
    """`pred_boxes`, `scores`, `pred_classes`, ... in falling order of score."""
    proposals: Instances
    """`proposal_boxes`, `objectness_logits`: the output of a proposal network."""
    sem_seg: Tensor
    """(K, H, W) scores per class and pixel."""
    panoptic_seg: tuple[Tensor, list[dict[str, Any]]]
    """(H, W) segment id per pixel, and a dict per segment."""
