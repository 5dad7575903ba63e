"""Changes of color, without geometry.

Strengths and formulas are those of Detectron2; strength 1 leaves an image unchanged.

Legend: H and W height and width, C channels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from detkit.data.transforms.augmentation import AUGMENTATION_REGISTRY, Augmentation
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


def _require_three_channels(augmentation: Augmentation, image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"{type(augmentation).__name__} needs an RGB image (H, W, 3), got shape {image.shape}"
        )
