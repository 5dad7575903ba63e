"""Augmentations of several images: mosaic, mixup, copy-paste.

They see a `Scene`: the image with its objects, not with boxes alone. Their partners are drawn from
the training data by the same random numbers as all else, and have gone through the augmentations
that stand before the mixing one in the list.

Legend: H and W height and width, C channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from detkit.data import transforms as T
from detkit.data.annotations import (
    MIN_BOX_SIDE,
    boxes_of,
    clip_boxes,
    keypoints_of,
    rotated_boxes_of,
    transform_keypoints,
    transformed_masks,
)
from detkit.data.transforms.augmentation import require_probability
from detkit.data.transforms.transform import memory_order
from detkit.structures import AnnotationRecord, BoxMode, polygons_to_bitmask
from detkit.structures.mask_formats import box_of_bitmask
from detkit.utils.errors import DataError


@dataclass(frozen=True)
class SceneParts:
    """Which parts of its objects a scene has besides upright boxes and classes."""

    rotated_boxes: bool = False
    masks: bool = False
    num_keypoints: int = 0
    keypoint_hflip_indices: Sequence[int] | np.ndarray | None = None


class Scene(T.AugInput):
    """A sample with its objects.

    Attributes:
        objects: As they are in an image of the size `size`: all of `transforms` are to come.
        size: (height, width).
        transforms: What was done to the image since.
        was_mixed: Whether it holds more than the image of its file.
    """

    def __init__(
        self,
        image: np.ndarray,
        objects: Sequence[AnnotationRecord],
        sem_seg: np.ndarray | None,
        file_name: str,
        parts: SceneParts,
        draw_partner: Callable[[T.Augmentation], Scene],
    ) -> None:
        """Hold a sample; `draw_partner` returns another one for the augmentation that asks."""
        super().__init__(image, boxes=boxes_of(objects), sem_seg=sem_seg)
        self.objects = list(objects)
        self.size: tuple[int, int] = cast(Any, image.shape[:2])
        self.transforms: list[T.Transform] = []
        self.was_mixed = False
        self.file_name = file_name
        self.parts = parts
        self.draw_partner = draw_partner

    def transform(self, tfm: T.Transform) -> None:
        """Change image, boxes and label map; the objects follow in `settle`."""
        super().transform(tfm)
        self.transforms.append(tfm)

    def settle(self) -> None:
        """Do to the objects what was done to the image, and drop those of which nothing is left."""
        assert self.boxes is not None
        size: tuple[int, int] = cast(Any, self.image.shape[:2])
        transforms = T.TransformList(self.transforms)
        boxes = clip_boxes(self.boxes, size)
        moved: list[dict[str, Any]] = [
            {**annotation, "bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS}
            for annotation, box in zip(self.objects, boxes, strict=True)
        ]
        is_kept = np.all(boxes[:, 2:] - boxes[:, :2] > MIN_BOX_SIDE, axis=1)
        if self.parts.rotated_boxes:
            rotated = transforms.apply_rotated_box(rotated_boxes_of(self.objects))
            is_kept &= np.all((rotated[:, :2] >= 0) & (rotated[:, :2] <= size[::-1]), axis=1)
            for annotation, box in zip(moved, rotated, strict=True):
                annotation |= {"bbox": box.tolist(), "bbox_mode": BoxMode.XYWHA_ABS}
        if self.parts.masks:
            masks = transformed_masks(self.objects, transforms, self.file_name, self.size)
            for k, (annotation, mask) in enumerate(zip(moved, masks, strict=True)):
                annotation["segmentation"] = mask
                is_kept[k] &= bool(len(mask) if isinstance(mask, list) else mask.any())
        if self.parts.num_keypoints:
            keypoints = transform_keypoints(
                keypoints_of(self.objects, self.parts.num_keypoints, self.file_name),
                transforms,
                size,
                self.parts.keypoint_hflip_indices,
            )
            for annotation, points in zip(moved, keypoints, strict=True):
                annotation["keypoints"] = points.reshape(-1).tolist()
        kept = [moved[k] for k in np.flatnonzero(is_kept)]
        self._set_objects(cast(list[AnnotationRecord], kept), size)

    def replace(
        self,
        image: np.ndarray,
        objects: Sequence[AnnotationRecord],
        sem_seg: np.ndarray | None = None,
    ) -> None:
        """Become another sample; the objects are those of the new image already."""
        self.image, self.sem_seg = image, sem_seg
        self._set_objects(objects, cast(Any, image.shape[:2]))

    def _set_objects(self, objects: Sequence[AnnotationRecord], size: tuple[int, int]) -> None:
        self.objects, self.boxes, self.size = list(objects), boxes_of(objects), size
        self.transforms = []
        self.was_mixed = True


class Mixing(T.Augmentation):
    """An augmentation that changes objects too, or takes several images."""

    needs_masks = False

    @abstractmethod
    def mix(self, scene: Scene) -> None:
        """Change a scene whose objects are settled."""

    def get_transform(self, *args: Any) -> T.Transform:
        """Raise an error: this is no transform of one image."""
        raise NotImplementedError(f"{type(self).__name__} changes a Scene: call it with one")

    def __call__(self, aug_input: T.AugInput) -> T.Transform:
        """Change a scene; the transform that is returned does nothing."""
        if not isinstance(aug_input, Scene):
            raise TypeError(
                f"{type(self).__name__} works on the samples of a DatasetMapper in training, got"
                f" {type(aug_input).__name__}"
            )
        aug_input.settle()
        self.mix(aug_input)
        return T.NoOpTransform()


def _fit(scene: Scene, size: tuple[int, int]) -> T.ResizeTransform:
    """Return the resize that makes a scene as large as fits into `(height, width)`."""
    height, width = scene.image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    new_size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return T.ResizeTransform(height, width, *new_size)


@T.AUGMENTATION_REGISTRY.register()
class Mosaic(Mixing):
    """Puts four images around a drawn point of a canvas twice as high and wide as asked for.

    Each is scaled to fit a quarter, and what leaves the canvas is cut off.

    Source: Bochkovskiy et al. 2020, arXiv 2004.10934, section 3.4.
    """

    def __init__(self, size: Sequence[int], fill: float = 114, seg_fill: int = 255) -> None:
        """Take the size of a quarter.

        Args:
            size: (height, width) in pixels. The canvas has twice these: crop or scale after it.
            fill: Pixel value where there is no image.
            seg_fill: Label there.
        """
        if len(size) != 2 or min(size) < 2:
            raise ValueError(f"size must be (height, width), at least 2 each, got {list(size)}")
        self.size = (int(size[0]), int(size[1]))
        self.fill, self.seg_fill = fill, seg_fill

    def mix(self, scene: Scene) -> None:
        """Draw the point and three partners."""
        height, width = self.size
        y = int(np.random.randint(height // 2, height + height // 2 + 1))
        x = int(np.random.randint(width // 2, width + width // 2 + 1))
        scenes = [scene, *(scene.draw_partner(self) for _ in range(3))]
        canvas = np.empty((2 * height, 2 * width, *scene.image.shape[2:]), scene.image.dtype)
        labels = None
        if all(part.sem_seg is not None for part in scenes):
            labels = np.empty(canvas.shape[:2], cast(np.ndarray, scene.sem_seg).dtype)
        objects: list[AnnotationRecord] = []
        for k, part in enumerate(scenes):
            rows = slice(0, y) if k < 2 else slice(y, 2 * height)
            columns = slice(0, x) if k % 2 == 0 else slice(x, 2 * width)
            part.transform(self._into(part, rows, columns))
            part.settle()
            canvas[rows, columns] = part.image[rows, columns]
            if labels is not None:
                labels[rows, columns] = cast(np.ndarray, part.sem_seg)[rows, columns]
            objects += part.objects
        scene.replace(canvas, objects, labels)

    def _into(self, scene: Scene, rows: slice, columns: slice) -> T.TransformList:
        """Return the transform of a scene to its part of the canvas, at the drawn point."""
        resize = _fit(scene, self.size)
        new_h, new_w = resize.new_h, resize.new_w
        height, width = min(new_h, rows.stop - rows.start), min(new_w, columns.stop - columns.start)
        is_above, is_left = rows.start == 0, columns.start == 0
        crop_y, crop_x = (new_h - height) * is_above, (new_w - width) * is_left
        top = rows.stop - height if is_above else rows.start
        left = columns.stop - width if is_left else columns.start
        bottom, right = 2 * self.size[0] - top - height, 2 * self.size[1] - left - width
        crop = T.CropTransform(crop_x, crop_y, width, height, new_w, new_h)
        border = (left, top, right, bottom)
        pad = T.PadTransform(*border, width, height, self.fill, self.seg_fill)
        return T.TransformList([resize, crop, pad])


def _same_frame(partner: Scene, size: tuple[int, int]) -> None:
    """Cut or pad a scene at the right and the bottom to `(height, width)`."""
    height, width = partner.image.shape[:2]
    crop_h, crop_w = min(height, size[0]), min(width, size[1])
    crop = T.CropTransform(0, 0, crop_w, crop_h, width, height)
    pad = T.PadTransform(0, 0, size[1] - crop_w, size[0] - crop_h, crop_w, crop_h)
    partner.transform(T.TransformList([crop, pad]))
    partner.settle()


@T.AUGMENTATION_REGISTRY.register()
class MixUp(Mixing):
    """Blends the image with another one, scaled to fit; the objects of both count.

    Source: Zhang et al. 2019, arXiv 1902.04103, section 3.1.
    """

    def __init__(self, alpha: float = 1.5) -> None:
        """Take the parameter of the Beta distribution of the shares, above 0."""
        if alpha <= 0:
            raise ValueError(f"alpha must be above 0, got {alpha}")
        self.alpha = alpha

    def mix(self, scene: Scene) -> None:
        """Draw a share and a partner."""
        if scene.sem_seg is not None:
            raise DataError("MixUp has no meaning for label maps (sem_seg_file_name)")
        share = np.float32(np.random.beta(self.alpha, self.alpha))
        partner = scene.draw_partner(self)
        partner.transform(_fit(partner, scene.size))
        _same_frame(partner, scene.size)
        blended = scene.image * share + partner.image * (1 - share)
        if np.issubdtype(scene.image.dtype, np.integer):
            blended = np.rint(blended)
        scene.replace(
            blended.astype(scene.image.dtype, copy=False), scene.objects + partner.objects
        )


@T.AUGMENTATION_REGISTRY.register()
class CopyPaste(Mixing):
    """Pastes objects of another image, as their masks cut them out, at the same places.

    What they hide is taken from the masks and the boxes below; keypoints below become invisible.

    Source: Ghiasi et al. 2020, arXiv 2012.07177.
    """

    needs_masks = True

    def __init__(self, share: float = 0.5) -> None:
        """Take the probability of each object of the other image to be pasted."""
        self.share = require_probability(share)

    def mix(self, scene: Scene) -> None:
        """Draw a partner and its objects."""
        partner = scene.draw_partner(self)
        _same_frame(partner, scene.size)
        is_pasted = np.random.rand(len(partner.objects)) < self.share
        pasted = [partner.objects[k] for k in np.flatnonzero(is_pasted)]
        cover = np.zeros(scene.size, dtype=bool)
        for annotation in pasted:
            cover |= bitmap_of(annotation, scene.size)
        if not cover.any():
            return
        order = memory_order(scene.image)
        image = scene.image[order].copy()[order]
        target, source = np.atleast_3d(image), np.atleast_3d(partner.image)
        for channel in range(target.shape[2]):  # 1.3 ms for 1024x1024; all at once take 6
            target[:, :, channel][cover] = source[:, :, channel][cover]
        labels = scene.sem_seg
        if labels is not None:
            if partner.sem_seg is None:
                raise DataError(f"CopyPaste needs a label map of {partner.file_name} too")
            labels = np.where(cover, partner.sem_seg, labels)
        below = [_behind(annotation, cover) for annotation in scene.objects]
        scene.replace(image, [a for a in below if a is not None] + pasted, labels)


def bitmap_of(annotation: AnnotationRecord, size: tuple[int, int]) -> np.ndarray:
    """Return the mask of a settled object as (H, W) bool."""
    mask = cast(Any, annotation)["segmentation"]
    return polygons_to_bitmask(mask, *size) if isinstance(mask, list) else mask != 0


def _behind(annotation: AnnotationRecord, cover: np.ndarray) -> AnnotationRecord | None:
    """Return an object without the pixels that are covered, None if no pixel is left."""
    x0, y0, x1, y1 = annotation["bbox"]
    if not cover[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)].any():
        return annotation
    mask = bitmap_of(annotation, cast(Any, cover.shape))
    left = mask & ~cover
    if not left.any():
        return None
    if (left == mask).all():
        return annotation
    box = [float(v) for v in box_of_bitmask(left)]
    hidden: dict[str, Any] = {**annotation, "segmentation": left.view(np.uint8), "bbox": box}
    if "keypoints" in annotation:
        points = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
        height, width = cover.shape
        columns = np.clip(points[:, 0].astype(int), 0, width - 1)
        rows = np.clip(points[:, 1].astype(int), 0, height - 1)
        points[:, 2] = np.where(cover[rows, columns], np.minimum(points[:, 2], 1), points[:, 2])
        hidden["keypoints"] = points.reshape(-1).tolist()
    return cast(AnnotationRecord, hidden)
