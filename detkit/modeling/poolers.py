"""Features of regions, each pooled from the pyramid level that fits its size.

Legend: N images, R regions over the batch, C channels, L levels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import RoIPool

from detkit.layers import ROIAlign, ROIAlignRotated, nonzero_tuple
from detkit.layers.cpu.switch import is_traced
from detkit.structures import BatchBoxes, Boxes
from detkit.utils.errors import ContractError
from detkit.utils.text import did_you_mean

_POOLER_TYPES = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")


def assign_boxes_to_levels(
    box_lists: Sequence[Boxes],
    min_level: int,
    max_level: int,
    canonical_box_size: int,
    canonical_level: int,
) -> Tensor:
    """Return the level of each box, by its size.

    Source: Lin et al. 2016, arXiv 1612.03144, equation 1.

    Args:
        box_lists: Boxes of each image.
        min_level: Finest level: that of stride 2 ** min_level.
        max_level: Coarsest level.
        canonical_box_size: Square root of the area, in pixels, of a box on `canonical_level`.
        canonical_level: Its level.

    Returns:
        (R,) int64 in [0, max_level - min_level], for the boxes of all images in order.
    """
    sizes = torch.cat([boxes.area() for boxes in box_lists]).sqrt()
    # The epsilon keeps empty boxes, of log -inf, on the finest level.
    levels = torch.floor(canonical_level + torch.log2(sizes / canonical_box_size + 1e-8))
    # A box whose right side lies left of its left one has no size.
    levels = levels.nan_to_num(min_level).clamp(min=min_level, max=max_level)
    return levels.to(torch.int64) - min_level


def convert_boxes_to_pooler_format(box_lists: Sequence[Boxes]) -> Tensor:
    """Return (R, 5) float32 rows of image index and box, for the boxes of all images in order.

    Of rotated boxes, (R, 6).
    """
    boxes = torch.cat([boxes.tensor for boxes in box_lists])
    index = [boxes_i.image_index(i) for i, boxes_i in enumerate(box_lists)]
    return torch.cat([torch.cat(index), boxes], dim=1)


class _ROIPool(RoIPool):
    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        # Never in half precision, as in `ROIAlign`.
        dtype = torch.promote_types(input.dtype, torch.float32)
        return super().forward(input.to(dtype), rois.to(dtype)).to(input.dtype)


class ROIPooler(nn.Module):
    """Pools a fixed grid of features per region, from the level of `assign_boxes_to_levels`."""

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        """Build a pooler per level.

        Args:
            output_size: Side of the grid, or (height, width).
            scales: 1 / stride of each of the L features: falling powers of two without a gap.
            sampling_ratio: Samples per cell and axis; 0 takes about one per feature pixel.
            pooler_type: `ROIAlignV2`, or `ROIAlign` without the half-pixel shift, as in Detectron;
                `ROIPool`, the maximum over whole pixels of Fast R-CNN; `ROIAlignRotated` for
                rotated boxes.
            canonical_box_size: See `assign_boxes_to_levels`; 224 is ImageNet's crop.
            canonical_level: See `assign_boxes_to_levels`; 4 is the level of stride 16.

        Raises:
            ValueError: `pooler_type` is unknown.
            ValueError: `scales` are not such powers.
        """
        super().__init__()
        self.output_size = (
            (output_size, output_size) if isinstance(output_size, int) else output_size
        )
        if pooler_type not in _POOLER_TYPES:
            hint = did_you_mean(pooler_type, _POOLER_TYPES)
            known = ", ".join(_POOLER_TYPES)
            raise ValueError(f"pooler_type must be one of {known}, got {pooler_type!r}.{hint}")
        # A level is the log of its stride.
        levels = [-math.log2(scale) for scale in scales]
        self.min_level = round(levels[0]) if levels else 0
        self.max_level = self.min_level + len(levels) - 1
        wanted = range(self.min_level, self.max_level + 1)
        if not levels or any(abs(a - b) > 1e-4 for a, b in zip(levels, wanted, strict=True)):
            raise ContractError(
                "scales must be those of pooled features with strides that double from level to"
                f" level, from a power of two on; got strides {[1 / scale for scale in scales]}"
            )
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level
        self.level_poolers = nn.ModuleList()
        for scale in scales:
            if pooler_type == "ROIAlignRotated":
                pooler = ROIAlignRotated(self.output_size, scale, sampling_ratio)
            elif pooler_type == "ROIPool":
                pooler = _ROIPool(self.output_size, scale)
            else:
                aligned = pooler_type == "ROIAlignV2"
                pooler = ROIAlign(self.output_size, scale, sampling_ratio, aligned)
            self.level_poolers.append(pooler)

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Boxes]) -> Tensor:
        """Pool the regions of all images.

        Args:
            x: L features (N, C, H, W), finest first.
            box_lists: The regions of each of the N images, in pixels of the image.

        Returns:
            (R, C, height, width), in the order of the regions; empty, and part of the graph, when R
            is 0.
        """
        if len(x) != len(self.level_poolers):
            raise ContractError(
                f"the pooler has {len(self.level_poolers)} levels, got {len(x)} features"
            )
        is_batch = isinstance(box_lists[0], BatchBoxes) if box_lists else False
        if not is_batch and len(box_lists) != x[0].shape[0]:
            raise ContractError(
                f"need regions for each of {x[0].shape[0]} images, got {len(box_lists)} sets"
            )
        if not box_lists:
            return x[0].new_zeros(0, x[0].shape[1], *self.output_size)
        rois = convert_boxes_to_pooler_format(box_lists)
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois)
        levels = assign_boxes_to_levels(
            box_lists, self.min_level, self.max_level, self.canonical_box_size, self.canonical_level
        )
        if is_traced():
            indices = [nonzero_tuple(levels == level)[0] for level in range(len(x))]
        else:
            # One wait for the device, to learn how many regions a level has. Selecting level by
            # level would wait L times.
            counts = torch.stack([(levels == level).sum() for level in range(len(x))]).tolist()
            indices = torch.argsort(levels, stable=True).split(counts)
        # Each level is written to its rows of one result. Concatenating the levels and sorting the
        # rows takes 2.5 times as long on a CPU (90 against 36 ms for 1,000 regions).
        pooled = x[0].new_empty(rois.shape[0], x[0].shape[1], *self.output_size)
        for pooler, x_l, indices_l in zip(self.level_poolers, x, indices, strict=True):
            pooled.index_copy_(0, indices_l, pooler(x_l, rois[indices_l]))
        return pooled
