"""From the record of an image to what a model takes: read, augment, and turn into tensors.

Legend: H and W height and width of the image that the model sees, C channels, M objects in one image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from detkit.config import CfgNode, configurable
from detkit.data import transforms as T
from detkit.data.annotations import MIN_BOX_SIDE, boxes_of, check_image_size, clip_boxes, instances_of
from detkit.data.augmentation_recipes import build_augmentation
from detkit.structures import AnnotationRecord, ImageRecord, Instances, ModelInput
from detkit.utils.image import read_image

logger = logging.getLogger(__name__)


class DatasetMapper:
    """Turns one record into one model input. For other data, write a function that takes a record, or a subclass.

    Example:
        >>> mapper = DatasetMapper(cfg, is_train=True, augmentations=[T.Resize((480, 640))])
        >>> loader = build_detection_train_loader(cfg, mapper=mapper)
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "BGR",
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        """Take what is to be done.

        Args:
            is_train: Whether annotations become ground truth; otherwise they are left out.
            augmentations: Applied in this order.
            image_format: As in `read_image`.
            memory_format: As in `image_to_tensor`.
        """
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.memory_format = memory_format
        logger.info("augmentations in %s: %s", "training" if is_train else "testing", list(augmentations))

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT`."""
        _refuse_what_is_to_come(cfg)
        augmentations = build_augmentation(cfg, is_train)
        if cfg.INPUT.CROP.ENABLED and is_train:
            augmentations.insert(0, T.RandomCropAroundInstance(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE))
        is_interleaved = cfg.MODEL.MEMORY_FORMAT == "channels_last"
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "memory_format": torch.channels_last if is_interleaved else torch.contiguous_format,
        }

    def __call__(self, dataset_dict: ImageRecord) -> ModelInput:
        """Give the model input of one record.

        Args:
            dataset_dict: It is not changed.

        Returns:
            The record's other keys, `image` (C, H, W), uint8 unless an augmentation made it float, and in training
            `instances` where the record has annotations. Regions of crowds, and objects of which the augmentations
            left nothing, are not among them.

        Raises:
            BadImageError: The image cannot be read.
            SizeMismatchError: The image does not have the size that the record gives.
        """
        record = cast(ImageRecord, dict(dataset_dict))
        annotations = record.pop("annotations", None)
        image = read_image(record["file_name"], format=self.image_format)
        check_image_size(record, image)
        objects = [annotation for annotation in annotations or [] if annotation.get("iscrowd", 0) == 0]
        objects = objects if self.is_train else []
        aug_input = T.AugInput(image, boxes=boxes_of(objects))
        self.augmentations(aug_input)
        model_input: dict[str, Any] = {**record, "image": image_to_tensor(aug_input.image, self.memory_format)}
        if self.is_train and annotations is not None:
            model_input["instances"] = self._ground_truth(objects, aug_input)
        return cast(ModelInput, model_input)

    def _ground_truth(self, objects: list[AnnotationRecord], aug_input: T.AugInput) -> Instances:
        height, width = aug_input.image.shape[:2]
        assert aug_input.boxes is not None
        boxes = clip_boxes(aug_input.boxes, (height, width))
        # What `filter_empty_instances` does, before there are tensors: half a dozen operations on ten boxes add up.
        is_kept = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE).all(axis=1)
        if not is_kept.all():
            objects, boxes = [objects[k] for k in np.flatnonzero(is_kept)], boxes[is_kept]
        return instances_of(objects, boxes, (height, width))


def image_to_tensor(image: np.ndarray, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """Give an image (H, W, C) or (H, W), whatever its strides, as a tensor (C, H, W) of the same dtype.

    Args:
        image: It is not changed; the tensor may share its memory.
        memory_format: `torch.contiguous_format` lays the planes of the channels one after the other; it takes 1.0 ms
            for 800x1067. `torch.channels_last` leaves the channels interleaved, which takes 0 to 0.5 ms.
    """
    if memory_format == torch.channels_last and image.ndim == 3:
        return _interleaved(image).permute(2, 0, 1)
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    # The one copy that channel order, flip and layout cost together: as much as the layout alone.
    return torch.from_numpy(_writeable(np.ascontiguousarray(planes)))


def _interleaved(image: np.ndarray) -> Tensor:
    """Give an image (H, W, C) as a contiguous tensor (H, W, C)."""
    mirrored = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    pixels = torch.from_numpy(_writeable(np.ascontiguousarray(np.flip(image, mirrored))))
    if mirrored[-1:] == (2,) and 1 not in mirrored:
        # torch turns whole rows of bytes round in 0.2 ms and pixels in 0.3, but channels within pixels in 2.5.
        return pixels.flip(1, *mirrored).flip(1)
    return pixels.flip(mirrored) if mirrored else pixels


def _writeable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()  # torch would warn of the others


def _refuse_what_is_to_come(cfg: CfgNode) -> None:
    # Better than to train a mask head on nothing.
    for key, is_on in (
        ("MODEL.MASK_ON", cfg.MODEL.MASK_ON),
        ("MODEL.KEYPOINT_ON", cfg.MODEL.KEYPOINT_ON),
        ("MODEL.LOAD_PROPOSALS", cfg.MODEL.LOAD_PROPOSALS),
    ):
        if is_on:
            raise NotImplementedError(f"{key} is on, but detkit's DatasetMapper gives boxes and classes only so far")
