"""From the record of an image to a model input: read, augment, and turn into tensors.

Legend: H and W height and width of the image that the model sees, C channels, M objects in one
    image.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from detkit.config import CfgNode, configurable
from detkit.data import transforms as T
from detkit.data.annotations import (
    MASK_FORMATS,
    MIN_BOX_SIDE,
    as_keypoints,
    boxes_of,
    clip_boxes,
    create_keypoint_hflip_indices,
    instances_of,
    keypoints_of,
    masks_of,
    transform_keypoints,
    transformed_masks,
    transformed_rotated_instances,
)
from detkit.data.mixing import Mixing, Scene, SceneParts
from detkit.data.proposals import transformed_proposals
from detkit.data.transforms.augmentation import nested
from detkit.data.transforms.build import build_augmentation, build_crops, mirrors
from detkit.structures import AnnotationRecord, ImageRecord, Instances, ModelInput, as_flag
from detkit.utils.errors import ConfigError
from detkit.utils.image import (
    SizeMismatchError,
    read_image,
    read_label_map,
    read_reduced_image,
)
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.logger import FILE_ONLY
from detkit.utils.overriding import is_overridden, overridable

logger = logging.getLogger(__name__)


class DatasetMapper:
    """Turns one record into one model input.

    For other data, write a function that takes a record and returns a model input, or a subclass.

    Attributes:
        partners: The records of which augmentations of several images draw; the training loader
            sets them.

    Example:
        >>> import os, tempfile
        >>> from PIL import Image
        >>> path = os.path.join(tempfile.mkdtemp(), "black.png")
        >>> Image.new("RGB", (32, 24)).save(path)
        >>> mapper = DatasetMapper(is_train=False, augmentations=[T.Resize((48, 64))])
        >>> mapper({"file_name": path, "image_id": 0})["image"].shape
        torch.Size([3, 48, 64])
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        augmentations: Sequence[T.Augmentation | T.Transform],
        image_format: str = "BGR",
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        reduced_jpeg: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
        use_instance_mask: bool = False,
        instance_mask_format: str = "polygon",
        recompute_boxes: bool = False,
        use_keypoint: bool = False,
        use_rotated_boxes: bool = False,
        num_keypoints: int | None = None,
        keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None,
        precomputed_proposal_topk: int | None = None,
        min_visible: float = 0.0,
    ) -> None:
        """Build a mapper.

        Args:
            is_train: Whether annotations become ground truth; otherwise they are left out.
            augmentations: Applied in this order.
            image_format: See `read_image`.
            max_image_pixels: Largest number of pixels of an image or a label map.
            reduced_jpeg: Decode JPEG files at 1/2, 1/4 or 1/8 of their size where the first
                augmentation is a `ResizeShortestEdge` that makes them smaller still.
            memory_format: See `image_to_tensor`.
            use_instance_mask: Whether to add `gt_masks`; every object needs a mask then.
            instance_mask_format: See `masks_of`.
            recompute_boxes: Whether to replace boxes by those around the masks, which is more
                exact after a crop.
            use_keypoint: Whether to add `gt_keypoints`, all unlabelled for an object without any.
            use_rotated_boxes: Whether `gt_boxes` are `RotatedBoxes`; then without masks and
                keypoints.
            num_keypoints: Keypoints of an object; required with `use_keypoint`, unless
                `keypoint_hflip_indices` are given.
            keypoint_hflip_indices: See `transform_keypoints`.
            precomputed_proposal_topk: Largest number of proposals to add; None adds none.
            min_visible: Part of a box that must lie in the image; objects of which less does are
                left out of `instances`.

        Raises:
            ValueError: `instance_mask_format` is unknown.
            ValueError: `recompute_boxes` is set without `use_instance_mask`.
            ValueError: `use_keypoint` is set, but the number of keypoints is not given.
            ValueError: `use_rotated_boxes` is set together with masks or keypoints.
        """
        if instance_mask_format not in MASK_FORMATS:
            raise ValueError(
                f"instance_mask_format must be one of {', '.join(MASK_FORMATS)}, got"
                f" {instance_mask_format!r}"
            )
        if recompute_boxes and not use_instance_mask:
            raise ValueError("recompute_boxes measures masks, and needs use_instance_mask")
        if num_keypoints is None and keypoint_hflip_indices is not None:
            num_keypoints = len(keypoint_hflip_indices)
        if use_keypoint and num_keypoints is None:
            raise ValueError("use_keypoint needs num_keypoints or keypoint_hflip_indices")
        if use_rotated_boxes and (use_instance_mask or use_keypoint):
            raise ValueError(
                "use_rotated_boxes goes without use_instance_mask and use_keypoint: no head of"
                " rotated boxes takes masks or keypoints"
            )
        self.use_rotated_boxes = use_rotated_boxes
        self.use_instance_mask = use_instance_mask
        self.instance_mask_format = instance_mask_format
        self.recompute_boxes = recompute_boxes
        self.use_keypoint = use_keypoint
        self.num_keypoints = num_keypoints or 0
        self.keypoint_hflip_indices = keypoint_hflip_indices
        self.proposal_topk = precomputed_proposal_topk
        self.min_visible = min_visible
        self.is_train = is_train
        self.augmentations = T.AugmentationList(augmentations)
        self.partners: Sequence[ImageRecord] | None = None
        self.image_format = image_format
        self.max_image_pixels = max_image_pixels
        self.reduced_jpeg = reduced_jpeg
        if reduced_jpeg and self._first_resize() is None:
            logger.warning(
                "INPUT.REDUCED_JPEG has no effect in %s: the first augmentation is no"
                " ResizeShortestEdge",
                "training" if is_train else "testing",
            )
        self.memory_format = memory_format
        logger.info(
            "augmentations in %s: %s",
            "training" if is_train else "testing",
            list(augmentations),
            extra=FILE_ONLY,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT`, and what the model needs besides boxes."""
        # With TEST.TILES, the model takes the original image, and each tile is resized.
        is_whole = is_train or not cfg.TEST.TILES.SIZE
        augmentations = build_augmentation(cfg, is_train) if is_whole else []
        # First, as in Detectron2: sizes of the crop are meant in pixels of the original image.
        crops = build_crops(cfg) if is_train and not cfg.INPUT.AUGMENTATIONS else []
        augmentations[:0] = crops
        topk = None
        if cfg.MODEL.LOAD_PROPOSALS:
            topk = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST
            if is_train:
                topk = cfg.DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN
        for index, top in enumerate(augmentations):
            for mixing in nested([top]):
                if isinstance(mixing, Mixing):
                    _check_mixing(cfg, mixing, f"INPUT.AUGMENTATIONS[{index}]")
        is_mirrored = is_train and cfg.MODEL.KEYPOINT_ON and mirrors(augmentations)
        is_interleaved = cfg.MODEL.MEMORY_FORMAT != "contiguous"
        return {
            "is_train": is_train,
            "augmentations": augmentations,
            "image_format": cfg.INPUT.FORMAT,
            "max_image_pixels": cfg.INPUT.MAX_IMAGE_PIXELS,
            "reduced_jpeg": cfg.INPUT.REDUCED_JPEG,
            "memory_format": torch.channels_last if is_interleaved else torch.contiguous_format,
            "use_instance_mask": cfg.MODEL.MASK_ON,
            "instance_mask_format": cfg.INPUT.MASK_FORMAT,
            "recompute_boxes": is_train
            and (bool(crops) or cfg.INPUT.RECOMPUTE_BOXES)
            and cfg.MODEL.MASK_ON,
            "use_keypoint": cfg.MODEL.KEYPOINT_ON,
            "use_rotated_boxes": cfg.MODEL.ROTATED_BOXES,
            "num_keypoints": cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
            "keypoint_hflip_indices": _keypoint_hflip_indices(cfg) if is_mirrored else None,
            "precomputed_proposal_topk": topk,
            "min_visible": cfg.INPUT.TILES.MIN_VISIBLE if cfg.INPUT.TILES.SIZE and crops else 0.0,
        }

    def __call__(self, dataset_dict: ImageRecord) -> ModelInput:
        """Return the model input of one record.

        Args:
            dataset_dict: Not changed.

        Returns:
            The record's other keys, and

            - `image`: (C, H, W), uint8 unless an augmentation made it float.
            - `proposals`, if they are asked for.
            - `sem_seg`: (H, W) int64, in training, if the record names a label map.
            - `instances`, in training, if the record has annotations: without crowd regions, and
              without objects of which the augmentations left nothing.

        Raises:
            BadImageError: The image or the label map cannot be read.
            SizeMismatchError: The image has another size than its record or its label map says.
            DataError: An object has no usable mask or keypoints; the message names annotation and
                file.
        """
        # A shallow copy is enough: nothing inside the record is changed.
        record = cast(ImageRecord, dict(dataset_dict))
        annotations = record.pop("annotations", None)
        aug_input = self._read(record, annotations, record.pop("sem_seg_file_name", None))
        decoding = T.TransformList(aug_input.transforms)
        transforms = self.augmentations(aug_input)
        objects = aug_input.objects
        if aug_input.was_mixed:
            # From here on, the mixture is the image, and its objects are those of the record.
            record["height"], record["width"] = aug_input.size
            transforms = T.TransformList(aug_input.transforms)
            annotations = objects
        elif len(decoding):
            transforms = decoding + transforms

        model_input: dict[str, Any] = dict(record)
        model_input["image"] = image_to_tensor(aug_input.image, self.memory_format)
        if self.proposal_topk is not None:
            image_size = aug_input.image.shape[:2]
            model_input["proposals"] = transformed_proposals(
                record, image_size, transforms, self.proposal_topk
            )
        for key in ("proposal_boxes", "proposal_objectness_logits", "proposal_bbox_mode"):
            model_input.pop(key, None)
        if aug_input.sem_seg is not None:
            labels = np.ascontiguousarray(aug_input.sem_seg, dtype=np.int64)
            model_input["sem_seg"] = torch.from_numpy(labels)
        if self.is_train and annotations is not None:
            if is_overridden(self._transform_annotations):
                # It may change the objects in place.
                model_input["annotations"] = copy.deepcopy(annotations)
                self._transform_annotations(model_input, transforms, aug_input.image.shape[:2])
            else:
                model_input["instances"] = self._ground_truth(
                    objects, aug_input.boxes, aug_input.image.shape[:2], transforms, record
                )
        return cast(ModelInput, model_input)

    def _read(
        self,
        record: ImageRecord,
        annotations: Sequence[AnnotationRecord] | None,
        sem_seg_file: str | None,
    ) -> Scene:
        """Return what the files of a record hold; the record gets the size of the image."""
        image, size = self._read_image(record["file_name"])
        require_image_size(record, size)
        record["height"], record["width"] = size
        objects: list[AnnotationRecord] = []
        sem_seg = None
        if self.is_train:
            objects = [a for a in annotations or [] if not as_flag(a.get("iscrowd"))]
            if sem_seg_file:
                sem_seg = self._label_map(sem_seg_file, record, size)
        parts = SceneParts(
            self.use_rotated_boxes,
            self.use_instance_mask,
            self.num_keypoints if self.use_keypoint else 0,
            self.keypoint_hflip_indices,
        )
        scene = Scene(image, objects, sem_seg, record["file_name"], parts, self._draw_partner)
        scene.image_format = self.image_format
        if image.shape[:2] != size:
            scene.size = size
            scene.transform(_DecodedResize(*size, *image.shape[:2]))
        return scene

    def _read_image(self, file_name: str) -> tuple[np.ndarray, tuple[int, int]]:
        """Return an image, as large as the first resize needs it, and its size in the file."""
        resize = self._first_resize() if self.reduced_jpeg else None
        if resize is None:
            image = read_image(file_name, self.image_format, max_pixels=self.max_image_pixels)
            return image, (image.shape[0], image.shape[1])

        def size_needed(height: int, width: int) -> tuple[int, int]:
            lengths = resize.short_edge_length
            if min(lengths) == 0:  # the image as it is
                return height, width
            return resize.get_output_shape(height, width, max(lengths), resize.max_size)

        return read_reduced_image(
            file_name, self.image_format, size_needed, max_pixels=self.max_image_pixels
        )

    def _first_resize(self) -> T.ResizeShortestEdge | None:
        first = self.augmentations.augs[0] if self.augmentations.augs else None
        # No subclass: the resize of torchvision does not antialias.
        return first if type(first) is T.ResizeShortestEdge else None

    def _draw_partner(self, mixing: T.Augmentation) -> Scene:
        """Return another image of the data, after the augmentations that stand before one."""
        if not self.partners:
            raise ConfigError(
                f"{type(mixing).__name__} draws other images of the data: it needs the loader of"
                " build_detection_train_loader with a list of records, or `partners` of the mapper"
            )
        record = cast(ImageRecord, dict(self.partners[np.random.randint(len(self.partners))]))
        scene = self._read(record, record.get("annotations"), record.get("sem_seg_file_name"))
        for top in self.augmentations.augs:
            if any(augmentation is mixing for augmentation in nested([top])):
                break
            top(scene)
        return scene

    @overridable
    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        """Replace the `annotations` of a model input by `instances`, the ground truth.

        For subclasses that override it, as they do in Detectron2 to add labels of their own.

        Args:
            dataset_dict: The model input, changed in place.
            transforms: What was done to the image.
            image_shape: (height, width) of the transformed image.
        """
        annotations = dataset_dict.pop("annotations")
        objects = [a for a in annotations if not as_flag(a.get("iscrowd"))]
        boxes = transforms.apply_box(boxes_of(objects))
        dataset_dict["instances"] = self._ground_truth(
            objects, boxes, image_shape, transforms, cast(ImageRecord, dataset_dict)
        )

    def _label_map(
        self, sem_seg_file: str, record: ImageRecord, image_size: tuple[int, ...]
    ) -> np.ndarray:
        labels = read_label_map(sem_seg_file, max_pixels=self.max_image_pixels)
        if labels.shape != image_size:
            raise SizeMismatchError(
                f"label map {sem_seg_file} is {labels.shape[1]}x{labels.shape[0]}"
                f" (width x height), its image {record['file_name']} is"
                f" {image_size[1]}x{image_size[0]}"
            )
        return labels

    def _ground_truth(
        self,
        objects: list[AnnotationRecord],
        boxes: np.ndarray | None,
        image_size: tuple[int, int],
        transforms: T.Transform,
        record: ImageRecord,
    ) -> Instances:
        height, width = image_size
        if self.use_rotated_boxes:
            return transformed_rotated_instances(objects, transforms, image_size)
        assert boxes is not None
        whole, boxes = boxes, clip_boxes(boxes, image_size)
        is_visible = None
        if self.min_visible > 0:
            areas = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, whole)]
            is_visible = areas[0] >= self.min_visible * areas[1]
        masks = None
        if self.use_instance_mask:
            original_size = (record.get("height", 0), record.get("width", 0))
            segmentations = transformed_masks(
                objects, transforms, record["file_name"], original_size
            )
            masks = masks_of(segmentations, (height, width), self.instance_mask_format)
            if self.recompute_boxes:
                boxes = masks.get_bounding_boxes().tensor.numpy()
        # The same as `filter_empty_instances`, but in NumPy: half a dozen tensor operations on ten
        # boxes take longer than all the rest.
        is_kept = (boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE).all(axis=1)
        if is_visible is not None:
            is_kept &= is_visible
        if masks is not None:
            is_kept &= masks.nonempty().numpy()
        if not is_kept.all():
            objects, boxes = [objects[k] for k in np.flatnonzero(is_kept)], boxes[is_kept]
            masks = None if masks is None else masks[torch.from_numpy(is_kept)]
        instances = instances_of(objects, boxes, (height, width))
        if masks is not None:
            instances.gt_masks = masks
        if self.use_keypoint:
            keypoints = keypoints_of(objects, self.num_keypoints, record["file_name"])
            instances.gt_keypoints = as_keypoints(
                transform_keypoints(
                    keypoints, transforms, (height, width), self.keypoint_hflip_indices
                )
            )
        return instances


class _DecodedResize(T.ResizeTransform):
    """The resize that a decoder has done: of everything but the image."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        return img


def _check_mixing(cfg: CfgNode, mixing: Mixing, where: str) -> None:
    if mixing.needs_masks and not cfg.MODEL.MASK_ON:
        raise ConfigError(f"{where}: {type(mixing).__name__} needs masks: set MODEL.MASK_ON True")
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            f"{where}: {type(mixing).__name__} makes new images, for which there are no proposals"
            " (MODEL.LOAD_PROPOSALS)"
        )


def _keypoint_hflip_indices(cfg: CfgNode) -> np.ndarray:
    """Return `create_keypoint_hflip_indices` of the training sets, as many as the model has."""
    indices = create_keypoint_hflip_indices(cfg.DATASETS.TRAIN)
    if len(indices) != cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
        raise ConfigError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS},"
            f" but data set {cfg.DATASETS.TRAIN[0]!r} has {len(indices)} keypoints; set it to"
            f" {len(indices)}"
        )
    return indices


def check_image_size(record: ImageRecord, image: np.ndarray) -> None:
    """Check that an image, (H, W, ...), has the size in its record; a record without one gets it.

    Raises:
        SizeMismatchError: The sizes differ, so that boxes would lie in the wrong places.
    """
    height, width = image.shape[:2]
    require_image_size(record, (height, width))
    record["height"], record["width"] = height, width


def require_image_size(record: ImageRecord, image_size: tuple[int, int]) -> None:
    """Check that an image of `(height, width)` has the size in its record, if that has one.

    Raises:
        SizeMismatchError: The sizes differ.
    """
    height, width = image_size
    expected = (record.get("height"), record.get("width"))
    if None not in expected and expected != (height, width):
        hint = ""
        if expected == (width, height):
            hint = (
                " The sides are exchanged: width and height were mixed up, or the image was"
                " annotated without regard to its EXIF orientation."
            )
        raise SizeMismatchError(
            f"image {record.get('file_name', '')} is {width}x{height} (width x height), but its"
            f" record says {expected[1]}x{expected[0]}.{hint}"
        )


def image_to_tensor(
    image: np.ndarray, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """Return an image (H, W, C) or (H, W), of any strides, as a tensor (C, H, W) of the same dtype.

    Args:
        image: Not changed; the tensor may share its memory.
        memory_format: `torch.contiguous_format` stores one channel after the other; it takes 1.0 ms
            for 800x1067. `torch.channels_last` leaves the channels interleaved, which takes 0 to
            0.5 ms.
    """
    if memory_format == torch.channels_last and image.ndim == 3:
        return _interleaved(image).permute(2, 0, 1)
    planes = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
    # One copy for channel order, flip and layout together: as fast as a copy for the layout alone.
    return torch.from_numpy(_writeable(np.ascontiguousarray(planes)))


def _interleaved(image: np.ndarray) -> Tensor:
    """Return an image (H, W, C) as a contiguous tensor (H, W, C)."""
    mirrored = tuple(axis for axis, stride in enumerate(image.strides) if stride < 0)
    pixels = torch.from_numpy(_writeable(np.ascontiguousarray(np.flip(image, mirrored))))
    if mirrored[-1:] == (2,) and 1 not in mirrored:
        # Reversing the channels alone takes torch 2.5 ms. Reversing whole rows of bytes (0.2 ms),
        # which reverses channels and pixels, and then the pixels back (0.3 ms), is faster.
        return pixels.flip(1, *mirrored).flip(1)
    return pixels.flip(mirrored) if mirrored else pixels


def _writeable(array: np.ndarray) -> np.ndarray:
    return array if array.flags.writeable else array.copy()  # torch warns of read-only memory
