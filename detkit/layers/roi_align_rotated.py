"""Turned regions of a feature map, resampled to one size.

Legend: N images, C channels, H and W height and width of the feature map, R regions over the batch,
    P output size, B output cells over all regions, S samples over all cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from detkit.layers.cpu.switch import may_run_on
from detkit.layers.cpu.weighted_rows import weighted_row_sums
from detkit.utils.errors import ContractError

# Samples of one step, of about 150 bytes each.
_MAX_SAMPLES = 1_000_000


class ROIAlignRotated(nn.Module):
    """Mean of bilinear samples in each cell of a P x P grid over each turned region.

    The grid turns with the region: the first row of cells lies along the side that is the upper one
    at angle 0. Pixel centers lie at half coordinates, as in `ROIAlign` with `aligned=True`.

    Source: Ma et al. 2017, arXiv 1703.01086, with the bilinear samples of He et al. 2017,
    arXiv 1703.06870, section 3. The numbers are those of Detectron2's operator.

    Example:
        >>> pool = ROIAlignRotated(7, spatial_scale=1 / 4, sampling_ratio=0)
        >>> pool(torch.zeros(1, 8, 20, 20), torch.tensor([[0.0, 24, 34, 30, 50, 60]])).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int
    ) -> None:
        """Build the layer.

        Args:
            output_size: P, or `(height, width)`.
            spatial_scale: Feature map pixels per image pixel: 1 / stride.
            sampling_ratio: Samples per cell and side; 0 takes one per feature map pixel that the
                cell spans.
        """
        super().__init__()
        self.output_size: tuple[int, int] = _pair(output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Resample regions.

        Args:
            input: (N, C, H, W)
            rois: (R, 6) as `(index of the image, center x, center y, width, height, angle)`, in
                image pixels and degrees counter-clockwise. They get no gradient.

        Returns:
            (R, C, P, P) in the dtype of the input and channels-last memory format.

        Raises:
            ValueError: `rois` is not (R, 6).
        """
        if rois.dim() != 2 or rois.shape[1] != 6:
            raise ContractError(
                f"need regions (R, 6), image index and XYWHA: got {tuple(rois.shape)}"
            )
        # Never in half precision: bfloat16 moves a region at coordinate 1000 by up to two pixels.
        features = input if input.dtype in (torch.float32, torch.float64) else input.float()
        pooled = roi_align_rotated(
            features,
            rois.detach().to(features.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
        )
        return pooled.to(input.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}"
        )


def roi_align_rotated(
    input: Tensor,
    roi: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
) -> Tensor:
    """Return the pooled regions; see `ROIAlignRotated`. Both tensors have the same dtype."""
    channels, height, width = input.shape[1:]
    size = roi[:, 3:5].flip(1) * spatial_scale
    cell_size = size / size.new_tensor(output_size)
    per_side = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else cell_size.ceil()
    per_cell = per_side.prod(dim=1).clamp(min=0)
    cells_per_roi = output_size[0] * output_size[1]
    # Waits for the device; with a fixed ratio, the number is known.
    num_samples = (
        len(roi) * sampling_ratio**2 if sampling_ratio > 0 else int(per_cell.sum())
    ) * cells_per_roi
    if len(roi) > 1 and num_samples > _MAX_SAMPLES:
        settings = (output_size, spatial_scale, sampling_ratio)
        halves = roi.tensor_split(2)
        return torch.cat([roi_align_rotated(input, half, *settings) for half in halves])

    per_cell = per_cell.long().repeat_interleave(cells_per_roi)
    cell = torch.repeat_interleave(per_cell, output_size=num_samples)
    first_sample = per_cell.cumsum(0) - per_cell
    number = torch.arange(num_samples, device=roi.device) - first_sample.index_select(0, cell)
    y, x = _sample_points(roi, cell, number, per_side, cell_size, output_size, spatial_scale)
    share = (1 / per_cell.to(roi.dtype)).index_select(0, cell)
    rows, weights = _bilinear(y, x, height, width)
    first_row = roi[:, 0].long() * (height * width)
    rows += first_row.index_select(0, cell // cells_per_roi)[:, None]
    # A cell is a weighted sum of pixels, with the same weights for all channels: of rows of a
    # channels-last feature map. `embedding_bag` has kernels and a backward pass for it on every
    # device, and bags may differ in size.
    table = input.permute(0, 2, 3, 1).reshape(-1, channels)
    rows, weights = rows.flatten(), (weights * share[:, None]).flatten()
    starts = first_sample * 4
    if may_run_on(input):
        pooled = weighted_row_sums(table, rows, starts, weights)
    else:
        pooled = F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)
    return pooled.reshape(len(roi), *output_size, channels).permute(0, 3, 1, 2)


def _sample_points(
    roi: Tensor,
    cell: Tensor,
    number: Tensor,
    per_side: Tensor,
    cell_size: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the (S,) y and x of samples on the feature map, pixel centers at whole numbers.

    Args:
        roi: (R, 6)
        cell: (S,) index of the cell, in [0, B), of each sample.
        number: (S,) number of the sample within its cell, row by row.
        per_side: (R, 2) samples of a cell along y and x.
        cell_size: (R, 2) height and width of a cell, in feature map pixels.
        output_size: P along y and along x.
        spatial_scale: Feature map pixels per image pixel.
    """
    # All that samples need of their regions, selected at once: indexing takes five times as long.
    angle = torch.deg2rad(roi[:, 5])
    center = roi[:, 1:3] * spatial_scale - 0.5
    of_regions = torch.stack(
        [*per_side.T, *cell_size.T, *center.T, angle.cos(), angle.sin()],
    )
    region = cell // (output_size[0] * output_size[1])
    grid_y, grid_x, cell_h, cell_w, center_x, center_y, cos, sin = of_regions.index_select(
        1, region
    )
    row = cell // output_size[1] % output_size[0]
    column = cell % output_size[1]
    columns = grid_x.long()
    sample_row = number.div(columns, rounding_mode="floor")
    sample_column = number - sample_row * columns
    # From the center of the region, along its sides.
    y = (row - output_size[0] / 2 + (sample_row + 0.5) / grid_y) * cell_h
    x = (column - output_size[1] / 2 + (sample_column + 0.5) / grid_x) * cell_w
    return y * cos - x * sin + center_y, y * sin + x * cos + center_x


def _bilinear(y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the (S, 4) pixels around each point, counted row by row, and their (S, 4) weights."""
    # Up to a pixel outside, the nearest pixel of the border counts; beyond it, nothing.
    counts = ((y >= -1) & (y <= height) & (x >= -1) & (x <= width)).to(y.dtype)
    # NaN and values beyond the integers must not become an index.
    y = y.nan_to_num().clamp(0, height - 1)
    x = x.nan_to_num().clamp(0, width - 1)
    top, left = y.floor(), x.floor()
    lower, right = (y - top) * counts, x - left
    upper = counts - lower
    weights = torch.stack(
        [upper * (1 - right), upper * right, lower * (1 - right), lower * right], dim=1
    )
    top, left = top.long(), left.long()
    bottom = (top + 1).clamp(max=height - 1) * width
    next_left = (left + 1).clamp(max=width - 1)
    top = top * width
    return torch.stack([top + left, top + next_left, bottom + left, bottom + next_left], 1), weights
