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

from detkit.structures.boxes import Boxes
from detkit.structures.mask_formats import as_polygon, decode_runs, polygon_area, polygon_runs


class PolygonMasks:
    """The masks of M objects, each a list of polygons that cover it together; on the CPU always.

    `polygons[i][j]` is polygon j of object i: (2 P,) float64 `[x0, y0, x1, y1, ...]` in pixels. An
    object may have none.
    """

    polygons: list[list[np.ndarray]]

    def __init__(self, polygons: Sequence[Sequence[ArrayLike | Tensor]]) -> None:
        """Hold polygons; float64 arrays are kept, not copied.

        Raises:
            TypeError: It is no list with a list of polygons per object.
            ValueError: A polygon has fewer than 3 points, an x without a y, or a coordinate that is
                not finite.
        """
        if not isinstance(polygons, (list, tuple)):
            raise TypeError(
                "PolygonMasks takes a list with a list of polygons per object: got"
                f" {_name(polygons)}"
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
        """Return the smallest box around each object, on the CPU; zeros for one without a polygon."""
        boxes = torch.zeros(len(self), 4)
        for i, polygons_i in enumerate(self.polygons):
            if polygons_i:
                points = np.concatenate(polygons_i).reshape(-1, 2)
                boxes[i] = torch.from_numpy(
                    np.concatenate([points.min(axis=0), points.max(axis=0)])
                )
        return Boxes(boxes)

    def nonempty(self) -> Tensor:
        """Tell (M,) bool which objects have a polygon."""
        return torch.tensor([len(polygons_i) > 0 for polygons_i in self.polygons], dtype=torch.bool)

    def area(self) -> Tensor:
        """Return the (M,) float64 areas in square pixels: the sum over an object's polygons,
        overlaps counted twice.
        """
        areas = [
            sum(polygon_area(p[0::2], p[1::2]) for p in polygons_i) for polygons_i in self.polygons
        ]
        return torch.tensor(areas, dtype=torch.float64)

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Rasterise what of each object lies in its box, on a grid over the box: the target of a mask head.

        Args:
            boxes: (M, 4) XYXY, one per object.
            mask_size: Cells of the grid along each side.

        Returns:
            (M, mask_size, mask_size) bool, on the device of the boxes.

        Raises:
            ValueError: There is not one box per object.
        """
        if boxes.dim() != 2 or boxes.shape != (len(self), 4):
            raise ValueError(
                f"need a box (x1, y1, x2, y2) per mask: got {tuple(boxes.shape)} for {len(self)}"
                " masks"
            )
        # Waits for the device: rasterising is done on the CPU.
        corners = boxes.detach().cpu().float()
        # A box that has shrunk to nothing is enlarged without end otherwise.
        scales = mask_size / (corners[:, 2:] - corners[:, :2]).clamp(min=0.1).double()
        polygons = [
            (polygon.reshape(-1, 2) - corner) * scale
            for polygons_i, corner, scale in zip(
                self.polygons, corners[:, :2].double().numpy(), scales.numpy(), strict=True
            )
            for polygon in polygons_i
        ]
        masks = _rasterise(polygons, [len(polygons_i) for polygons_i in self.polygons], mask_size)
        return masks.to(boxes.device)

    @classmethod
    def cat(cls, polymasks_list: Sequence[PolygonMasks]) -> PolygonMasks:
        """Join several sets into one. No sets give no masks."""
        for index, masks in enumerate(polymasks_list):
            if not isinstance(masks, PolygonMasks):
                raise TypeError(
                    f"PolygonMasks.cat takes PolygonMasks: item {index} is {_name(masks)}"
                )
        return _unchecked(
            list(itertools.chain.from_iterable(masks.polygons for masks in polymasks_list))
        )

    def __getitem__(self, item: int | slice | Tensor | Sequence[int]) -> PolygonMasks:
        """Select objects by an index (giving one object), a slice, a bool mask, or int64 indices."""
        if isinstance(item, int):
            return _unchecked([self.polygons[item]])
        if isinstance(item, slice):
            return _unchecked(self.polygons[item])
        indices = torch.as_tensor(item)
        if indices.dtype == torch.bool:
            if indices.shape != (len(self),):
                raise IndexError(
                    f"a bool mask for {len(self)} polygon masks has shape {tuple(indices.shape)}"
                )
            indices = indices.nonzero().squeeze(1)
        return _unchecked([self.polygons[i] for i in indices.tolist()])

    def __len__(self) -> int:
        return len(self.polygons)

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Go through the objects, each a list of polygons."""
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
        raise TypeError(
            f"PolygonMasks takes a list of polygons per object: object {index} is {_name(polygons)}"
        )
    checked = []
    for j, polygon in enumerate(polygons):
        try:
            checked.append(
                as_polygon(polygon.cpu().numpy() if isinstance(polygon, Tensor) else polygon)
            )
        except ValueError as error:
            raise ValueError(f"polygon {j} of object {index}: {error}") from error
    return checked


def _rasterise(polygons: list[np.ndarray], counts: list[int], size: int) -> Tensor:
    """Return (M, size, size) bool masks of objects with so many polygons each, one object after the
    other.
    """
    masks = torch.zeros(len(counts), size, size, dtype=torch.bool)
    if not polygons:
        return masks
    runs = iter(polygon_runs([polygon.reshape(-1) for polygon in polygons], size, size))
    decoded = decode_runs([list(itertools.islice(runs, count)) for count in counts if count > 0])
    masks[torch.tensor(counts) > 0] = torch.from_numpy(decoded).permute(2, 0, 1)
    return masks


def _name(value: object) -> str:
    return type(value).__name__
