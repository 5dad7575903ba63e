"""Cropping and padding, and polygons clipped to the crop.

Legend: H and W height and width, C channels, N boxes, P points of a polygon.
"""

import math
from collections.abc import Sequence

import numpy as np

from detkit.data.transforms.augmentation import AUGMENTATION_REGISTRY, Augmentation
from detkit.data.transforms.transform import (
    AxisAlignedTransform,
    NoOpTransform,
    Transform,
    TransformList,
    memory_order,
)
from detkit.structures.mask_formats import polygon_area
from detkit.utils.errors import DataError

CROP_TYPES = ("relative", "relative_range", "absolute", "absolute_range")

# Square pixels. Smaller pieces of a clipped polygon are lines along the border, left by rounding.
_MIN_AREA = 1e-9


class CropTransform(AxisAlignedTransform):
    """Cuts out a window.

    Points and boxes are moved and may lie outside of the window: their user clips them. Polygons
    are clipped to it.
    """

    def __init__(
        self, x0: int, y0: int, w: int, h: int, orig_w: int | None = None, orig_h: int | None = None
    ) -> None:
        """Take the window's corner and size, and the image's size if an inverse is wanted."""
        if x0 < 0 or y0 < 0 or w < 1 or h < 1:
            raise ValueError(
                f"a crop needs a corner at 0 or more and sides of 1 or more, got {x0=}, {y0=},"
                f" {w=}, {h=}"
            )
        self.x0, self.y0, self.w, self.h = x0, y0, w, h
        self.orig_w, self.orig_h = orig_w, orig_h

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return a view of the window; smaller if the window leaves the image."""
        return img[self.y0 : self.y0 + self.h, self.x0 : self.x0 + self.w]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points relative to the window's corner."""
        return coords - [self.x0, self.y0]

    def apply_polygons(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the parts of the polygons within the window: none, one or several of each."""
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


def clip_polygons(polygons: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[np.ndarray]:
    """Return the parts of polygons, each (P, 2), that lie in an image of `(height, width)`."""
    height, width = image_size
    clipped = []
    for polygon in polygons:
        parts = [polygon]
        borders = ((0, 0, False), (1, 0, False), (0, width, True), (1, height, True))
        for axis, bound, is_upper in borders:
            parts = [piece for part in parts for piece in _cut(part, axis, bound, is_upper)]
        clipped += parts
    return clipped


def _cut(polygon: np.ndarray, axis: int, bound: float, is_upper: bool) -> list[np.ndarray]:
    """Return the parts of a polygon on one side of a line x = bound (axis 0) or y = bound (axis 1).

    The corners inside form chains, each from the point where the outline comes in to the point
    where it goes out; each part is a loop of chains.
    """
    depth = bound - polygon[:, axis] if is_upper else polygon[:, axis] - bound
    is_inside = depth >= 0
    if is_inside.all():
        return [polygon]
    if not is_inside.any():
        return []
    # Start at a corner outside, so that no chain runs over the end of the array.
    start = int(np.flatnonzero(~is_inside)[0])
    polygon, depth, is_inside = (np.roll(a, -start, axis=0) for a in (polygon, depth, is_inside))
    following, depth_after = np.roll(polygon, -1, axis=0), np.roll(depth, -1)
    crosses = np.flatnonzero(is_inside != np.roll(is_inside, -1))
    share = (depth[crosses] / (depth[crosses] - depth_after[crosses]))[:, None]
    points = polygon[crosses] + share * (following[crosses] - polygon[crosses])
    points[:, axis] = bound
    chains = []
    for k in range(0, len(crosses), 2):
        corners = polygon[crosses[k] + 1 : crosses[k + 1] + 1]
        chains.append(np.concatenate([points[k : k + 1], corners, points[k + 1 : k + 2]]))
    pieces = [np.concatenate([chains[i] for i in loop]) for loop in _loops(chains, 1 - axis)]
    return [piece for piece in pieces if len(piece) >= 3 and polygon_area(*piece.T) > _MIN_AREA]


def _loops(chains: Sequence[np.ndarray], along: int) -> list[list[int]]:
    """Return the chains that make up each part, in order.

    `along` is the axis along which the line runs.
    """
    if len(chains) == 1:
        return [[0]]
    # Along the line, the polygon's inside lies between the first crossing and the second, between
    # the third and the fourth, and so on: these pairs are joined. Crossings 2i and 2i + 1 are the
    # start and the end of chain i.
    places = np.array([chain[end, along] for chain in chains for end in (0, -1)])
    order = np.argsort(places, kind="stable")
    partner = np.empty(len(places), dtype=np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    following = partner[1::2]
    if (following % 2).any():
        # A polygon that crosses itself may pair two ends. Its chains are then joined in their
        # order, which covers the same pixels.
        return [list(range(len(chains)))]
    following = following // 2
    left, loops = set(range(len(chains))), []
    while left:
        loop = [left.pop()]
        while (chain := int(following[loop[-1]])) != loop[0]:
            left.discard(chain)
            loop.append(chain)
        loops.append(loop)
    return loops


class PadTransform(AxisAlignedTransform):
    """Adds a border of one value around the image."""

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
        border = [(self.y0, self.y1), (self.x0, self.x1)] + [(0, 0)] * (array.ndim - 2)
        # A mirrored view is padded as it lies in memory: 0.1 ms, not 2.
        order = memory_order(array)
        border = [sides[:: part.step] for sides, part in zip(border, order, strict=True)]
        return np.pad(array[order], border, constant_values=value)[order]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the shifted points."""
        return np.add(coords, [self.x0, self.y0])

    def inverse(self) -> Transform:
        """Return the crop that removes the border.

        Raises:
            NotImplementedError: The size without border was not given.
        """
        if self.orig_w is None or self.orig_h is None:
            raise NotImplementedError("the inverse of a padding needs orig_w and orig_h")
        padded_w, padded_h = self.orig_w + self.x0 + self.x1, self.orig_h + self.y0 + self.y1
        return CropTransform(self.x0, self.y0, self.orig_w, self.orig_h, padded_w, padded_h)


@AUGMENTATION_REGISTRY.register()
class RandomCrop(Augmentation):
    """Cuts out a window of a given or drawn size, anywhere in the image.

    Example:
        >>> import numpy as np
        >>> RandomCrop("absolute", (20, 30)).get_transform(np.zeros((20, 30, 3)))
        CropTransform(x0=0, y0=0, w=30, h=20, orig_w=30, orig_h=20)
    """

    def __init__(self, crop_type: str, crop_size: Sequence[float]) -> None:
        """Take the size of the window.

        Args:
            crop_type: The meaning of `crop_size`:

                - "relative": shares (height, width) of the image's sides, in (0, 1].
                - "relative_range": the smallest such shares; each is drawn between it and 1.
                - "absolute": (height, width) in pixels, at least 1.
                - "absolute_range": each side is drawn between these two numbers of pixels.
            crop_size: Two numbers. A window is never larger than the image.
        """
        if crop_type not in CROP_TYPES:
            raise ValueError(f"crop_type must be one of {', '.join(CROP_TYPES)}, got {crop_type!r}")
        if len(crop_size) != 2:
            raise ValueError(f"crop_size must be two numbers, got {list(crop_size)}")
        first, second = crop_size
        if crop_type.startswith("relative") and min(first, second) <= 0:
            raise ValueError(_no_shares(crop_type, crop_size))
        if crop_type.startswith("absolute") and min(first, second) < 1:
            raise ValueError(
                f"crop_size must be pixels, at least 1, for an {crop_type} crop, got"
                f" {list(crop_size)}"
            )
        if crop_type == "absolute_range" and first > second:
            raise ValueError(
                "crop_size must go from the smaller to the larger for an absolute_range crop, got"
                f" {list(crop_size)}"
            )
        self.crop_type = crop_type
        self.crop_size = (first, second)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a window.

        Raises:
            ValueError: A share is above 1.
        """
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        # The order of the draws is part of a run's reproducibility: y before x.
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
            return (
                _draw_side(int(first), int(second), height),
                _draw_side(int(first), int(second), width),
            )
        # Here and not at the door: Detectron2 lets one be built, and printed.
        if max(first, second) > 1:
            raise ValueError(_no_shares(self.crop_type, self.crop_size))
        if self.crop_type == "relative_range":
            smallest = np.array([first, second])
            first, second = smallest + np.random.rand(2) * (1 - smallest)
        return max(1, math.floor(height * first + 0.5)), max(1, math.floor(width * second + 0.5))


def _no_shares(crop_type: str, crop_size: Sequence[float]) -> str:
    return f"crop_size must be shares in (0, 1] for a {crop_type} crop, got {list(crop_size)}"


@AUGMENTATION_REGISTRY.register()
class RandomCropAroundInstance(RandomCrop):
    """Cuts out a window around the center of a random object; anywhere if there is no object.

    A window drawn without regard to the objects often holds none, and such a sample teaches
    background only.
    """

    def __init__(
        self, crop_type: str, crop_size: Sequence[float], prob_anywhere: float = 0.0
    ) -> None:
        """Take the window.

        Args:
            crop_type: See `RandomCrop`.
            crop_size: As there.
            prob_anywhere: Probability of a window without regard to the objects, in [0, 1].
        """
        super().__init__(crop_type, crop_size)
        if not 0 <= prob_anywhere <= 1:
            raise ValueError(f"prob_anywhere must lie in [0, 1], got {prob_anywhere}")
        self.prob_anywhere = prob_anywhere

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None = None) -> Transform:
        """Draw an object and a window around it."""
        # Nothing is drawn where it need not be: other draws would follow another order.
        is_anywhere = self.prob_anywhere > 0 and np.random.rand() < self.prob_anywhere
        if is_anywhere or boxes is None or len(boxes) == 0:
            return super().get_transform(image)
        height, width = image.shape[:2]
        crop_h, crop_w = self.get_crop_size((height, width))
        x1, y1, x2, y2 = boxes[np.random.randint(len(boxes))]
        y0 = draw_start_around((y1 + y2) / 2, crop_h, height)
        x0 = draw_start_around((x1 + x2) / 2, crop_w, width)
        return CropTransform(x0, y0, crop_w, crop_h, width, height)


@AUGMENTATION_REGISTRY.register()
class RandomCrop_CategoryAreaConstraint(RandomCrop):
    """Cuts out a window in which no class of the label map has more than a share of the pixels.

    After ten draws, the last window is taken whatever it holds.

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
            crop_type: See `RandomCrop`.
            crop_size: As there.
            single_category_max_area: Largest share of one class, in (0, 1].
            ignored_category: Label whose pixels are not counted at all.
        """
        super().__init__(crop_type, crop_size)
        if not 0 < single_category_max_area <= 1:
            raise ValueError(
                f"single_category_max_area must lie in (0, 1], got {single_category_max_area}"
            )
        self.single_category_max_area = single_category_max_area
        self.ignored_category = ignored_category

    def get_transform(self, image: np.ndarray, sem_seg: np.ndarray | None = None) -> Transform:
        """Draw windows until one satisfies the constraint."""
        window = super().get_transform(image)
        if self.single_category_max_area == 1:
            return window
        if sem_seg is None:
            raise DataError(
                "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA below 1 needs a label map of every image"
                " (sem_seg_file_name)"
            )
        for _ in range(self._NUM_DRAWS - 1):
            if self._is_varied(window.apply_segmentation(sem_seg)):
                break
            window = super().get_transform(image)
        return window

    def _is_varied(self, labels: np.ndarray) -> bool:
        found, counts = np.unique(labels, return_counts=True)
        if self.ignored_category is not None:
            counts = counts[found != self.ignored_category]
        return len(counts) > 1 and counts.max() < counts.sum() * self.single_category_max_area


@AUGMENTATION_REGISTRY.register()
class FixedSizeCrop(Augmentation):
    """Cuts out a window of a fixed size, and pads what is smaller at the right and the bottom.

    Example:
        >>> import numpy as np
        >>> FixedSizeCrop((30, 40)).get_transform(np.zeros((20, 40, 3))).apply_image(
        ...     np.zeros((20, 40, 3))
        ... ).shape
        (30, 40, 3)
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        pad: bool = True,
        pad_value: float = 128.0,
        seg_pad_value: int = 255,
    ) -> None:
        """Take the window's `(height, width)` in pixels.

        Args:
            crop_size: At least 1 each.
            pad: Whether smaller images are padded; the model pads a batch anyway, with the mean.
            pad_value: Pixel value of the padding.
            seg_pad_value: Its label in label maps.
        """
        if len(crop_size) != 2 or min(crop_size) < 1:
            raise ValueError(
                f"crop_size must be (height, width), at least 1 each, got {list(crop_size)}"
            )
        self.crop_size = (int(crop_size[0]), int(crop_size[1]))
        self.pad, self.pad_value, self.seg_pad_value = pad, pad_value, seg_pad_value

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a window."""
        height, width = image.shape[:2]
        crop_h, crop_w = min(self.crop_size[0], height), min(self.crop_size[1], width)
        # One draw for both axes, as in Detectron2: the window moves along the image's diagonal.
        share = np.random.uniform()
        y0, x0 = round((height - crop_h) * share), round((width - crop_w) * share)
        crop = CropTransform(x0, y0, crop_w, crop_h, width, height)
        below, right = self.crop_size[0] - crop_h, self.crop_size[1] - crop_w
        if not self.pad or not (below or right):
            return crop
        padding = PadTransform(
            0, 0, right, below, crop_w, crop_h, self.pad_value, self.seg_pad_value
        )
        return TransformList([crop, padding])


@AUGMENTATION_REGISTRY.register()
class MinIoURandomCrop(Augmentation):
    """Cuts out a window that overlaps every object by at least a drawn IoU, or leaves the image.

    Objects whose centre lies outside the window do not count.

    Source: Liu et al. 2015, arXiv 1512.02325, section 2.2.
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        min_crop_size: float = 0.3,
        mode_trials: int = 1000,
        crop_trials: int = 50,
    ) -> None:
        """Take the overlaps.

        Args:
            min_ious: One of them is drawn, or 0, or none: then the image stays whole.
            min_crop_size: Smallest side of the window, in sides of the image.
            mode_trials: How often an overlap is drawn before the image is left as it is.
            crop_trials: Windows that are drawn for an overlap.
        """
        self.min_ious = min_ious
        self.min_crop_size = min_crop_size
        self.mode_trials = mode_trials
        self.crop_trials = crop_trials

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None = None) -> Transform:
        """Draw a window."""
        height, width = image.shape[:2]
        if boxes is None or len(boxes) == 0:
            return NoOpTransform()
        for _ in range(self.mode_trials):
            min_iou = np.random.choice((1.0, *self.min_ious, 0.0))
            if min_iou == 1:
                return NoOpTransform()
            for _ in range(self.crop_trials):
                crop_w = np.random.uniform(self.min_crop_size * width, width)
                crop_h = np.random.uniform(self.min_crop_size * height, height)
                if not 0.5 <= crop_h / crop_w <= 2:
                    continue
                left, top = np.random.uniform(width - crop_w), np.random.uniform(height - crop_h)
                window = np.array([left, top, left + crop_w, top + crop_h]).astype(int)
                if self._is_kept(window, boxes, min_iou):
                    x0, y0, x1, y1 = window.tolist()
                    return CropTransform(x0, y0, x1 - x0, y1 - y0, width, height)
        return NoOpTransform()

    @staticmethod
    def _is_kept(window: np.ndarray, boxes: np.ndarray, min_iou: float) -> bool:
        sides = window[2:] - window[:2]
        if min(sides) < 1:
            return False
        low, high = np.maximum(boxes[:, :2], window[:2]), np.minimum(boxes[:, 2:], window[2:])
        shared = (high - low).clip(min=0).prod(axis=1)
        union = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + sides.prod() - shared
        centers = (boxes[:, :2] + boxes[:, 2:]) / 2
        has_center = ((centers > window[:2]) & (centers < window[2:])).all(axis=1)
        return bool((shared / union).min() >= min_iou and has_center.any())


def draw_start_around(center: float, crop_side: int, image_side: int) -> int:
    """Draw the start of a window that contains `center` and lies within the image."""
    center = min(max(center, 0.0), image_side - 1e-6)  # annotations may lie outside of their image
    first = max(math.floor(center) + 1 - crop_side, 0)
    last = min(math.floor(center), image_side - crop_side)
    return int(np.random.randint(first, last + 1))


def _draw_side(smallest: int, largest: int, image_side: int) -> int:
    return int(np.random.randint(min(smallest, image_side), min(largest, image_side) + 1))
