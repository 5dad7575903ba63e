"""Changes of color, without geometry.

Strengths and formulas are those of Detectron2; strength 1 leaves an image unchanged. Names and
arguments of those that torchvision has too are torchvision's, whose kernels they call.

Legend: H and W height and width, C channels.
"""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from detkit.data.transforms.augmentation import AUGMENTATION_REGISTRY, Augmentation, as_range
from detkit.data.transforms.transform import AxisAlignedTransform, NoOpTransform, Transform

# Weights of red, green and blue in gray. Source: ITU-R BT.601.
_GRAY_WEIGHTS = np.array([0.299, 0.587, 0.114])
# Principal components of ImageNet's colors, on a scale of 0 to 1. Source: Krizhevsky et al. 2012,
# section 4.1, with the numbers of fb.resnet.torch.
_COLOR_DIRECTIONS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
    dtype=np.float64,
)
_COLOR_VARIANCES = np.array([0.2175, 0.0188, 0.0045])


class BlendTransform(AxisAlignedTransform):
    """Mixes the image with another: `src_weight * src_image + dst_weight * image`."""

    def __init__(self, src_image: np.ndarray | float, src_weight: float, dst_weight: float) -> None:
        """Take the other image, a number or an array that broadcasts to (H, W, C), and weights."""
        self.src_image = src_image
        self.src_weight = src_weight
        self.dst_weight = dst_weight

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the mixture; for a uint8 image, clipped to [0, 255] and truncated."""
        if img.dtype != np.uint8:
            return (self._mixed(img)).astype(img.dtype, copy=False)
        if np.ndim(self.src_image) == 0:
            # All pixels of one level become the same, so that 256 values are computed, not 900,000.
            return self._mixed(np.arange(256)).clip(0, 255).astype(np.uint8)[img]
        return self._mixed(img).clip(0, 255).astype(np.uint8)

    def _mixed(self, levels: np.ndarray) -> np.ndarray:
        levels = levels.astype(np.float32, copy=False)
        return np.float32(self.dst_weight) * levels + np.float32(self.src_weight) * np.float32(
            self.src_image
        )

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points themselves."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the label map itself."""
        return segmentation


class ColorTransform(AxisAlignedTransform):
    """Changes the pixels by a function of the image."""

    def __init__(self, op: Callable[[Any], Any]) -> None:
        """Take the function, of an array (H, W, C), to one of the same shape."""
        if not callable(op):
            raise ValueError(f"op must be a function of an image, got {op!r}")
        self.op = op

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return what the function returns."""
        return self.op(img)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points themselves."""
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the label map itself."""
        return segmentation

    def inverse(self) -> Transform:
        """Return the transform that leaves everything: the geometry is not changed."""
        return NoOpTransform()


class PILColorTransform(ColorTransform):
    """A `ColorTransform` by a function of a PIL image, such as those of `ImageOps`."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return what the function returns, as an array."""
        return np.asarray(self.op(Image.fromarray(np.ascontiguousarray(img))))


class _RandomStrength(Augmentation):
    """An augmentation with a random strength between two bounds."""

    def __init__(self, intensity_min: float, intensity_max: float) -> None:
        """Take the bounds; strength 1 leaves the image unchanged."""
        if intensity_min > intensity_max:
            raise ValueError(
                f"intensity_min must not exceed intensity_max, got {intensity_min} >"
                f" {intensity_max}"
            )
        self.intensity_min = intensity_min
        self.intensity_max = intensity_max

    def _draw(self) -> float:
        return float(np.random.uniform(self.intensity_min, self.intensity_max))


@AUGMENTATION_REGISTRY.register()
class RandomContrast(_RandomStrength):
    """Blends the image with its mean (strength below 1), or away from it."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a strength."""
        strength = self._draw()
        return BlendTransform(
            src_image=float(image.mean()), src_weight=1 - strength, dst_weight=strength
        )


@AUGMENTATION_REGISTRY.register()
class RandomBrightness(_RandomStrength):
    """Blends the image with black (strength below 1), or away from it."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a strength."""
        strength = self._draw()
        return BlendTransform(src_image=0.0, src_weight=1 - strength, dst_weight=strength)


@AUGMENTATION_REGISTRY.register()
class RandomSaturation(_RandomStrength):
    """Blends an RGB image with its gray version (strength below 1), or away from it."""

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a strength."""
        _require_three_channels(self, image)
        strength = self._draw()
        gray = image.dot(_GRAY_WEIGHTS)[:, :, None]
        return BlendTransform(src_image=gray, src_weight=1 - strength, dst_weight=strength)


@AUGMENTATION_REGISTRY.register()
class RandomLighting(Augmentation):
    """Shifts the colors of an RGB image along the principal components of ImageNet's colors.

    As in Detectron2, the shift is on a scale of 0 to 1, the image on one of 0 to 255: only a large
    `scale` is visible.

    Source: Krizhevsky et al. 2012, section 4.1.
    """

    def __init__(self, scale: float) -> None:
        """Take the standard deviation of the draws."""
        self.scale = scale

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a shift."""
        _require_three_channels(self, image)
        weights = np.random.normal(scale=self.scale, size=3)
        shift = _COLOR_DIRECTIONS.dot(weights * _COLOR_VARIANCES)
        return BlendTransform(src_image=shift, src_weight=1.0, dst_weight=1.0)


@AUGMENTATION_REGISTRY.register()
class ColorJitter(Augmentation):
    """Changes brightness, contrast, saturation and hue, in a drawn order."""

    def __init__(
        self,
        brightness: float | Sequence[float] = 0.0,
        contrast: float | Sequence[float] = 0.0,
        saturation: float | Sequence[float] = 0.0,
        hue: float | Sequence[float] = 0.0,
    ) -> None:
        """Take the ranges to draw factors from: two numbers, or one for a range around 1.

        That of hue lies around 0, within [-0.5, 0.5], in turns of the colour circle.
        """
        self.brightness = as_range("brightness", brightness, around=1, low=0)
        self.contrast = as_range("contrast", contrast, around=1, low=0)
        self.saturation = as_range("saturation", saturation, around=1, low=0)
        self.hue = as_range("hue", hue, low=-0.5, high=0.5)

    def get_transform(self, image: np.ndarray, image_format: str) -> Transform:
        """Draw factors and their order."""
        changes: list[tuple[Callable[[Tensor, float], Tensor], float]] = []
        for change, ends, neutral in (
            (V.adjust_brightness, self.brightness, 1),
            (V.adjust_contrast, self.contrast, 1),
            (V.adjust_saturation, self.saturation, 1),
            (V.adjust_hue, self.hue, 0),
        ):
            if ends != (neutral, neutral):
                changes.append((change, float(np.random.uniform(*ends))))
        order = np.random.permutation(len(changes))

        def jitter(pixels: Tensor) -> Tensor:
            for k in order:
                pixels = changes[k][0](pixels, changes[k][1])
            return pixels

        return _on_rgb(self, image, image_format, jitter)


@AUGMENTATION_REGISTRY.register()
class RandomGrayscale(Augmentation):
    """Takes the color away; the number of channels stays."""

    def get_transform(self, image: np.ndarray, image_format: str) -> Transform:
        """Return the change."""
        channels = image.shape[-1]
        return _on_rgb(
            self, image, image_format, lambda pixels: V.rgb_to_grayscale(pixels, channels)
        )


@AUGMENTATION_REGISTRY.register()
class JPEG(Augmentation):
    """Compresses as JPEG of a drawn quality."""

    def __init__(self, quality: int | Sequence[int] = (25, 95)) -> None:
        """Take the quality, 1 to 100, or the lowest and the highest one."""
        ends = [quality, quality] if isinstance(quality, int) else quality
        self.quality = as_range("quality", ends, low=1, high=100)

    def get_transform(self, image: np.ndarray, image_format: str) -> Transform:
        """Draw a quality."""
        lowest, highest = (round(end) for end in self.quality)
        quality = int(np.random.randint(lowest, highest + 1))

        # By PIL: torchvision has announced the end of its own.
        def compress(pixels: Tensor) -> Tensor:
            file = io.BytesIO()
            V.to_pil_image(pixels).save(file, "JPEG", quality=quality)
            return V.pil_to_tensor(Image.open(file))

        return _on_rgb(self, image, image_format, compress)


@AUGMENTATION_REGISTRY.register()
class GaussianBlur(Augmentation):
    """Blurs with a drawn width. Any number of channels, bytes or floats."""

    def __init__(self, sigma: float | Sequence[float] = (0.1, 2.0)) -> None:
        """Take the standard deviation in pixels, above 0, or the smallest and the largest one."""
        ends = [sigma, sigma] if isinstance(sigma, int | float) else sigma
        self.sigma = as_range("sigma", ends, low=1e-3)

    def get_transform(self) -> Transform:
        """Draw a width."""
        sigma = float(np.random.uniform(*self.sigma))

        def blur(image: np.ndarray) -> np.ndarray:
            # Three standard deviations; the border is mirrored, which needs less than a side.
            radius = min(math.ceil(3 * sigma), min(image.shape[:2]) - 1)
            if radius == 0:
                return image
            kernel = [2 * radius + 1] * 2
            return _by_torch(image, lambda pixels: V.gaussian_blur(pixels, kernel, [sigma, sigma]))

        return ColorTransform(blur)


@AUGMENTATION_REGISTRY.register()
class GaussianNoise(Augmentation):
    """Adds noise that is independent for each value."""

    def __init__(self, std: float | Sequence[float] = (0.0, 12.0)) -> None:
        """Take the standard deviation on the scale of the pixels, or smallest and largest one."""
        ends = [std, std] if isinstance(std, int | float) else std
        self.std = as_range("std", ends, low=0)

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw strength and noise."""
        noise = np.random.standard_normal(image.shape).astype(np.float32)
        noise *= np.float32(np.random.uniform(*self.std))

        def add(image: np.ndarray) -> np.ndarray:
            noisy = image + noise
            if np.issubdtype(image.dtype, np.integer):
                limits = np.iinfo(image.dtype)
                noisy = np.rint(noisy).clip(limits.min, limits.max)
            return noisy.astype(image.dtype, copy=False)

        return ColorTransform(add)


@AUGMENTATION_REGISTRY.register()
class RandomErasing(Augmentation):
    """Fills drawn rectangles with one value; objects below keep their annotations.

    Source: Zhong et al. 2017, arXiv 1708.04896.
    """

    def __init__(
        self,
        scale: Sequence[float] = (0.02, 0.2),
        ratio: Sequence[float] = (0.3, 3.3),
        value: float = 128,
        num: int = 1,
    ) -> None:
        """Take the size of the rectangles.

        Args:
            scale: Smallest and largest area, in areas of the image.
            ratio: Smallest and largest height / width.
            value: Pixel value to fill with.
            num: Number of rectangles.
        """
        self.scale = as_range("scale", scale, low=0, high=1)
        self.ratio = as_range("ratio", ratio, low=1e-3, high=1e3)
        self.value, self.num = value, num
        if not 0 <= value <= 255 or num < 1:
            raise ValueError(
                f"value must lie in [0, 255] and num be at least 1, got {value=}, {num=}"
            )

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw the rectangles."""
        size = np.array(image.shape[:2])
        areas = np.random.uniform(*self.scale, self.num) * size.prod()
        ratios = np.exp(np.random.uniform(*np.log(self.ratio).tolist(), size=self.num))
        sides = np.sqrt(areas * np.stack([ratios, 1 / ratios])).T
        sides = np.minimum(np.rint(sides), size).astype(int)
        starts = (np.random.rand(self.num, 2) * (size - sides + 1)).astype(int)

        def erase(image: np.ndarray) -> np.ndarray:
            erased = image.copy()
            for (y, x), (height, width) in zip(starts, sides, strict=True):
                erased[y : y + height, x : x + width] = self.value
            return erased

        return ColorTransform(erase)


def _on_rgb(
    augmentation: Augmentation,
    image: np.ndarray,
    image_format: str,
    change: Callable[[Tensor], Tensor],
) -> Transform:
    """Return a function of (C, H, W) RGB or gray bytes as a transform of images like `image`."""
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(
            f"{type(augmentation).__name__} needs bytes (uint8) in 3 channels or 1, (H, W, C), got"
            f" {image.dtype} of shape {image.shape}"
        )
    # A view with mirrored channels; an image of one channel is the same either way.
    step = -1 if image_format == "BGR" else 1
    return ColorTransform(lambda img: _by_torch(img[:, :, ::step], change)[:, :, ::step])


def _by_torch(image: np.ndarray, change: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return what a function of (C, H, W) makes of an image (H, W, C) or (H, W)."""
    pixels = torch.from_numpy(np.array(image[..., None] if image.ndim == 2 else image, order="C"))
    changed = change(pixels.permute(2, 0, 1)).permute(1, 2, 0).numpy()
    return changed[:, :, 0] if image.ndim == 2 else changed


def _require_three_channels(augmentation: Augmentation, image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{type(augmentation).__name__} needs an RGB image (H, W, 3), got shape {image.shape}"
        )
