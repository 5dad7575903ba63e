"""Masks of objects as polygons.

Legend: M objects in one image, P points of a polygon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from detkit.structures.boxes import Boxes, check_boxes_of, check_class
from detkit.structures.mask_formats import as_polygon, decode_runs, polygon_area, polygon_runs


class PolygonMasks:
    """The masks of M objects, each a list of polygons that cover it together; always on the CPU.

    `polygons[i][j]` is polygon j of object i: (2 P,) float64 `[x0, y0, x1, y1, ...]` in pixels. An
    object may have none.

    Example:
        >>> masks = PolygonMasks([[[0.0, 0, 4, 0, 4, 2, 0, 2]], []])
        >>> masks.area()
        tensor([8., 0.], dtype=torch.float64)
    """

    polygons: list[list[np.ndarray]]

    def __init__(self, polygons: Sequence[Sequence[ArrayLike | Tensor]]) -> None:
        """Hold polygons; float64 arrays are kept, not copied.

        Raises:
            ValueError: It is not a list with a list of polygons per object.
            ValueError: A polygon has fewer than 3 points, an x without a y, or a coordinate that is
                not finite.
        """
        if not isinstance(polygons, (list, tuple)):
            kind = type(polygons).__name__
            raise ValueError(
                f"PolygonMasks takes a list with a list of polygons per object: got {kind}"
            )
        self.polygons = [_checked(polygons_i, i) for i, polygons_i in enumerate(polygons)]

    def to(self, *args: object, **kwargs: object) -> PolygonMasks:
        """Return the masks themselves: polygons stay on the CPU."""
        return self

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def get_bounding_boxes(self) -> Boxes:
        """Return the smallest box around each object; zeros for one without a polygon."""
        boxes = torch.zeros(len(self), 4)
        for i, polygons_i in enumerate(self.polygons):
            if polygons_i:
                points = np.concatenate(polygons_i).reshape(-1, 2)
                corners = np.concatenate([points.min(axis=0), points.max(axis=0)])
                boxes[i] = torch.from_numpy(corners)
        return Boxes(boxes)

    def nonempty(self) -> Tensor:
        """Return (M,) bool: which objects have a polygon."""
        return torch.tensor([len(polygons_i) > 0 for polygons_i in self.polygons], dtype=torch.bool)

    def area(self) -> Tensor:
        """Return the (M,) float64 areas in square pixels; overlaps of polygons count twice."""
        areas = torch.zeros(len(self), dtype=torch.float64)
        for i, polygons_i in enumerate(self.polygons):
            areas[i] = sum(polygon_area(p[0::2], p[1::2]) for p in polygons_i)
        return areas

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Rasterise each object on a grid over its box: the target of a mask head.

        Args:
            boxes: (M, 4) XYXY, one per object.
            mask_size: Cells of the grid along each side.

        Returns:
            (M, mask_size, mask_size) bool, on the device of the boxes.

        Raises:
            ValueError: There is not one box per object.
        """
        check_boxes_of("mask", len(self), boxes)
        # Waits for the device: rasterising is done on the CPU.
        corners = boxes.detach().cpu().float()
        starts = corners[:, :2].double().numpy()
        # At least 0.1 pixels: the scale of an empty box would be infinite.
        sides = (corners[:, 2:] - corners[:, :2]).clamp(min=0.1).double()
        scales = (mask_size / sides).numpy()
        # One call to pycocotools for the polygons of all objects, then the union of each object's.
        on_grid = []
        for polygons_i, start, scale in zip(self.polygons, starts, scales, strict=True):
            on_grid += [((p.reshape(-1, 2) - start) * scale).reshape(-1) for p in polygons_i]
        masks = torch.zeros(len(self), mask_size, mask_size, dtype=torch.bool)
        if on_grid:
            runs = iter(polygon_runs(on_grid, mask_size, mask_size))
            counts = [len(polygons_i) for polygons_i in self.polygons if polygons_i]
            decoded = decode_runs([list(itertools.islice(runs, count)) for count in counts])
            masks[np.flatnonzero([bool(p) for p in self.polygons])] = torch.from_numpy(
                decoded
            ).permute(2, 0, 1)
        return masks.to(boxes.device, non_blocking=True)

    @classmethod
    def cat(cls, polymasks_list: Sequence[PolygonMasks]) -> PolygonMasks:
        """Join several sets into one. No sets give no masks."""
        check_class(PolygonMasks, polymasks_list)
        return _unchecked([polygons_i for masks in polymasks_list for polygons_i in masks])

    def __getitem__(self, item: int | slice | Tensor | ArrayLike) -> PolygonMasks:
        """Select objects by an index (one object), a slice, a bool mask, or int64 indices."""
        if isinstance(item, int):
            return _unchecked([self.polygons[item]])
        if isinstance(item, slice):
            return _unchecked(self.polygons[item])
        indices = np.asarray(item.cpu() if isinstance(item, Tensor) else item)
        if indices.dtype == bool:
            if indices.shape != (len(self),):
                raise IndexError(
                    f"a bool mask for {len(self)} polygon masks has shape {indices.shape}"
                )
            indices = np.flatnonzero(indices)
        return _unchecked([self.polygons[i] for i in indices])

    def __len__(self) -> int:
        return len(self.polygons)

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Iterate over the objects, each a list of polygons."""
        return iter(self.polygons)

    def __repr__(self) -> str:
        return f"PolygonMasks(num_instances={len(self)})"


def _unchecked(polygons: list[list[np.ndarray]]) -> PolygonMasks:
    # Selecting happens per sampled proposal: what has been checked once is not checked again.
    masks = PolygonMasks([])
    masks.polygons = polygons
    return masks


def _checked(polygons: Sequence[ArrayLike | Tensor], index: int) -> list[np.ndarray]:
    if not isinstance(polygons, (list, tuple)):
        kind = type(polygons).__name__
        raise ValueError(
            f"PolygonMasks takes a list of polygons per object: object {index} is {kind}"
        )
    checked = []
    for j, polygon in enumerate(polygons):
        if isinstance(polygon, Tensor):
            polygon = polygon.cpu().numpy()
        try:
            checked.append(as_polygon(polygon))
        except ValueError as error:
            raise ValueError(f"polygon {j} of object {index}: {error}") from error
    return checked


def rasterize_polygons_within_box(
    polygons: Sequence[np.ndarray], box: np.ndarray, mask_size: int
) -> Tensor:
    """Return one object's polygons on a grid over a box, (mask_size, mask_size) bool.

    Args:
        polygons: [x0, y0, x1, y1, ...] each.
        box: (4,) XYXY.
        mask_size: Cells of the grid along each side.
    """
    boxes = torch.as_tensor(np.asarray(box, dtype=np.float64)).reshape(1, 4)
    return PolygonMasks([list(polygons)]).crop_and_resize(boxes, mask_size)[0]
