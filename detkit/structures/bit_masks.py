"""Masks of objects as bitmaps of the whole image.

Legend: M objects in one image, H x W pixels of the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.ops import roi_align

from detkit.structures.boxes import Boxes
from detkit.structures.mask_formats import polygons_to_bitmask
from detkit.structures.mask_ops import paste_masks_in_image
from detkit.structures.polygon_masks import PolygonMasks


class BitMasks:
    """The masks of M objects: a thin hull around `tensor`, (M, H, W) bool.

    Masks selected by indices share the bitmaps they are selected from, until `tensor` is asked for:
    hundreds of proposals that are each matched with one of a few objects take no memory, where a
    copy of an image's size for each would take half a gigabyte.
    """

    _bitmaps: Tensor
    _rows: Tensor | None
    """(M,) int64: which of the bitmaps these masks are; None for all, in their order."""

    def __init__(self, tensor: Tensor | Any) -> None:
        """Hold (M, H, W) bitmaps. A bool tensor is kept, not copied; anything else is converted, not 0 being True.

        Raises:
            ValueError: It is not (M, H, W).
        """
        bitmaps = torch.as_tensor(tensor).to(torch.bool)
        if bitmaps.dim() != 3:
            raise ValueError(f"bit masks are (M, H, W): got shape {tuple(bitmaps.shape)}")
        self._bitmaps = bitmaps
        self._rows = None

    @property
    def tensor(self) -> Tensor:
        """(M, H, W) bool."""
        if self._rows is not None:
            self._bitmaps, self._rows = self._bitmaps[self._rows], None
        return self._bitmaps

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)` of the image."""
        return self._bitmaps.shape[1], self._bitmaps.shape[2]

    @property
    def device(self) -> torch.device:
        """The device that holds the bitmaps."""
        return self._bitmaps.device

    def to(self, *args: Any, **kwargs: Any) -> BitMasks:
        """Return the masks on another device. Not a copy when they are there already."""
        moved = BitMasks(self._bitmaps.to(*args, **kwargs))
        moved._rows = None if self._rows is None else self._rows.to(moved.device)
        return moved

    @staticmethod
    def from_polygon_masks(
        polygon_masks: PolygonMasks | Sequence[Sequence[Any]], height: int, width: int
    ) -> BitMasks:
        """Rasterise polygons over an image.

        Args:
            polygon_masks: `PolygonMasks`, or what it is made of.
            height: H
            width: W
        """
        if not isinstance(polygon_masks, PolygonMasks):
            polygon_masks = PolygonMasks(polygon_masks)
        bitmaps = torch.zeros(len(polygon_masks), height, width, dtype=torch.bool)
        for i, polygons in enumerate(polygon_masks):
            bitmaps[i] = torch.from_numpy(polygons_to_bitmask(polygons, height, width))
        return BitMasks(bitmaps)

    @staticmethod
    def from_roi_masks(
        roi_masks: _MasksOfBoxes,
        boxes: Boxes | Tensor,
        height: int,
        width: int,
        threshold: float = 0.5,
    ) -> BitMasks:
        """Paint the masks of boxes into the image; see `paste_masks_in_image`."""
        return BitMasks(
            paste_masks_in_image(roi_masks.tensor, boxes, (height, width), max(threshold, 0.0))
        )

    def get_bounding_boxes(self) -> Boxes:
        """Return the smallest box around each mask, whole pixels included; zeros for an empty mask."""
        sides = [_first_and_end(self.tensor.any(dim=axis)) for axis in (1, 2)]
        (x1, x2), (y1, y2) = sides
        return Boxes(torch.stack([x1, y1, x2, y2], dim=1))

    def area(self) -> Tensor:
        """Return the (M,) int64 numbers of pixels."""
        return self.tensor.flatten(1).sum(dim=1)

    def nonempty(self) -> Tensor:
        """Tell (M,) bool which masks have a pixel."""
        if self.tensor.numel() == 0:
            return torch.zeros(len(self), dtype=torch.bool, device=self.device)
        # The largest byte, 0.1 ms for ten masks of 800x1067 on a CPU, where `any` takes 5.
        return self.tensor.flatten(1).view(torch.uint8).amax(dim=1) > 0

    def crop_and_resize(self, boxes: Tensor, mask_size: int) -> Tensor:
        """Resample what of each mask lies in its box, on a grid over the box: the target of a mask head.

        Args:
            boxes: (M, 4) XYXY, one per mask.
            mask_size: Cells of the grid along each side.

        Returns:
            (M, mask_size, mask_size) bool, on the device of the masks: cells of which at least half
            is covered, by ROIAlign with a sample per pixel.

        Raises:
            ValueError: There is not one box per mask.
        """
        if boxes.dim() != 2 or boxes.shape != (len(self), 4):
            raise ValueError(
                f"need a box (x1, y1, x2, y2) per mask: got {tuple(boxes.shape)} for {len(self)}"
                " masks"
            )
        boxes = boxes.detach().to(self.device, torch.float32)
        bitmaps, rows = self._fewest_bitmaps()
        regions = torch.cat([rows.to(torch.float32)[:, None], boxes], dim=1)
        covered = roi_align(
            bitmaps[:, None].float(), regions, mask_size, sampling_ratio=0, aligned=True
        )
        return covered.squeeze(1) >= 0.5

    def _fewest_bitmaps(self) -> tuple[Tensor, Tensor]:
        """Return bitmaps, and the (M,) index of each mask among them: those shared, or those of the
        masks themselves.
        """
        if self._rows is not None and len(self._bitmaps) <= len(self._rows):
            return self._bitmaps, self._rows
        return self.tensor, torch.arange(len(self), device=self.device)

    @classmethod
    def cat(cls, bitmasks_list: Sequence[BitMasks]) -> BitMasks:
        """Join several sets of one image size into one with its own memory.

        Raises:
            ValueError: There are none, since the size is not known then.
            TypeError: One is something else.
        """
        if len(bitmasks_list) == 0:
            raise ValueError("need at least one BitMasks to join")
        for index, masks in enumerate(bitmasks_list):
            if not isinstance(masks, BitMasks):
                raise TypeError(
                    f"BitMasks.cat takes BitMasks: item {index} is {type(masks).__name__}"
                )
        return cls(torch.cat([masks.tensor for masks in bitmasks_list]))

    def __getitem__(self, item: int | slice | Tensor | Sequence[int]) -> BitMasks:
        """Select masks by an index (giving one mask), a slice, a bool mask, or int64 indices.

        Raises:
            ValueError: The index has more dimensions than one.
        """
        if isinstance(item, int):
            return BitMasks(self.tensor[item].unsqueeze(0))
        if isinstance(item, slice):
            return BitMasks(self.tensor[item])
        index = torch.as_tensor(item, device=self.device)
        if index.numel() == 0:
            index = index.long()  # an empty list becomes float
        if index.dim() != 1:
            raise ValueError(
                f"{len(self)} masks are indexed by a row of indices: got shape {tuple(index.shape)}"
            )
        rows = torch.arange(len(self), device=self.device) if self._rows is None else self._rows
        selected = BitMasks(self._bitmaps)
        selected._rows = rows[index]
        return selected

    def __len__(self) -> int:
        return len(self._bitmaps) if self._rows is None else len(self._rows)

    def __iter__(self) -> Iterator[Tensor]:
        """Go through the masks, each (H, W) bool."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"BitMasks(num_instances={len(self)}, image_size={self.image_size})"


class _MasksOfBoxes(Protocol):
    """`ROIMasks`, which is made of this file."""

    tensor: Tensor


def _first_and_end(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Return (M,) float32 index of the first True of each row, and one past the last; zeros for a
    row without.
    """
    length = occupied.shape[1]
    if occupied.numel() == 0:
        zeros = torch.zeros(len(occupied), device=occupied.device)
        return zeros, zeros
    is_any = occupied.any(dim=1)
    # argmax gives the first of equals.
    first = occupied.byte().argmax(dim=1) * is_any
    end = (length - occupied.flip(1).byte().argmax(dim=1)) * is_any
    return first.float(), end.float()
