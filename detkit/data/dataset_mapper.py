"""From the record of an image to what a model takes: read, augment, and turn into tensors.

Legend: H and W height and width of the image that the model sees, C channels, M objects in one
    image.
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
from detkit.data.annotations import (
    MIN_BOX_SIDE,
    boxes_of,
    check_image_size,
    clip_boxes,
    instances_of,
    transformed_masks,
)
from detkit.data.augmentation_recipes import build_augmentation, build_crop
from detkit.data.keypoint_annotations import (
    as_keypoints,
    create_keypoint_hflip_indices,
    keypoints_of,
    transform_keypoints,
)
from detkit.data.mask_annotations import MASK_FORMATS, masks_of
from detkit.data.proposals import transformed_proposals
from detkit.structures import (
    AnnotationRecord,
    BitMasks,
    ImageRecord,
    Instances,
    Keypoints,
    ModelInput,
    PolygonMasks,
)
from detkit.utils.image import SizeMismatchError, read_image, read_label_map
from detkit.utils.image_file import MAX_IMAGE_PIXELS

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
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        memory_format: torch.memory_format = torch.contiguous_format,
        use_instance_mask: bool = False,
        instance_mask_format: str = "polygon",
        recompute_boxes: bool = False,
        use_keypoint: bool = False,
        num_keypoints: int | None = None,
        keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
    ) -> None:
        """Take what is to be done.

        Args:
            is_train: Whether annotations become ground truth; otherwise they are left out.
            augmentations: Applied in this order.
            image_format: As in `read_image`.
            max_image_pixels: As `max_pixels` there, of images and label maps.
            memory_format: As in `image_to_tensor`.
            use_instance_mask: Whether to give `gt_masks`; every object needs a mask then.
            instance_mask_format: As in `masks_of`.
            recompute_boxes: Whether boxes are those of what is left of the masks, as is right after
                a crop.
            use_keypoint: Whether to give `gt_keypoints`; objects without any have none labelled.
            num_keypoints: Keypoints of an object; needed with `use_keypoint`, unless there are
                indices.
            keypoint_hflip_indices: As in `transform_keypoints`.
            precomputed_proposal_topk: Most proposals to give; None gives none.

        Raises:
            ValueError: The arguments contradict each other.
        """
        if instance_mask_format not in MASK_FORMATS:
            raise ValueError(
                "instance_mask_format (INPUT.MASK_FORMAT) must be one of"
                f" {', '.join(MASK_FORMATS)}, got {instance_mask_format!r}"
            )
        if recompute_boxes and not use_instance_mask:
            raise ValueError("recompute_boxes measures masks, and needs use_instance_mask")
        if num_keypoints is None and keypoint_hflip_indices is not None:
            num_keypoints = len(keypoint_hflip_indices)
        if use_keypoint and num_keypoints is None:
            raise ValueError(
                "use_keypoint needs num_keypoints, or keypoint_hflip_indices to count them by"
            )
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.recompute_boxes = recompute_boxes
        self.use_keypoint = use_keypoint
        self.num_keypoints = num_keypoints or 0
        self.keypoint_hflip_indices = keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.image_format = image_format
        self.max_image_pixels = max_image_pixels
        self.memory_format = memory_format
        logger.info(
            "augmentations in %s: %s", "training" if is_train else "testing", list(augmentations)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT`, and what the model needs beside boxes."""
        augmentations = build_augmentation(cfg, is_train)
        has_crop = cfg.INPUT.CROP.ENABLED and is_train
        if has_crop:
            augmentations.insert(0, build_crop(cfg))
        is_interleaved = cfg.MODEL.MEMORY_FORMAT == "channels_last"
        topk = (
            cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
            if is_train
            else cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
        )
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "max_image_pixels": cfg.INPUT.MAX_IMAGE_PIXELS,
            "memory_format": torch.channels_last if is_interleaved else torch.contiguous_format,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "recompute_boxes": has_crop and cfg.MODEL.MASK_ON,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
            "num_keypoints": cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
            "keypoint_hflip_indices": (
                _hflip_indices(cfg) if is_train and cfg.MODEL.KEYPOINT_ON else None
            ),
            "precomputed_proposal_topk": topk if cfg.MODEL.LOAD_PROPOSALS else None,
        }

    def __call__(self, dataset_dict: ImageRecord) -> ModelInput:
        """Return the model input of one record.

        Args:
            dataset_dict: It is not changed.

        Returns:
            The record's other keys, `image` (C, H, W), uint8 unless an augmentation made it float,
            `proposals` where they are asked for, and in training `sem_seg` (H, W) int64 where the
            record has a file of it, and `instances` where it has annotations. Regions of crowds,
            and objects of which the augmentations left nothing, are not among them.

        Raises:
            BadImageError: The image, or the label map, cannot be read.
            SizeMismatchError: The image does not have the size that the record gives, or the label
                map another one.
            ValueError: An object has no usable mask or keypoints; the message names annotation and
                file.
        """
        record = cast(ImageRecord, dict(dataset_dict))
        annotations = record.pop("annotations", None)
        sem_seg_file = record.pop("sem_seg_file_name", None)
        image = read_image(
            record["file_name"], format=self.image_format, max_pixels=self.max_image_pixels
        )
        check_image_size(record, image)
        objects = [
            annotation for annotation in annotations or [] if annotation.get("iscrowd", 0) == 0
        ]
        objects = objects if self.is_train else []
        sem_seg = None
        if self.is_train and sem_seg_file:
            sem_seg = read_label_map(sem_seg_file, max_pixels=self.max_image_pixels)
        if sem_seg is not None and sem_seg.shape != image.shape[:2]:
            raise SizeMismatchError(
                f"label map {sem_seg_file} is {_size(sem_seg)} (width x height), its image"
                f" {record['file_name']} is {_size(image)}"
            )
        aug_input = T.AugInput(image, boxes=boxes_of(objects), sem_seg=sem_seg)
        transforms = self.augmentations(aug_input)
        model_input: dict[str, Any] = {
            **record,
            "image": image_to_tensor(aug_input.image, self.memory_format),
        }
        if self.proposal_topk is not None:
            image_size = aug_input.image.shape[:2]
            model_input["proposals"] = transformed_proposals(
                record, image_size, transforms, self.proposal_topk
            )
        for key in ("proposal_boxes", "proposal_objectness_logits", "proposal_bbox_mode"):
            model_input.pop(key, None)
        if aug_input.sem_seg is not None:
            model_input["sem_seg"] = torch.from_numpy(
                np.ascontiguousarray(aug_input.sem_seg, dtype=np.int64)
            )
        if self.is_train and annotations is not None:
            model_input["instances"] = self._ground_truth(objects, aug_input, transforms, record)
        return cast(ModelInput, model_input)

    def _ground_truth(
        self,
        objects: list[AnnotationRecord],
        aug_input: T.AugInput,
        transforms: T.Transform,
        record: ImageRecord,
    ) -> Instances:
        height, width = aug_input.image.shape[:2]
        assert aug_input.boxes is not None
        boxes = clip_boxes(aug_input.boxes, (height, width))
        masks = (
            self._masks(objects, (height, width), transforms, record)
            if self.use_instance_mask
            else None
        )
        if masks is not None and self.recompute_boxes:
            boxes = masks.get_bounding_boxes().tensor.numpy()
        # What `filter_empty_instances` does, before there are tensors: half a dozen operations on
        # ten boxes add up.
        is_kept = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE).all(axis=1)
        if masks is not None:
            is_kept &= masks.nonempty().numpy()
        if not is_kept.all():
            objects, boxes = [objects[k] for k in np.flatnonzero(is_kept)], boxes[is_kept]
            masks = None if masks is None else masks[torch.from_numpy(is_kept)]
        instances = instances_of(objects, boxes, (height, width))
        if masks is not None:
            instances.gt_masks = masks
        if self.use_keypoint:
            instances.gt_keypoints = self._keypoints(objects, (height, width), transforms, record)
        return instances

    def _masks(
        self,
        objects: list[AnnotationRecord],
        image_size: tuple[int, int],
        transforms: T.Transform,
        record: ImageRecord,
    ) -> PolygonMasks | BitMasks:
        original_size = (record.get("height", 0), record.get("width", 0))
        segmentations = transformed_masks(objects, transforms, record["file_name"], original_size)
        return masks_of(segmentations, image_size, self.instance_mask_format)

    def _keypoints(
        self,
        objects: list[AnnotationRecord],
        image_size: tuple[int, int],
        transforms: T.Transform,
        record: ImageRecord,
    ) -> Keypoints:
        keypoints = keypoints_of(objects, self.num_keypoints, record["file_name"])
        return as_keypoints(
            transform_keypoints(keypoints, transforms, image_size, self.keypoint_hflip_indices)
        )


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _hflip_indices(cfg: CfgNode) -> np.ndarray | None:
    """Return what a mirror does to the keypoints of the training sets, None where nothing is mirrored.

    Raises:
        ValueError: The data sets do not tell, or have another number of keypoints than the model.
    """
    if cfg.INPUT.RANDOM_FLIP != "horizontal":
        return None
    indices = create_keypoint_hflip_indices(cfg.DATASETS.TRAIN)
    if len(indices) != cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
        raise ValueError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS},"
            f" but data set {cfg.DATASETS.TRAIN[0]!r} has {len(indices)} keypoints; set it to"
            f" {len(indices)}"
        )
    return indices


def image_to_tensor(
    image: np.ndarray, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Return an image (H, W, C) or (H, W), whatever its strides, as a tensor (C, H, W) of the same dtype.

    Args:
        image: It is not changed; the tensor may share its memory.
        memory_format: `torch.contiguous_format` lays the planes of the channels one after the
            other; it takes 1.0 ms for 800x1067. `torch.channels_last` leaves the channels
            interleaved, which takes 0 to 0.5 ms.
    """
    if memory_format == torch.channels_last and image.ndim == 3:
        return _interleaved(image).permute(2, 0, 1)
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    # The one copy that channel order, flip and layout cost together: as much as the layout alone.
    return torch.from_numpy(_writeable(np.ascontiguousarray(planes)))


def _interleaved(image: np.ndarray) -> Tensor:
    """Return an image (H, W, C) as a contiguous tensor (H, W, C)."""
    mirrored = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    pixels = torch.from_numpy(_writeable(np.ascontiguousarray(np.flip(image, mirrored))))
    if mirrored[-1:] == (2,) and 1 not in mirrored:
        # torch turns whole rows of bytes round in 0.2 ms and pixels in 0.3, but channels within
        # pixels in 2.5.
        return pixels.flip(1, *mirrored).flip(1)
    return pixels.flip(mirrored) if mirrored else pixels


def _writeable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()  # torch would warn of the others
