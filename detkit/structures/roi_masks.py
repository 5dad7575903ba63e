"""Masks of objects on grids over their boxes, as a mask head predicts them.

Legend: M objects in one image, h x w cells of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from detkit.structures.bit_masks import BitMasks
from detkit.structures.boxes import Boxes


class ROIMasks:
    """The masks of M objects: a thin hull around `tensor`, (M, h, w) probabilities in [0, 1]."""

    tensor: Tensor

    def __init__(self, tensor: Tensor) -> None:
        """Hold (M, h, w) probabilities.

        Raises:
            ValueError: It is not (M, h, w).
        """
        if tensor.dim() != 3:
            raise ValueError(f"masks of regions are (M, h, w): got shape {tuple(tensor.shape)}")
        self.tensor = tensor

    @property
    def device(self) -> torch.device:
        """The device that holds the masks."""
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any) -> ROIMasks:
        """Return the masks on another device, or of another type, as `Tensor.to` does."""
        return ROIMasks(self.tensor.to(*args, **kwargs))

    def to_bitmasks(
        self, boxes: Boxes | Tensor, height: int, width: int, threshold: float = 0.5
    ) -> BitMasks:
        """Paint each mask into its box in an image of this size; see `paste_masks_in_image`."""
        return BitMasks.from_roi_masks(self, boxes, height, width, threshold)

    @classmethod
    def cat(cls, roi_masks_list: Sequence[ROIMasks]) -> ROIMasks:
        """Join several sets of one grid into one with its own memory.

        Raises:
            ValueError: There are none, since the grid is not known then.
            TypeError: One is something else.
        """
        if len(roi_masks_list) == 0:
            raise ValueError("need at least one ROIMasks to join")
        for index, masks in enumerate(roi_masks_list):
            if not isinstance(masks, ROIMasks):
                raise TypeError(
                    f"ROIMasks.cat takes ROIMasks: item {index} is {type(masks).__name__}"
                )
        return cls(torch.cat([masks.tensor for masks in roi_masks_list]))

    def __getitem__(self, item: int | slice | Tensor | Sequence[int]) -> ROIMasks:
        """Select masks by an index (giving one mask), a slice, a bool mask, or int64 indices."""
        return ROIMasks(
            self.tensor[item].unsqueeze(0) if isinstance(item, int) else self.tensor[item]
        )

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __repr__(self) -> str:
        return f"ROIMasks(num_instances={len(self)})"
