"""Deterministic transforms of an image and of everything annotated on it.

An image is a NumPy array (H, W, C) or (H, W), in any memory layout: transforms may return views
with negative strides, so that flips and channel orders cost nothing until the mapper makes its one
copy.

Legend: H and W height and width, C channels, N boxes, P points.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np


class Transform(ABC):
    """One deterministic change of an image.

    A subclass defines the change of pixels and of points; those of boxes, polygons and label maps
    follow from these. Points are `(x, y)` in continuous pixels: the pixel in column c spans
    [c, c + 1). Inputs are not changed.
    """

    @abstractmethod
    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the transformed image, (H, W, C) or (H, W), with the dtype of the input."""

    @abstractmethod
    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the transformed points, (P, 2) float."""

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the transformed label map, (H, W) integer, without new labels."""
        return self.apply_image(segmentation)

    def apply_box(self, box: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Return the upright boxes around N transformed boxes, (N, 4) XYXY, not clipped."""
        boxes = np.asarray(box, dtype=np.float64).reshape(-1, 4)
        # All four corners: a rotation, say, may move any of them to the outside.
        corners = boxes[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 2)
        corners = self.apply_coords(corners).reshape(-1, 4, 2)
        return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)

    def apply_rotated_box(
        self, rotated_boxes: np.ndarray | Sequence[Sequence[float]]
    ) -> np.ndarray:
        """Return N transformed boxes, (N, 5) XYWHA, not clipped.

        Under a mirror the angle changes its sign. A resize of unequal factors makes a rectangle a
        parallelogram: the box keeps the lengths of its sides, and the direction of those of length
        `height`; see `RotatedBoxes.scale`.
        """
        boxes = np.asarray(rotated_boxes, dtype=np.float64).reshape(-1, 5)
        center, size, angle = boxes[:, :2], boxes[:, 2:4], np.deg2rad(boxes[:, 4])
        along_width = np.stack([np.cos(angle), -np.sin(angle)], axis=1)
        along_height = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        points = np.concatenate([center, center + along_width, center + along_height])
        center, *ends = self.apply_coords(points).reshape(3, -1, 2)
        along_width, along_height = (end - center for end in ends)
        stretch = np.linalg.norm([along_width, along_height], axis=2).T
        angle = np.rad2deg(np.arctan2(along_height[:, 0], along_height[:, 1]))
        return np.concatenate([center, size * stretch, angle[:, None]], axis=1)

    def apply_polygons(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the transformed polygons, each (P, 2); a crop may drop or split some."""
        if len(polygons) == 0:
            return []
        # All at once: calling NumPy takes longer than its work.
        points = self.apply_coords(np.concatenate(polygons).astype(np.float64, copy=False))
        ends = np.cumsum([len(polygon) for polygon in polygons])
        return np.split(points, ends[:-1])

    @classmethod
    def register_type(
        cls, data_type: str, func: Callable[[Any, Any], Any] | None = None
    ) -> Callable[..., Any]:
        """Let the class transform another kind of data, by a method `apply_<data_type>`.

        Args:
            data_type: Name of the kind.
            func: Takes the transform and the data; None returns a decorator.

        Example:
            >>> @NoOpTransform.register_type("depth")
            ... def keep(transform, depth):
            ...     return depth
            >>> NoOpTransform().apply_depth(3)
            3
        """
        if func is None:
            return lambda decorated: cls.register_type(data_type, decorated)
        setattr(cls, f"apply_{data_type}", func)
        return func

    def _set_attributes(self, params: dict[str, Any] | None = None) -> None:
        """Set attributes from `locals()`, as constructors written for fvcore and Detectron2 do."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def inverse(self) -> Transform:
        """Return the transform that undoes the change of geometry; lost pixels stay lost.

        Raises:
            NotImplementedError: There is none.
        """
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def __repr__(self) -> str:
        arguments = []
        for name, value in vars(self).items():
            if name.startswith("_"):
                continue
            is_large = isinstance(value, np.ndarray) and value.size > 8
            arguments.append(f"{name}={f'array{value.shape}' if is_large else repr(value)}")
        return f"{type(self).__name__}({', '.join(arguments)})"


def memory_order(array: np.ndarray) -> tuple[slice, ...]:
    """Return the index that mirrors an array such that no stride is negative; it is its inverse.

    Whole rows of a mirrored view (BGR of RGB, a flip) are then copied at once.
    """
    return tuple(slice(None, None, -1 if stride < 0 else 1) for stride in array.strides)


class AxisAlignedTransform(Transform):
    """A transform under which upright boxes stay upright, so that two corners define a box."""

    def apply_box(self, box: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Return N transformed boxes, (N, 4) XYXY, not clipped to the image."""
        corners = np.asarray(box, dtype=np.float64).reshape(-1, 2)
        # A flip exchanges the corners, so that the smaller coordinate has to be found again.
        first, second = self.apply_coords(corners).reshape(-1, 2, 2).swapaxes(0, 1)
        return np.concatenate([np.minimum(first, second), np.maximum(first, second)], axis=1)


class NoOpTransform(AxisAlignedTransform):
    """Leaves everything unchanged."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the image itself."""
        return img

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points themselves."""
        return coords

    def apply_box(self, box: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Return the boxes themselves."""
        return np.asarray(box, dtype=np.float64).reshape(-1, 4)

    def apply_rotated_box(
        self, rotated_boxes: np.ndarray | Sequence[Sequence[float]]
    ) -> np.ndarray:
        """Return the boxes themselves."""
        return np.asarray(rotated_boxes, dtype=np.float64).reshape(-1, 5)

    def inverse(self) -> Transform:
        """Return this transform."""
        return self

    def __getattr__(self, name: str) -> Any:
        # A kind of data that other transforms have registered.
        if not name.startswith("apply_"):
            raise AttributeError(f"a NoOpTransform has no attribute {name!r}")
        return lambda data: data


class TransformList(Transform):
    """Several transforms, one after the other, as one.

    Example:
        >>> both = TransformList([NoOpTransform(), NoOpTransform()])
        >>> both.apply_box([[0, 0, 2, 3]])
        array([[0., 0., 2., 3.]])
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        for index, transform in enumerate(transforms):
            # By its methods, so that transforms written for fvcore and Detectron2 are accepted too.
            if not hasattr(transform, "apply_image") or not hasattr(transform, "apply_coords"):
                raise TypeError(f"a TransformList takes transforms: item {index} is {transform!r}")
        self.transforms = list(transforms)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Return the image after all transforms."""
        for transform in self.transforms:
            img = transform.apply_image(img)
        return img

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Return the points after all transforms."""
        for transform in self.transforms:
            coords = transform.apply_coords(coords)
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Return the label map after all transforms."""
        for transform in self.transforms:
            segmentation = transform.apply_segmentation(segmentation)
        return segmentation

    def apply_box(self, box: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
        """Return the boxes after all transforms, each made upright again."""
        boxes = np.asarray(box, dtype=np.float64).reshape(-1, 4)
        for transform in self.transforms:
            boxes = transform.apply_box(boxes)
        return boxes

    def apply_rotated_box(
        self, rotated_boxes: np.ndarray | Sequence[Sequence[float]]
    ) -> np.ndarray:
        """Return the rotated boxes after all transforms, each made a rectangle again."""
        boxes = np.asarray(rotated_boxes, dtype=np.float64).reshape(-1, 5)
        for transform in self.transforms:
            boxes = transform.apply_rotated_box(boxes)
        return boxes

    def apply_polygons(self, polygons: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the polygons after all transforms."""
        for transform in self.transforms:
            polygons = transform.apply_polygons(polygons)
        return list(polygons)

    def inverse(self) -> TransformList:
        """Return the inverses in reverse order."""
        return TransformList([transform.inverse() for transform in reversed(self.transforms)])

    def __getattr__(self, name: str) -> Any:
        # A kind of data that was registered: each of the transforms must know it.
        if not name.startswith("apply_"):
            raise AttributeError(f"a TransformList has no attribute {name!r}")

        def apply(data: Any) -> Any:
            for transform in self.transforms:
                data = getattr(transform, name)(data)
            return data

        return apply

    def __add__(self, other: Transform) -> TransformList:
        return TransformList(self.transforms + _as_list(other))

    def __radd__(self, other: Transform) -> TransformList:
        return TransformList(_as_list(other) + self.transforms)

    def __len__(self) -> int:
        return len(self.transforms)

    def __getitem__(self, index: int) -> Transform:
        return self.transforms[index]

    def __iter__(self) -> Iterator[Transform]:
        return iter(self.transforms)


def _as_list(transform: Transform) -> list[Transform]:
    return transform.transforms if isinstance(transform, TransformList) else [transform]
