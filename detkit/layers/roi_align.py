"""Regions of a feature map, resampled to one size.

Legend: N images, C channels, H and W height and width of the feature map, R regions over the batch,
    P output size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import roi_align

from detkit.layers.cpu.roi_align_rows import roi_align_rows
from detkit.layers.cpu.switch import may_run_on
from detkit.utils.errors import ContractError


class ROIAlign(nn.Module):
    """Mean of bilinear samples in each cell of a P x P grid over each region.

    Source: He et al. 2017, arXiv 1703.06870, section 3. `aligned=True` is the corrected form of
    Detectron2: pixel centers lie at half coordinates, so that a box over a feature map samples
    exactly the pixels it covers. False is the original form, half a pixel off, which also makes
    every region at least one pixel wide.

    Example:
        >>> pool = ROIAlign(7, spatial_scale=1 / 4, sampling_ratio=0)
        >>> pool(torch.zeros(1, 8, 20, 20), torch.tensor([[0.0, 8, 8, 40, 60]])).shape
        torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        """Build the layer.

        Args:
            output_size: P, or `(height, width)`.
            spatial_scale: Feature map pixels per image pixel: 1 / stride.
            sampling_ratio: Samples per cell and side; 0 takes one per feature map pixel that the
                cell spans.
            aligned: Whether pixel centers lie at half coordinates; see the class.
        """
        super().__init__()
        self.output_size: tuple[int, int] = _pair(output_size)
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Resample regions.

        Args:
            input: (N, C, H, W)
            rois: (R, 5) as `(index of the image, x1, y1, x2, y2)`, in image pixels.

        Returns:
            (R, C, P, P) in the dtype of the input; on a CPU, channels-last features give a
            channels-last result.

        Raises:
            ValueError: `rois` is not (R, 5).
        """
        if rois.dim() != 2 or rois.shape[1] != 5:
            raise ContractError(
                f"need regions (R, 5), image index and XYXY: got {tuple(rois.shape)}"
            )
        # Never in half precision: bfloat16 moves a region at coordinate 1000 by up to two pixels.
        features = input if input.dtype in (torch.float32, torch.float64) else input.float()
        # A graph has torchvision's one operator: the shapes in `roi_align_rows` depend on values.
        has_rows = features.is_contiguous(memory_format=torch.channels_last)
        pool = roi_align_rows if has_rows and may_run_on(features) else roi_align
        pooled = pool(
            features,
            rois.to(features.dtype),
            self.output_size,
            self.spatial_scale,
            self.sampling_ratio,
            self.aligned,
        )
        return pooled.to(input.dtype)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )
