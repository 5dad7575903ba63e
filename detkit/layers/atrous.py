"""Parts of DeepLab: depthwise separable convolutions, and pooling by convolutions of many rates.

Legend: N images, C channels in, K channels out, H and W height and width.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.layers.conv import Conv2d, c2_msra_fill, c2_xavier_fill
from detkit.layers.norm import get_norm

Norm = str | Callable[[int], nn.Module] | None
Activation = Callable[[Tensor], Tensor] | None


class DepthwiseSeparableConv2d(nn.Module):
    """A convolution of each channel by itself, then a 1x1 convolution over the channels.

    Source: Chollet 2016, arXiv 1610.02357; with rates: Chen et al. 2018, arXiv 1802.02611.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        padding: int = 1,
        dilation: int = 1,
        *,
        norm1: Norm = None,
        activation1: Activation = None,
        norm2: Norm = None,
        activation2: Activation = None,
    ) -> None:
        """Build both layers.

        Args:
            in_channels: C
            out_channels: K
            kernel_size: Of the first.
            padding: Of the first.
            dilation: Of the first.
            norm1: Norm of the first, as in `get_norm`.
            activation1: Activation of the first.
            norm2: Norm of the second.
            activation2: Activation of the second.
        """
        super().__init__()
        self.depthwise = Conv2d(
            in_channels,
            in_channels,
            kernel_size=kernel_size,
            padding=padding,
            dilation=dilation,
            groups=in_channels,
            bias=not norm1,
            norm=get_norm(norm1, in_channels),
            activation=activation1,
        )
        self.pointwise = Conv2d(
            in_channels,
            out_channels,
            kernel_size=1,
            bias=not norm2,
            norm=get_norm(norm2, out_channels),
            activation=activation2,
        )
        c2_msra_fill(self.depthwise)
        c2_msra_fill(self.pointwise)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K, H, W) for (N, C, H, W)."""
        return self.pointwise(self.depthwise(x))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: convolutions of several rates, and the mean of the image.

    Source: Chen et al. 2017, arXiv 1706.05587, section 3.3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        dilations: Sequence[int],
        *,
        norm: Norm,
        activation: Callable[[Tensor], Tensor],
        pool_kernel_size: tuple[int, int] | None = None,
        dropout: float = 0.0,
        use_depthwise_separable_conv: bool = False,
    ) -> None:
        """Build the branches.

        Args:
            in_channels: C
            out_channels: K, of each branch and of the output.
            dilations: Rates of the three 3x3 convolutions.
            norm: Norm of each convolution but that of the mean, as in `get_norm`.
            activation: After each convolution.
            pool_kernel_size: (height, width) of the window of the mean, which must divide H and W;
                None for the whole image.
            dropout: Share of the output that is dropped in training.
            use_depthwise_separable_conv: Whether the 3x3 convolutions are separable.

        Raises:
            ValueError: There are not three rates.
        """
        super().__init__()
        if len(dilations) != 3:
            raise ValueError(f"ASPP takes three dilations, got {list(dilations)}")
        self.pool_kernel_size = pool_kernel_size
        self.dropout = dropout

        def convolution(channels: int, **kwargs: Any) -> Conv2d:
            conv = Conv2d(
                channels,
                out_channels,
                bias=not norm,
                norm=get_norm(norm, out_channels),
                activation=deepcopy(activation),
                **kwargs,
            )
            c2_xavier_fill(conv)
            return conv

        # Names of weights as in Detectron2: convs.0 to convs.4, project.
        self.convs = nn.ModuleList([convolution(in_channels, kernel_size=1)])
        for dilation in dilations:
            if use_depthwise_separable_conv:
                self.convs.append(
                    DepthwiseSeparableConv2d(
                        in_channels,
                        out_channels,
                        kernel_size=3,
                        padding=dilation,
                        dilation=dilation,
                        norm1=norm,
                        activation1=deepcopy(activation),
                        norm2=norm,
                        activation2=deepcopy(activation),
                    )
                )
            else:
                self.convs.append(
                    convolution(in_channels, kernel_size=3, padding=dilation, dilation=dilation)
                )
        # Never a norm: in training the mean is one pixel, with a window of the size of a crop too,
        # and a batch norm of one image cannot train on it. Detectron2's weights have a bias there.
        pooled = Conv2d(in_channels, out_channels, 1, bias=True, activation=deepcopy(activation))
        c2_xavier_fill(pooled)
        pool = (
            nn.AdaptiveAvgPool2d(1)
            if pool_kernel_size is None
            else nn.AvgPool2d(kernel_size=pool_kernel_size, stride=1)
        )
        self.convs.append(nn.Sequential(pool, pooled))
        self.project = convolution(5 * out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, K, H, W) for (N, C, H, W).

        Raises:
            ValueError: `pool_kernel_size` does not divide H and W.
        """
        size = x.shape[-2:]
        if self.pool_kernel_size is not None and (
            size[0] % self.pool_kernel_size[0] or size[1] % self.pool_kernel_size[1]
        ):
            raise ValueError(
                f"pool_kernel_size {self.pool_kernel_size} must divide the input's {tuple(size)}"
            )
        branches = [conv(x) for conv in self.convs]
        branches[-1] = F.interpolate(branches[-1], size=size, mode="bilinear", align_corners=False)
        found = self.project(torch.cat(branches, dim=1))
        return F.dropout(found, self.dropout, training=self.training) if self.dropout > 0 else found
