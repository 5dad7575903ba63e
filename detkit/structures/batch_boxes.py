"""The boxes of a whole batch in one set: how an exported graph takes any number of images.

A graph has no lists over images, whose lengths would be fixed in it. Where a model is exported,
lists "per image" have one element for the whole batch: Instances whose boxes are `BatchBoxes`, and
whose `image_size` is a `RowImages`.

Legend: N images, R rows (boxes, regions) over the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from detkit.structures.boxes import Boxes


@dataclass(frozen=True)
class RowImages:
    """The image that each of R rows belongs to. Stands for the `image_size` of Instances."""

    index: Tensor
    """(R,) int64 in [0, N)."""
    sizes: Tensor
    """(N, 2) int64 height and width of each image."""

    def __getitem__(self, rows: Any) -> Any:
        return RowImages(self.index[rows], self.sizes)


class BatchBoxes(Boxes):
    """Boxes that know their image."""

    images: RowImages

    def __init__(self, tensor: Tensor, images: RowImages) -> None:
        """Hold (R, 4) coordinates in pixels of the images of the rows."""
        # Without the constructor of Boxes, whose checks need to know the number of rows.
        self.tensor = tensor.float()
        self.images = images

    def image_index(self, position: int) -> Tensor:
        return self.images.index.to(self.tensor.dtype)[:, None]

    def clip(self, box_size: Any = None) -> None:
        """Limit x to [0, width] and y to [0, height] of the box's image, in place."""
        limit = self.images.sizes.to(self.tensor.dtype).flip(1)[self.images.index]
        self.tensor = self.tensor.clamp(min=0).minimum(torch.cat([limit, limit], dim=1))

    def __getitem__(self, item: Any) -> BatchBoxes:
        return BatchBoxes(self.tensor[item], self.images[item])


def boxes_in_image(
    coordinates: Tensor, image_size: tuple[int, int] | RowImages, box_class: type[Boxes] = Boxes
) -> Any:
    """Return boxes clipped to their image.

    Args:
        coordinates: (R, 4), or (R, 5) if they are rotated.
        image_size: `(height, width)`; or the images of the rows, which gives `BatchBoxes`.
        box_class: What boxes of one image are.
    """
    if isinstance(image_size, RowImages):
        in_batch = BatchBoxes(coordinates, image_size)
        in_batch.clip()
        return in_batch
    boxes = box_class(coordinates)
    boxes.clip(image_size)
    return boxes
