"""Anchors as torchvision's detectors have them, for weights that were trained with them.

Legend: A anchors per cell, H x W cells of a level.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from detkit.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    DefaultAnchorGenerator,
    anchor_grid,
)


@ANCHOR_GENERATOR_REGISTRY.register()
class TorchvisionAnchorGenerator(DefaultAnchorGenerator):
    """Anchors with corners on whole pixels, aspect ratios varying slowest, and strides measured on the image.

    The stride of a level is the image's side divided by the level's, rounded down. It differs from
    the nominal one on the levels that pooling rounds up: an image of 800 pixels has 25 rows on p5
    and 13 on p6, which makes 61 pixels instead of 64.
    """

    def generate_cell_anchors(
        self, sizes: Sequence[float], aspect_ratios: Sequence[float]
    ) -> Tensor:
        """Return (ratios * sizes, 4) float32 anchors centred at (0, 0), ratios varying slowest."""
        # In float32, and in this order of operations, like torchvision's: some corners lie halfway
        # between pixels.
        height_factors = torch.tensor(aspect_ratios, dtype=torch.float32).sqrt()[:, None]
        scales = torch.tensor(sizes, dtype=torch.float32)[None]
        widths, heights = (
            (1 / height_factors * scales).flatten(),
            (height_factors * scales).flatten(),
        )
        return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).round()

    def _grids(self, grid_sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
        # The finest level has the nominal stride: images are padded to multiples of a coarser one.
        image_size = [side * self.strides[0] for side in grid_sizes[0]]
        return [
            anchor_grid(
                cell_anchors,
                size,
                (image_size[0] // size[0], image_size[1] // size[1]),
                self.offset,
            )
            for cell_anchors, size in zip(self.cell_anchors, grid_sizes, strict=True)
        ]
