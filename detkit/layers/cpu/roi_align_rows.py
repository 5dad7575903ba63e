"""ROIAlign on a CPU as weighted sums of rows, for feature maps that are channels-last in memory.

An output cell is a weighted sum of pixels, and the weights are the same for all channels. Over a
channels-last feature map that is a weighted sum of rows of a table, for which torch has a parallel,
vectorised kernel: see `weighted_row_sums`. torchvision's kernel works channel by channel on one
core, and needs the channels apart.

The weights are separable: what a cell takes from a pixel is a factor for the pixel's row times one
for its column. So the samples of a cell are first summed per row and per column ("taps"), and only
then multiplied out.

Measured on two shared cores, 1,000 regions to 7x7 over (256, 200, 272), one sample per pixel:
torchvision 0.7 s, this 0.08 s. With the backward pass, 500 regions, in CPU time: 1.85 s and 0.16 s.

Legend: N images, C channels, H and W height and width of the feature map, R regions over the batch,
P output size along an axis, S samples per cell along an axis, K taps over all regions along an
axis, B output cells over all regions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detkit.layers.cpu.weighted_rows import weighted_row_sums

# Pixels multiplied out at a time: about 50 bytes each.
_MAX_PIXELS = 4_000_000


class _Taps(NamedTuple):
    """The rows (or columns) of the feature map that each of R * P output rows (columns) sums."""

    position: Tensor
    """(K,) int64 row or column of the feature map, ordered by output row or column."""
    weight: Tensor
    """(K,) their factors."""
    count: Tensor
    """(R, P) int64 how many taps an output row or column has."""


def roi_align_rows(
    features: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Return `torchvision.ops.roi_align` of the same arguments, in channels-last memory format.

    Args:
        features: (N, C, H, W) in channels-last memory format, on the CPU.
        rois: (R, 5) as `(index of the image, x1, y1, x2, y2)`. Takes no gradient.
        output_size: P along y and along x.
        spatial_scale: As in torchvision.
        sampling_ratio: As in torchvision.
        aligned: As in torchvision.
    """
    _, channels, height, width = features.shape
    rois = rois.detach()
    first, last = (rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)).split(2, dim=1)
    size = last - first if aligned else (last - first).clamp(min=1)
    y = _axis_taps(first[:, 1], size[:, 1], output_size[0], height, sampling_ratio)
    x = _axis_taps(first[:, 0], size[:, 0], output_size[1], width, sampling_ratio)

    pixels = y.count[:, :, None] * x.count[:, None, :]
    if len(rois) > 1 and int(pixels.sum()) > _MAX_PIXELS:
        settings = (output_size, spatial_scale, sampling_ratio, aligned)
        halves = rois.tensor_split(2)
        return torch.cat([roi_align_rows(features, half, *settings) for half in halves])
    row, column, weight = _multiply_out(y, x, pixels.flatten())
    image = rois[:, 0].long().repeat_interleave(pixels.sum(dim=(1, 2)))
    cells = weighted_row_sums(
        features.permute(0, 2, 3, 1).reshape(-1, channels),
        (image * height + row) * width + column,
        _starts(pixels.flatten()),
        weight,
    )
    return cells.reshape(len(rois), *output_size, channels).permute(0, 3, 1, 2)


def _axis_taps(first: Tensor, size: Tensor, cells: int, limit: int, sampling_ratio: int) -> _Taps:
    """Return what each output row (or column) takes from the rows (columns) of the feature map.

    Args:
        first: (R,) start of the regions along the axis, in feature map pixels.
        size: (R,) their extent.
        cells: P
        limit: H or W.
        sampling_ratio: S; 0 for one per pixel.
    """
    # The order of these operations is torchvision's: another would round differently, and rounding
    # decides whether a sample at the border of the feature map counts.
    cell_size = size / cells
    samples = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else cell_size.ceil()
    divisor = samples.clamp(min=1)[:, None]
    index = torch.arange(int(divisor.max()) if len(size) > 0 else 1)
    cell_start = first[:, None] + torch.arange(cells) * cell_size[:, None]
    point = cell_start[:, :, None] + ((index + 0.5) * cell_size[:, None] / divisor)[:, None, :]
    counts = (index < samples[:, None])[:, None, :] & (point >= -1) & (point <= limit)

    # Bilinear: a sample takes from the pixel below it, and from the next by its distance.
    point = point.clamp(0, limit - 1)
    lower = point.floor()
    above = point - lower
    lower = lower.long()
    start = lower.amin(dim=2, keepdim=True)
    offset = torch.where(counts, lower - start, 0)
    share = counts / divisor[:, :, None]
    weight = point.new_zeros(*offset.shape[:2], int(offset.max()) + 2 if offset.numel() > 0 else 2)
    weight.scatter_add_(2, offset, (1 - above) * share)
    weight.scatter_add_(2, offset + 1, above * share)

    taken = weight != 0
    position = start + torch.arange(weight.shape[2])
    return _Taps(position[taken], weight[taken], taken.sum(dim=2))


def _multiply_out(y: _Taps, x: _Taps, pixels_per_cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and weight of each pixel that an output cell sums, ordered by cell.

    Args:
        y: Taps along y.
        x: Taps along x.
        pixels_per_cell: (B,) the product of the counts of the two.
    """
    shape = (*y.count.shape, x.count.shape[1])
    y_start = _starts(y.count.flatten()).reshape(y.count.shape)[:, :, None].expand(shape).flatten()
    x_start = _starts(x.count.flatten()).reshape(x.count.shape)[:, None, :].expand(shape).flatten()
    x_count = x.count[:, None, :].expand(shape).flatten()

    # Pixel number n of a cell is row tap n // x_count and column tap n % x_count.
    cell = torch.arange(len(pixels_per_cell)).repeat_interleave(pixels_per_cell)
    # `index_select`, which takes half the time of indexing.
    number_in_cell = torch.arange(len(cell)) - _starts(pixels_per_cell).index_select(0, cell)
    x_count = x_count.index_select(0, cell)
    y_number = number_in_cell.div(x_count, rounding_mode="floor")
    y_tap = y_start.index_select(0, cell) + y_number
    x_tap = x_start.index_select(0, cell) + number_in_cell - y_number * x_count
    row, column = y.position.index_select(0, y_tap), x.position.index_select(0, x_tap)
    weight = y.weight.index_select(0, y_tap) * x.weight.index_select(0, x_tap)
    return row, column, weight


def _starts(counts: Tensor) -> Tensor:
    """Return the start of each run, for consecutive runs of these lengths."""
    return counts.cumsum(0) - counts
