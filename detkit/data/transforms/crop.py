"""Cropping and padding.

Legend: H and W height and width, C channels, N boxes, P points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from detkit.data.transforms.augmentation import Augmentation
from detkit.data.transforms.polygon_clipping import clip_polygons
from detkit.data.transforms.transform import AxisAlignedTransform, Transform

CROP_TYPES = ("relative", "relative_range", "absolute", "absolute_range")


class CropTransform(AxisAlignedTransform):
    """Cuts out a window. Points and boxes move along and may lie outside of it: whoever uses them clips them. Polygons
    are cut at its border.
    """

    def __init__(
        self, x0: int, y0: int, w: int, h: int, orig_w: int | None = None, orig_h: int | None = None
    ) -> None:
        """Take the window's corner and size, and the size of the image where an inverse is wanted."""
        if x0 < 0 or y0 < 0 or w < 1 or h < 1:
            raise ValueError(
                f"a crop needs a corner at 0 or more and sides of 1 or more, got {x0=}, {y0=},"
                f" {w=}, {h=}"
            )
        self.x0, self.y0, self.w, self.h = x0, y0, w, h
        self.orig_w, self.orig_h = orig_w, orig_h

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return a view of the window; smaller where the window leaves the image."""
        return img[self.y0 : self.y0 + self.h, self.x0 : self.x0 + self.w]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points relative to the window's corner."""
        return coords - [self.x0, self.y0]

    def apply_polygons(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the parts of the polygons within the window: none where nothing is left, several
        where one is cut.
        """
        return clip_polygons(super().apply_polygons(polygons), (self.h, self.w))

    def inverse(self) -> Transform:
        """Return the padding to the old size.

        Raises:
            NotImplementedError: The old size was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise NotImplementedError("the inverse of a crop needs orig_w and orig_h")
        right, bottom = self.orig_w - self.x0 - self.w, self.orig_h - self.y0 - self.h
        return PadTransform(self.x0, self.y0, right, bottom, self.w, self.h)


class PadTransform(AxisAlignedTransform):
    """Puts a border of one value around the image."""

    def __init__(
        self,
        x0: int,
        y0: int,
        x1: int,
        y1: int,
        orig_w: int | None = None,
        orig_h: int | None = None,
        pad_value: float = 0,
        seg_pad_value: int = 0,
    ) -> None:
        """Take the width of the border at the left, top, right and bottom, in pixels."""
        if min(x0, y0, x1, y1) < 0:
            raise ValueError(
                f"a border cannot be negative, got left {x0}, top {y0}, right {x1}, bottom {y1}"
            )
        self.x0, self.y0, self.x1, self.y1 = x0, y0, x1, y1
        self.orig_w, self.orig_h = orig_w, orig_h
        self.pad_value, self.seg_pad_value = pad_value, seg_pad_value

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the image with its border."""
        return self._pad(img, self.pad_value)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the label map with its border."""
        return self._pad(segmentation, self.seg_pad_value)

    def _pad(self, array: np.ndarray, value: float) -> np.ndarray:
        border = np.array([(self.y0, self.y1), (self.x0, self.x1)] + [(0, 0)] * (array.ndim - 2))
        return np.pad(array, border, constant_values=value)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the shifted points."""
        return np.add(coords, [self.x0, self.y0])

    def inverse(self) -> Transform:
        """Return the crop that takes the border off.

        Raises:
            NotImplementedError: The size without border was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise NotImplementedError("the inverse of a padding needs orig_w and orig_h")
        padded_w, padded_h = self.orig_w + self.x0 + self.x1, self.orig_h + self.y0 + self.y1
        return CropTransform(self.x0, self.y0, self.orig_w, self.orig_h, padded_w, padded_h)


class RandomCrop(Augmentation):
    """Cuts out a window of a given or drawn size, anywhere in the image."""

    def __init__(self, crop_type: str, crop_size: Sequence[float]) -> None:
        """Take the size of the window.

        Args:
            crop_type: How `crop_size` is meant. "relative": as shares (height, width) of the
                image's sides. "relative_range": as the smallest such shares; each is drawn between
                it and 1. "absolute": in pixels (height, width). "absolute_range": each side is
                drawn between the two, in pixels.
            crop_size: Two numbers. A window is never larger than the image.
        """
        if crop_type not in CROP_TYPES:
            raise ValueError(
                f"crop_type (INPUT.CROP.TYPE) must be one of {', '.join(CROP_TYPES)}, got"
                f" {crop_type!r}"
            )
        self.crop_type = crop_type
        self.crop_size = _require_crop_size(crop_type, crop_size)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a window."""
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        y0 = int(np.random.randint(height - crop_h + 1))
        x0 = int(np.random.randint(width - crop_w + 1))
        return CropTransform(x0, y0, crop_w, crop_h, width, height)

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Draw the `(height, width)` of a window in an image of `(height, width)`."""
        height, width = image_size
        first, second = self.crop_size
        if self.crop_type == "absolute":
            return min(int(first), height), min(int(second), width)
        if self.crop_type == "absolute_range":
            return _draw_side(int(first), int(second), height), _draw_side(
                int(first), int(second), width
            )
        if self.crop_type == "relative_range":
            first, second = np.array([first, second]) + np.random.rand(2) * (
                1 - np.array([first, second])
            )
        return max(1, math.floor(height * first + 0.5)), max(1, math.floor(width * second + 0.5))


class RandomCropAroundInstance(RandomCrop):
    """Cuts out a window that holds the center of one object, drawn at random; anywhere where there is no object.

    A window drawn without a look at the objects often holds none, and such a sample teaches
    background only.
    """

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None = None) -> Transform:
        """Draw an object and a window around it."""
        if boxes is None or len(boxes) == 0:
            return super().get_transform(image)
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        x1, y1, x2, y2 = boxes[np.random.randint(len(boxes))]
        y0 = _draw_start_around((y1 + y2) / 2, crop_h, height)
        x0 = _draw_start_around((x1 + x2) / 2, crop_w, width)
        return CropTransform(x0, y0, crop_w, crop_h, width, height)


class RandomCrop_CategoryAreaConstraint(RandomCrop):
    """Cuts out a window of which no single class of the label map takes more than a share, if ten draws find one.

    Source: Chen et al. 2018, arXiv 1802.02611, as implemented in Detectron2.
    """

    _NUM_DRAWS = 10

    def __init__(
        self,
        crop_type: str,
        crop_size: Sequence[float],
        single_category_max_area: float = 1.0,
        ignored_category: int | None = None,
    ) -> None:
        """Take the window and the constraint.

        Args:
            crop_type: As in `RandomCrop`.
            crop_size: As there.
            single_category_max_area: Largest share of one class, in (0, 1].
            ignored_category: Label that does not count, in numerator and denominator.
        """
        super().__init__(crop_type, crop_size)
        if not 0 < single_category_max_area <= 1:
            raise ValueError(
                "single_category_max_area (INPUT.CROP.SINGLE_CATEGORY_MAX_AREA) must lie in (0,"
                f" 1], got {single_category_max_area}"
            )
        self.single_category_max_area = single_category_max_area
        self.ignored_category = ignored_category

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None = None) -> Transform:
        """Draw windows until one will do, the last one whatever it holds."""
        window = super().get_transform(image)
        if self.single_category_max_area == 1:
            return window
        if sem_seg is None:
            raise ValueError(
                "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA below 1 needs a label map of every image"
                " (sem_seg_file_name)"
            )
        for _ in range(self._NUM_DRAWS - 1):
            if self._is_varied(window.apply_segmentation(sem_seg)):
                break
            window = super().get_transform(image)
        return window

    def _is_varied(self, labels: np.ndarray) -> bool:
        counted, counts = np.unique(labels, return_counts=True)
        if self.ignored_category is not None:
            counts = counts[counted != self.ignored_category]
        return len(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area


def _draw_start_around(center: float, crop_side: int, image_side: int) -> int:
    """Draw where a window starts that holds `center` and lies within the image."""
    center = min(max(center, 0.0), image_side - 1e-6)  # annotations may lie outside of their image
    first = max(math.floor(center) + 1 - crop_side, 0)
    last = min(math.floor(center), image_side - crop_side)
    return int(np.random.randint(first, last + 1))


def _draw_side(smallest: int, largest: int, image_side: int) -> int:
    return int(np.random.randint(min(smallest, image_side), min(largest, image_side) + 1))


def _require_crop_size(crop_type: str, crop_size: Sequence[float]) -> tuple[float, float]:
    if len(crop_size) != 2:
        raise ValueError(f"crop_size (INPUT.CROP.SIZE) needs two numbers, got {list(crop_size)}")
    first, second = float(crop_size[0]), float(crop_size[1])
    if crop_type.startswith("relative") and not (0 < first <= 1 and 0 < second <= 1):
        raise ValueError(
            f"a {crop_type} crop_size (INPUT.CROP.SIZE) needs shares in (0, 1], got"
            f" {list(crop_size)}"
        )
    if crop_type.startswith("absolute") and min(first, second) < 1:
        raise ValueError(
            f"an {crop_type} crop_size (INPUT.CROP.SIZE) needs pixels of 1 or more, got"
            f" {list(crop_size)}"
        )
    if crop_type == "absolute_range" and first > second:
        raise ValueError(
            "an absolute_range crop_size goes from the smaller to the larger, got"
            f" {list(crop_size)}"
        )
    return first, second
