"""Flips and resizing.

Legend: H and W height and width, C channels, P points.
"""

import sys
from collections.abc import Sequence

import fvcore.transforms.transform as fvcore
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from detkit.data.transforms.augmentation import (
    AUGMENTATION_REGISTRY,
    Augmentation,
    require_probability,
)
from detkit.data.transforms.transform import (
    AxisAlignedTransform,
    NoOpTransform,
    Transform,
    memory_order,
)
from detkit.utils.resize_rule import shortest_edge_size, torchvision_size

BILINEAR = int(Image.Resampling.BILINEAR)
NEAREST = int(Image.Resampling.NEAREST)
_TORCH_MODES = {
    BILINEAR: "bilinear",
    NEAREST: "nearest-exact",
    int(Image.Resampling.BICUBIC): "bicubic",
}


class HFlipTransform(AxisAlignedTransform):
    """Mirrors left and right."""

    def __init__(self, width: int) -> None:
        """Take the image's width in pixels."""
        self.width = width

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return a mirrored view; the mapper makes the one copy."""
        return img[:, ::-1]  # continuous coordinates: no width - 1 in `apply_coords`

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the mirrored points."""
        return np.stack([self.width - coords[:, 0], coords[:, 1]], axis=1)

    def inverse(self) -> Transform:
        """Return this transform."""
        return self


def is_mirrored(transforms: Transform) -> bool:
    """Return whether transforms, fvcore's too, exchange left and right."""
    # Two flips cancel out. A vertical one does not exchange left and right, as in Detectron2.
    parts = getattr(transforms, "transforms", None)
    if parts is None:
        return isinstance(transforms, fvcore.HFlipTransform)
    return sum(map(is_mirrored, parts)) % 2 == 1


class VFlipTransform(AxisAlignedTransform):
    """Mirrors top and bottom."""

    def __init__(self, height: int) -> None:
        """Take the image's height in pixels."""
        self.height = height

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return a mirrored view; the mapper makes the one copy."""
        return img[::-1]

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the mirrored points."""
        return np.stack([coords[:, 0], self.height - coords[:, 1]], axis=1)

    def inverse(self) -> Transform:
        """Return this transform."""
        return self


class ResizeTransform(AxisAlignedTransform):
    """Scales to a new size, with antialiasing where it gets smaller."""

    def __init__(
        self, h: int, w: int, new_h: int, new_w: int, interp: int | str | None = None
    ) -> None:
        """Take old and new size.

        Args:
            h: Height of the images in pixels.
            w: Their width.
            new_h: Height of the resized images.
            new_w: Their width.
            interp: One of PIL's resampling filters NEAREST, BILINEAR, BICUBIC, or its name in small
                letters, as fvcore has it; None is BILINEAR.
                Label maps are always resized by the nearest pixel.
        """
        if min(h, w, new_h, new_w) < 1:
            raise ValueError(
                f"cannot resize {h}x{w} to {new_h}x{new_w} (height x width): sides must be at"
                " least 1"
            )
        if isinstance(interp, str):
            named = {mode.removesuffix("-exact"): kind for kind, mode in _TORCH_MODES.items()}
            interp = named.get(interp, interp)
        interp = BILINEAR if interp is None else interp
        if interp not in _TORCH_MODES:
            raise ValueError(f"interp must be PIL's NEAREST, BILINEAR or BICUBIC, got {interp!r}")
        self.h, self.w, self.new_h, self.new_w = h, w, new_h, new_w
        self.interp = int(interp)

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Return the resized image.

        Raises:
            ValueError: The image does not have the size `(h, w)`.
        """
        self._require_size(img)
        if (self.h, self.w) == (self.new_h, self.new_w):
            return img
        mode = _TORCH_MODES[self.interp if interp is None else int(interp)]
        return resize_array(img, (self.new_h, self.new_w), mode)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the label map resized by the nearest pixel.

        Raises:
            ValueError: The label map does not have the size `(h, w)`.
        """
        self._require_size(segmentation)
        # Indexing takes 0.3 ms from 480x640 to 800x1067, torch's nearest mode 1.7 ms, and an image
        # may have many masks.
        columns, rows = _nearest(self.w, self.new_w), _nearest(self.h, self.new_h)
        return np.take(np.take(segmentation, columns, axis=1), rows, axis=0)

    def _require_size(self, img: np.ndarray) -> None:
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(
                f"made for images of {self.h}x{self.w} (height x width), got one of shape"
                f" {img.shape}"
            )

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the scaled points."""
        return coords * [self.new_w / self.w, self.new_h / self.h]

    def inverse(self) -> Transform:
        """Return the resize to the old size."""
        return ResizeTransform(self.new_h, self.new_w, self.h, self.w, self.interp)


def _nearest(old: int, new: int) -> np.ndarray:
    """Return, for each of `new` pixels along a side, the one of `old` that holds its middle."""
    return np.minimum((np.arange(new) + 0.5) * (old / new), old - 1).astype(np.int64)


def resize_array(img: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Return an image scaled to `size`, antialiased, by torch.

    It differs from PIL by at most one level of 255.

    Args:
        img: (H, W, C) or (H, W), uint8 or anything that torch converts to float.
        size: `(height, width)` of the result.
        mode: "bilinear", "bicubic" or "nearest-exact".
    """
    # torch knows no negative strides. A resize treats all channels alike, and left like right, so
    # the image is resized as it was before it was mirrored, and a mirrored view is returned.
    order = memory_order(img)
    pixels = np.ascontiguousarray(img[order])
    if not pixels.flags.writeable:  # torch would warn, although it does not write
        pixels = pixels.copy()
    # float64 holds every label and every integer below 2**53 exactly.
    exact = pixels
    if pixels.dtype not in (np.uint8, np.float32, np.float64):
        exact = pixels.astype(np.float64)
    # torch's kernel for uint8 in interleaved memory makes this fast: 1.3 ms from 480x640 to
    # 800x1067, where planar memory takes 3.1 ms and PIL 7 to 10 ms (one thread, medians). torch
    # recognizes the channels-last strides of a single image only if the batch dimension is first.
    interleaved = torch.from_numpy(exact[:, :, None] if img.ndim == 2 else exact)
    batch = interleaved[None].permute(0, 3, 1, 2)
    antialias = mode != "nearest-exact"
    align_corners = False if antialias else None
    resized = F.interpolate(
        batch, size=size, mode=mode, align_corners=align_corners, antialias=antialias
    )
    array = resized[0].permute(1, 2, 0).numpy()
    if array.dtype != pixels.dtype:
        if np.issubdtype(pixels.dtype, np.integer):
            limits = np.iinfo(pixels.dtype)
            array = np.rint(array).clip(limits.min, limits.max)
        array = array.astype(pixels.dtype)
    return (array[:, :, 0] if img.ndim == 2 else array)[order]


@AUGMENTATION_REGISTRY.register()
class RandomFlip(Augmentation):
    """Mirrors with probability `prob`, either left and right or top and bottom.

    Example:
        >>> import numpy as np
        >>> RandomFlip(prob=1.0).get_transform(np.zeros((24, 32, 3)))
        HFlipTransform(width=32)
    """

    def __init__(
        self, prob: float = 0.5, *, horizontal: bool = True, vertical: bool = False
    ) -> None:
        if horizontal == vertical:
            raise ValueError(
                f"RandomFlip is either horizontal or vertical, got horizontal={horizontal},"
                f" vertical={vertical}; use two of them for both directions"
            )
        self.prob = require_probability(prob)
        self.horizontal = horizontal
        self.vertical = vertical

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw whether to flip."""
        height, width = image.shape[:2]
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        return HFlipTransform(width) if self.horizontal else VFlipTransform(height)


@AUGMENTATION_REGISTRY.register()
class Resize(Augmentation):
    """Scales to a fixed size, without regard to the aspect ratio."""

    def __init__(self, shape: int | tuple[int, int], interp: int = BILINEAR) -> None:
        """Take `(height, width)`, or one number for both."""
        self.shape = (shape, shape) if isinstance(shape, int) else (int(shape[0]), int(shape[1]))
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Return the resize of this image."""
        height, width = image.shape[:2]
        return ResizeTransform(height, width, *self.shape, self.interp)


@AUGMENTATION_REGISTRY.register()
class RandomResize(Augmentation):
    """Scales to one of several sizes, without regard to the aspect ratio."""

    def __init__(self, shape_list: Sequence[tuple[int, int]], interp: int = BILINEAR) -> None:
        """Take the sizes `(height, width)`, at least one."""
        if not shape_list:
            raise ValueError("shape_list needs at least one (height, width)")
        self.shape_list = shape_list
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a size."""
        new_height, new_width = self.shape_list[np.random.randint(len(self.shape_list))]
        height, width = image.shape[:2]
        return ResizeTransform(height, width, new_height, new_width, self.interp)


@AUGMENTATION_REGISTRY.register()
class ResizeShortestEdge(Augmentation):
    """Scales the shorter side to a drawn length and the longer one to at most `max_size`.

    The aspect ratio is kept.

    Example:
        >>> ResizeShortestEdge.get_output_shape(480, 640, 800, 1333)
        (800, 1067)
    """

    _resize: type[ResizeTransform] = ResizeTransform

    def __init__(
        self,
        short_edge_length: int | Sequence[int],
        max_size: int = sys.maxsize,
        sample_style: str = "range",
        interp: int = BILINEAR,
    ) -> None:
        """Take the lengths to draw from.

        Args:
            short_edge_length: Length in pixels; or several: with "choice" one of them is drawn,
                with "range" a number between the two, ends included. 0 leaves the image unchanged.
            max_size: Largest length of the longer side, in pixels.
            sample_style: "choice" or "range".
            interp: See `ResizeTransform`.
        """
        is_single = isinstance(short_edge_length, int)
        lengths = (short_edge_length,) if is_single else tuple(short_edge_length)
        if sample_style not in ("choice", "range"):
            raise ValueError(f"sample_style must be 'choice' or 'range', got {sample_style!r}")
        if sample_style == "range" and (len(lengths) not in (1, 2) or lengths[0] > lengths[-1]):
            raise ValueError(
                "sample_style 'range' draws between two lengths (shorter, longer), got"
                f" {list(lengths)}"
            )
        if not lengths or min(lengths) < 0:
            raise ValueError(
                f"short_edge_length needs lengths of 0 or more pixels, got {list(lengths)}"
            )
        self.short_edge_length = lengths
        self.max_size = max_size
        self.sample_style = sample_style
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a length."""
        height, width = image.shape[:2]
        lengths = self.short_edge_length
        if self.sample_style == "range":
            length = int(np.random.randint(lengths[0], lengths[-1] + 1))
        else:
            length = lengths[np.random.randint(len(lengths))]
        if length == 0:
            return NoOpTransform()
        new_height, new_width = self.get_output_shape(height, width, length, self.max_size)
        return self._resize(height, width, new_height, new_width, self.interp)

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """Return the `(height, width)` that an image of `(oldh, oldw)` is resized to."""
        return shortest_edge_size(oldh, oldw, short_edge_length, max_size)


@AUGMENTATION_REGISTRY.register()
class ResizeScale(Augmentation):
    """Scales to fit into a target size times a drawn factor: the scale of large-scale jitter.

    The aspect ratio is kept. With factors from 0.1 to 2 and a `FixedSizeCrop` of the target size it
    is the augmentation of Ghiasi et al. 2020, arXiv 2012.07177, section 3.

    Example:
        >>> import numpy as np
        >>> ResizeScale(0.5, 0.5, 1024, 1024).get_transform(np.zeros((480, 640, 3)))
        ResizeTransform(h=480, w=640, new_h=384, new_w=512, interp=2)
    """

    def __init__(
        self,
        min_scale: float,
        max_scale: float,
        target_height: int,
        target_width: int,
        interp: int = BILINEAR,
    ) -> None:
        """Take the range of the factor, above 0, and the target size in pixels."""
        if not 0 < min_scale <= max_scale:
            raise ValueError(
                f"the factors must be above 0 and min_scale at most max_scale, got {min_scale=},"
                f" {max_scale=}"
            )
        if min(target_height, target_width) < 1:
            raise ValueError(
                f"the target size must be at least 1, got {target_height=}, {target_width=}"
            )
        self.min_scale, self.max_scale = min_scale, max_scale
        self.target_height, self.target_width = target_height, target_width
        self.interp = interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a factor."""
        height, width = image.shape[:2]
        factor = np.random.uniform(self.min_scale, self.max_scale)
        scale = min(self.target_height * factor / height, self.target_width * factor / width)
        # round() is Detectron2's np.round here: half to even. A thin image keeps one pixel.
        new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
        return ResizeTransform(height, width, new_height, new_width, self.interp)


class TorchvisionResizeTransform(ResizeTransform):
    """Scales to a new size bilinearly, in float32 and without antialiasing."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Return the resized image as float32; with `interp`, as `ResizeTransform` does.

        Raises:
            ValueError: The image does not have the size `(h, w)`.
        """
        if interp is not None or (self.h, self.w) == (self.new_h, self.new_w):
            return super().apply_image(img, interp)
        self._require_size(img)
        pixels = torch.from_numpy(np.array(img, dtype=np.float32, order="C"))
        planes = (pixels[:, :, None] if img.ndim == 2 else pixels).permute(2, 0, 1)[None]
        size = (self.new_h, self.new_w)
        resized = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
        array = resized[0].permute(1, 2, 0).numpy()
        return array[:, :, 0] if img.ndim == 2 else array


@AUGMENTATION_REGISTRY.register()
class TorchvisionResizeShortestEdge(ResizeShortestEdge):
    """The resize of torchvision's detectors, for weights that were trained with it.

    It differs from `ResizeShortestEdge` in three ways, which move boxes by up to a pixel: pixels
    become floating-point numbers, nothing is antialiased when an image gets smaller, and sides are
    rounded down.
    """

    _resize = TorchvisionResizeTransform

    @staticmethod
    def get_output_shape(
        oldh: int, oldw: int, short_edge_length: int, max_size: int
    ) -> tuple[int, int]:
        """Return the `(height, width)` that an image of `(oldh, oldw)` is resized to."""
        return torchvision_size(oldh, oldw, short_edge_length, max_size)
