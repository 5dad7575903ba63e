"""Rotations, affine and perspective maps, windows that leave the image, and sampling grids.

Legend: H and W height and width, C channels, P points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from detkit.data.transforms.augmentation import AUGMENTATION_REGISTRY, Augmentation, as_range
from detkit.data.transforms.crop import CropTransform, clip_polygons
from detkit.data.transforms.geometry import BILINEAR
from detkit.data.transforms.transform import (
    AxisAlignedTransform,
    NoOpTransform,
    Transform,
    TransformList,
)

_NEAREST = 0
# By OpenCV's numbers of its filters, which Detectron2's `interp` of a rotation is.
_MODES = {_NEAREST: "nearest", 1: "bilinear", 2: "bicubic"}


def sample_image(
    img: np.ndarray, grid: Tensor, mode: str, fill: float = 0.0, padding_mode: str = "zeros"
) -> np.ndarray:
    """Return an image sampled at points.

    Args:
        img: (H, W, C) or (H, W).
        grid: (new H, new W, 2) x and y of the points, scaled so that the image spans [-1, 1].
        mode: See `torch.nn.functional.grid_sample`.
        fill: Value of points outside.
        padding_mode: "zeros" takes `fill` outside, "border" the nearest pixel.
    """
    exact = np.ascontiguousarray(img[..., None] if img.ndim == 2 else img)
    # float64 holds every label exactly.
    is_single = exact.dtype in (np.uint8, np.float32)
    values = torch.from_numpy(exact.astype(np.float32 if is_single else np.float64)) - fill
    sampled = F.grid_sample(
        values.permute(2, 0, 1)[None],
        grid.to(values.dtype)[None],
        mode=mode,
        padding_mode=padding_mode,
        align_corners=False,
    )
    array = (sampled[0].permute(1, 2, 0) + fill).numpy()
    if np.issubdtype(img.dtype, np.integer):
        limits = np.iinfo(img.dtype)
        array = np.rint(array).clip(limits.min, limits.max)
    array = array.astype(img.dtype, copy=False)
    return array[:, :, 0] if img.ndim == 2 else array


def _grid_of(
    to_input: Callable[[np.ndarray], np.ndarray], size: tuple[int, int], input_size: tuple[int, int]
) -> Tensor:
    """Return the grid of `sample_image` for a map from output points (P, 2) to input points."""
    height, width = size
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    points = to_input(np.stack([x, y], axis=-1).reshape(-1, 2))
    scaled = points * 2 / [input_size[1], input_size[0]] - 1
    return torch.from_numpy(scaled.reshape(height, width, 2))


class RotationTransform(Transform):
    """Rotates counter-clockwise around a point; what comes from outside the image is 0."""

    def __init__(
        self,
        h: int,
        w: int,
        angle: float,
        expand: bool = True,
        center: Sequence[float] | None = None,
        interp: int | None = None,
    ) -> None:
        """Take the size of the images and the angle.

        Args:
            h: Height in pixels.
            w: Width in pixels.
            angle: In degrees.
            expand: Whether the output is as large as it takes to hold all of the image, in the
                middle. Otherwise it has the size of the image.
            center: x and y to rotate around; None for the middle. With `expand` it has no effect.
            interp: OpenCV's number of a filter: 0 nearest, 1 bilinear, 2 bicubic; None is bilinear.
                Label maps always take the nearest pixel.

        Raises:
            ValueError: `interp` is another number.
        """
        interp = 1 if interp is None else int(interp)
        if interp not in _MODES:
            raise ValueError(f"interp must be 0, 1 or 2 (OpenCV's filters), got {interp}")
        middle = np.array([w / 2, h / 2])
        self.h, self.w, self.angle, self.expand = h, w, angle, expand
        self.center = tuple(middle if center is None else np.asarray(center, dtype=np.float64))
        self.interp = interp
        # Rounded, so that a quarter turn is exact.
        cos, sin = np.round([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))], 15)
        self._rotation = np.array([[cos, sin], [-sin, cos]])  # y points down
        self.bound_h, self.bound_w = h, w
        self._shift = np.asarray(self.center) - self._rotation @ np.asarray(self.center)
        if expand:
            bounds = np.abs(self._rotation) @ [w, h]
            self.bound_w, self.bound_h = (int(side) for side in np.rint(bounds))
            self._shift = np.array([self.bound_w, self.bound_h]) / 2 - self._rotation @ middle

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Return the rotated image."""
        if len(img) == 0 or self.angle % 360 == 0:
            return img
        rotation, shift = self._rotation, self._shift
        grid = _grid_of(
            lambda points: (points - shift) @ rotation,
            (self.bound_h, self.bound_w),
            (self.h, self.w),
        )
        return sample_image(img, grid, _MODES[self.interp if interp is None else interp])

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the rotated points."""
        coords = np.asarray(coords, dtype=np.float64)
        if len(coords) == 0 or self.angle % 360 == 0:
            return coords
        return coords @ self._rotation.T + self._shift

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the rotated label map; 0 outside."""
        return self.apply_image(segmentation, interp=_NEAREST)

    def inverse(self) -> Transform:
        """Return the rotation back, and the crop that removes what was added around the image.

        Raises:
            NotImplementedError: Without `expand`, parts of the image are lost.
        """
        if not self.expand:
            raise NotImplementedError("a rotation without expand loses parts of the image")
        back = RotationTransform(self.bound_h, self.bound_w, -self.angle, True, None, self.interp)
        x0, y0 = (back.bound_w - self.w) // 2, (back.bound_h - self.h) // 2
        crop = CropTransform(x0, y0, self.w, self.h, back.bound_w, back.bound_h)
        # Sides of odd differences leave half a pixel.
        half = np.array([x0 - (back.bound_w - self.w) / 2, y0 - (back.bound_h - self.h) / 2])
        back._shift = back._shift + half
        return TransformList([back, crop])


@AUGMENTATION_REGISTRY.register()
class RandomRotation(Augmentation):
    """Rotates by a drawn angle, around a drawn point."""

    def __init__(
        self,
        angle: float | Sequence[float],
        expand: bool = True,
        center: Sequence[Sequence[float]] | Sequence[float] | None = None,
        sample_style: str = "range",
        interp: int | None = None,
    ) -> None:
        """Take the angles to draw from.

        Args:
            angle: In degrees, counter-clockwise: two that an angle between is drawn of, or with
                "choice" any number of them. One number is that angle.
            expand: See `RotationTransform`.
            center: Two points (x, y) that the centre is drawn between, or with "choice" any number
                of points, in shares of the image's sides. None for the middle.
            sample_style: "range" or "choice".
            interp: See `RotationTransform`.

        Raises:
            ValueError: `sample_style` is unknown, or "range" has not one or two values.
        """
        if sample_style not in ("range", "choice"):
            raise ValueError(f"sample_style must be 'range' or 'choice', got {sample_style!r}")
        is_range = sample_style == "range"
        angles = [float(a) for a in np.atleast_1d(np.asarray(angle, dtype=np.float64))]
        if is_range:
            angles = angles * 2 if len(angles) == 1 else angles
        centers = None
        if center is not None:
            centers = np.asarray(center, dtype=np.float64).reshape(-1, 2).tolist()
            centers = centers * 2 if is_range and len(centers) == 1 else centers
        if is_range and (len(angles) != 2 or (centers is not None and len(centers) != 2)):
            raise ValueError(
                f"sample_style 'range' draws between two angles and points, got {angle} and"
                f" {center}"
            )
        self.angle, self.expand, self.center = angles, expand, centers
        self.sample_style, self.interp = sample_style, interp

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw an angle and a point."""
        height, width = image.shape[:2]
        center = None
        if self.sample_style == "range":
            angle = float(np.random.uniform(self.angle[0], self.angle[1]))
            if self.center is not None:
                (x0, y0), (x1, y1) = self.center
                center = (np.random.uniform(x0, x1), np.random.uniform(y0, y1))
        else:
            angle = float(np.random.choice(self.angle))
            if self.center is not None:
                center = self.center[np.random.randint(len(self.center))]
        if angle % 360 == 0:
            return NoOpTransform()
        if center is not None:
            center = (width * center[0], height * center[1])
        return RotationTransform(height, width, angle, self.expand, center, self.interp)


class HomographyTransform(Transform):
    """Maps points by a 3x3 matrix; the image keeps its size, and polygons are clipped to it."""

    def __init__(
        self,
        h: int,
        w: int,
        matrix: np.ndarray,
        fill: float = 128.0,
        seg_fill: int = 255,
    ) -> None:
        """Take the size of the images and the map.

        Args:
            h: Height in pixels.
            w: Width in pixels.
            matrix: (3, 3), from homogeneous points of the image to those of the result.
            fill: Value of pixels from outside.
            seg_fill: Their label.
        """
        self.h, self.w, self.fill, self.seg_fill = h, w, fill, seg_fill
        self.matrix = np.asarray(matrix, dtype=np.float64)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the mapped image, interpolated bilinearly."""
        return self._mapped(img, InterpolationMode.BILINEAR, self.fill)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the mapped label map, of the nearest pixels."""
        return self._mapped(segmentation, InterpolationMode.NEAREST, self.seg_fill)

    def _mapped(self, img: np.ndarray, mode: InterpolationMode, fill: float) -> np.ndarray:
        # torchvision takes the map from results to images, of continuous pixels, without its 1.
        back = np.linalg.inv(self.matrix)
        back = (back / back[2, 2]).reshape(-1)[:8].tolist()
        pixels = np.array(img[..., None] if img.ndim == 2 else img, order="C")
        mapped = V.perspective_image(
            torch.from_numpy(pixels).permute(2, 0, 1), None, None, mode, [float(fill)], back
        )
        array = mapped.permute(1, 2, 0).numpy()
        return array[:, :, 0] if img.ndim == 2 else array

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the mapped points."""
        coords = np.asarray(coords, dtype=np.float64).reshape(-1, 2)
        mapped = coords @ self.matrix[:, :2].T + self.matrix[:, 2]
        return mapped[:, :2] / mapped[:, 2:]

    def apply_polygons(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the parts of the mapped polygons that lie in the image."""
        return clip_polygons(super().apply_polygons(polygons), (self.h, self.w))

    def inverse(self) -> Transform:
        """Return the map back."""
        back = np.linalg.inv(self.matrix)
        return HomographyTransform(self.h, self.w, back, self.fill, self.seg_fill)


@AUGMENTATION_REGISTRY.register()
class RandomAffine(Augmentation):
    """Rotates, moves, scales and shears around the middle; the image keeps its size."""

    def __init__(
        self,
        degrees: float | Sequence[float] = 0.0,
        translate: Sequence[float] = (0.0, 0.0),
        scale: Sequence[float] = (1.0, 1.0),
        shear: float | Sequence[float] = 0.0,
        fill: float = 128.0,
        seg_fill: int = 255,
    ) -> None:
        """Take the ranges.

        Args:
            degrees: Angles, counter-clockwise: two numbers, or one for a range around 0.
            translate: Largest move in x and y, in sides of the image.
            scale: Smallest and largest factor, above 0.
            shear: Angles in degrees, drawn for x and for y: two numbers, or one for a range
                around 0, below 90.
            fill: See `HomographyTransform`.
            seg_fill: As there.
        """
        self.degrees = as_range("degrees", degrees)
        self.scale = as_range("scale", scale, low=1e-3)
        self.shear = as_range("shear", shear, low=-89, high=89)
        if len(translate) != 2 or not 0 <= min(translate) <= max(translate) <= 1:
            raise ValueError(f"translate must be two shares (x, y) in [0, 1], got {translate}")
        self.translate = tuple(translate)
        self.fill, self.seg_fill = fill, seg_fill

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a map."""
        height, width = image.shape[:2]
        angle = np.deg2rad(np.random.uniform(*self.degrees))
        scale = np.random.uniform(*self.scale)
        shear_x, shear_y = np.tan(np.deg2rad(np.random.uniform(*self.shear, 2)))
        move = np.random.uniform(-1, 1, 2) * self.translate * [width, height]
        rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        matrix = np.eye(3)
        matrix[:2, :2] = scale * rotation @ [[1, shear_x], [shear_y, 1]]
        middle = np.array([width / 2, height / 2])
        matrix[:2, 2] = middle + move - matrix[:2, :2] @ middle
        return HomographyTransform(height, width, matrix, self.fill, self.seg_fill)


@AUGMENTATION_REGISTRY.register()
class RandomPerspective(Augmentation):
    """Moves each corner inwards by a drawn distance; the image keeps its size."""

    def __init__(
        self, distortion_scale: float = 0.3, fill: float = 128.0, seg_fill: int = 255
    ) -> None:
        """Take the largest distance, in halves of the sides, in [0, 1); for the rest see above."""
        if not 0 <= distortion_scale < 1:
            raise ValueError(f"distortion_scale must lie in [0, 1), got {distortion_scale}")
        self.distortion_scale = distortion_scale
        self.fill, self.seg_fill = fill, seg_fill

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw where the corners go."""
        height, width = image.shape[:2]
        shares = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
        inwards = np.random.rand(4, 2) * self.distortion_scale / 2
        start = shares * [width, height]
        end = (shares + inwards * (1 - 2 * shares)) * [width, height]
        # Two linear equations per corner for the eight free numbers of the matrix.
        rows = []
        for (x, y), (u, v) in zip(start, end, strict=True):
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        numbers = np.linalg.solve(np.array(rows, dtype=np.float64), end.reshape(-1))
        matrix = np.append(numbers, 1).reshape(3, 3)
        return HomographyTransform(height, width, matrix, self.fill, self.seg_fill)


class ExtentTransform(AxisAlignedTransform):
    """Takes a window, which may leave the image, and scales it to a size."""

    def __init__(
        self,
        src_rect: Sequence[float],
        output_size: tuple[int, int],
        interp: int = BILINEAR,
        fill: float = 0,
    ) -> None:
        """Take the window.

        Args:
            src_rect: (x0, y0, x1, y1) in pixels of the image.
            output_size: (height, width) of the result.
            interp: PIL's NEAREST, or else bilinear. Label maps always take the nearest pixel.
            fill: Value outside the image.
        """
        self.src_rect = tuple(float(v) for v in src_rect)
        self.output_size = (int(output_size[0]), int(output_size[1]))
        self.interp = interp
        self.fill = fill

    def _scale(self) -> np.ndarray:
        (height, width), (x0, y0, x1, y1) = self.output_size, self.src_rect
        return np.array([width / (x1 - x0), height / (y1 - y0)])

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Return the window."""
        mode = "nearest" if (self.interp if interp is None else interp) == _NEAREST else "bilinear"
        grid = _grid_of(
            lambda points: points / self._scale() + self.src_rect[:2],
            self.output_size,
            (img.shape[0], img.shape[1]),
        )
        return sample_image(img, grid, mode, self.fill)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points in the window."""
        return (np.asarray(coords, dtype=np.float64) - self.src_rect[:2]) * self._scale()

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the window of a label map."""
        return self.apply_image(segmentation, interp=_NEAREST)


@AUGMENTATION_REGISTRY.register()
class RandomExtent(Augmentation):
    """Takes a window of drawn size and place, which may leave the image."""

    def __init__(self, scale_range: Sequence[float], shift_range: Sequence[float]) -> None:
        """Take the ranges.

        Args:
            scale_range: Smallest and largest size of the window, in sizes of the image.
            shift_range: Largest distance in x and y between the centres of two windows, in sizes of
                the image.
        """
        self.scale_range = scale_range
        self.shift_range = shift_range

    def get_transform(self, image: np.ndarray) -> Transform:
        """Draw a window."""
        size = np.array([image.shape[1], image.shape[0]], dtype=np.float64)
        half = 0.5 * size * np.random.uniform(self.scale_range[0], self.scale_range[1])
        shift = [share * (np.random.rand() - 0.5) for share in self.shift_range]
        center = size * (0.5 + np.array(shift))
        rectangle = np.concatenate([center - half, center + half])
        width, height = (int(side) for side in 2 * half)
        return ExtentTransform(rectangle.tolist(), (height, width))


class GridSampleTransform(Transform):
    """Takes each output pixel from a point of the image; points and boxes cannot follow."""

    def __init__(self, grid: np.ndarray, interp: str = "bilinear") -> None:
        """Take the points.

        Args:
            grid: (1, H, W, 2) or (H, W, 2) x and y in [-1, 1], as `torch.nn.functional.grid_sample`
                takes them.
            interp: See `grid_sample`.
        """
        self.grid = np.asarray(grid)
        self.interp = interp

    def apply_image(self, img: np.ndarray, interp: str | None = None) -> np.ndarray:
        """Return the sampled image; outside of it the nearest pixel is taken."""
        grid = torch.from_numpy(self.grid.reshape(self.grid.shape[-3:]))
        return sample_image(img, grid, interp or self.interp, padding_mode="border")

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the label map, sampled at the nearest pixels."""
        return self.apply_image(segmentation, interp="nearest")

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Raise an error: a grid says where pixels come from, not where points go."""
        raise NotImplementedError("points and boxes cannot be transformed by a sampling grid")
