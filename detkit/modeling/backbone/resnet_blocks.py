"""The stem and the residual blocks of ResNet.

Paper: Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning for Image
Recognition, 2015, arXiv 1512.03385. Groups are from ResNeXt: Saining Xie et al. 2016, arXiv
1611.05431. The deep stem and the pooled shortcut are models C and D of Tong He, Zhi Zhang, Hang
Zhang, Zhongyue Zhang, Junyuan Xie, Mu Li: Bag of Tricks for Image Classification with Convolutional
Neural Networks, 2018, arXiv 1812.01187. Deformable convolutions: see `detkit.layers.deform_conv`.

Legend: N images, C channels, H and W height and width, S stride.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.layers import (
    CNNBlockBase,
    Conv2d,
    DeformConv,
    ModulatedDeformConv,
    c2_msra_fill,
    get_norm,
)

# What layers.get_norm takes.
Norm = str | Callable[[int], nn.Module] | None


def _conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    norm: Norm,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
) -> Conv2d:
    # No bias: the norm has one. Without a norm nothing takes its place, as in Detectron2.
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        groups=groups,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    c2_msra_fill(conv)
    return conv


class PooledConv2d(Conv2d):
    """A 1x1 convolution of the mean over each S x S pixels, instead of one with stride S."""

    # A strided 1x1 convolution reads one of S x S pixels and ignores the others (model D of the bag
    # of tricks).

    def __init__(
        self, in_channels: int, out_channels: int, pool_stride: int, norm: nn.Module | None
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False, norm=norm)
        self.pool_stride = pool_stride

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C_out, H / S, W / S), rounded up."""
        size = self.pool_stride
        # Rounded up, as the size after a strided convolution; a cell at the border is the mean of
        # the pixels that exist.
        pooled = F.avg_pool2d(input, size, size, ceil_mode=True, count_include_pad=False)
        return super().forward(pooled)


def _shortcut(
    in_channels: int, out_channels: int, stride: int, norm: Norm, avg_down: bool
) -> Conv2d | None:
    # The identity wherever it fits (option B of He et al., section 4.1).
    if in_channels == out_channels and stride == 1:
        return None
    if not avg_down or stride == 1:
        return _conv(in_channels, out_channels, 1, stride=stride, norm=norm)
    pooled = PooledConv2d(in_channels, out_channels, stride, get_norm(norm, out_channels))
    c2_msra_fill(pooled)
    return pooled


class BasicStem(CNNBlockBase):
    """A convolution with stride 2, in the paper 7x7, ReLU, and a 3x3 max-pool with stride 2."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        norm: Norm = "BN",
        kernel_size: int = 7,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=4)
        self.conv1 = _conv(in_channels, out_channels, kernel_size, stride=2, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / 4, W / 4)."""
        return F.max_pool2d(F.relu_(self.conv1(x)), kernel_size=3, stride=2, padding=1)


class DeepStem(CNNBlockBase):
    """Three 3x3 convolutions instead of a 7x7, the first with stride 2, then a 3x3 max-pool."""

    def __init__(self, in_channels: int = 3, out_channels: int = 64, norm: Norm = "BN") -> None:
        """Build the stem.

        Raises:
            ValueError: `out_channels` is odd.
        """
        super().__init__(in_channels, out_channels, stride=4)
        if out_channels % 2 != 0:
            raise ValueError(
                f"a deep stem needs an even number of out_channels: got {out_channels}"
            )
        # 32, 32 and 64 channels, as model C of the bag of tricks.
        half = out_channels // 2
        self.conv1 = _conv(in_channels, half, 3, stride=2, norm=norm)
        self.conv2 = _conv(half, half, 3, norm=norm)
        self.conv3 = _conv(half, out_channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / 4, W / 4)."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu_(conv(x))
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class ResidualBlock(CNNBlockBase):
    """Convolutions beside a shortcut, with plugins between them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        self._plugins: dict[str, list[str]] = {}

    def plug(self, position: str, name: str, module: nn.Module) -> None:
        """Insert a module from (N, C, H, W) to the same.

        Args:
            position: `after_conv1`, `after_conv2`, ...: behind norm and ReLU of a convolution; of
                the last one behind the norm, before the sum.
            name: Of the module in the block. It must be free.
            module: What to insert.
        """
        self.add_module(name, module)
        self._plugins.setdefault(position, []).append(name)

    def _plugged(self, position: str, x: Tensor) -> Tensor:
        for name in self._plugins.get(position, ()):
            x = self.get_submodule(name)(x)
        return x


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions, the first with the stride: the block of ResNet-18 and 34."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        norm: Norm = "BN",
        dilation: int = 1,
        dilation_conv2: int | None = None,
        avg_down: bool = False,
    ) -> None:
        """Build the block.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: S
            norm: As in `get_norm`.
            dilation: Dilation of both convolutions.
            dilation_conv2: Another one for the second convolution.
            avg_down: Put the stride of the shortcut in an average pooling before its convolution.
        """
        super().__init__(in_channels, out_channels, stride)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm, avg_down)
        self.conv1 = _conv(
            in_channels, out_channels, 3, stride=stride, dilation=dilation, norm=norm
        )
        dilation_conv2 = dilation if dilation_conv2 is None else dilation_conv2
        self.conv2 = _conv(out_channels, out_channels, 3, dilation=dilation_conv2, norm=norm)

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm before the residual sum."""
        return self.conv2.norm

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / S, W / S)."""
        # ReLU and the residual sum work in place: neither a convolution nor a norm needs its own
        # output in the backward pass.
        out = self._plugged("after_conv1", F.relu_(self.conv1(x)))
        out = self._plugged("after_conv2", self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class BottleneckBlock(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions, the 3x3 with fewer channels: the block of ResNet-50 and up."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        avg_down: bool = False,
    ) -> None:
        """Build the block. Arguments that are not listed are those of `BasicBlock`.

        Args:
            bottleneck_channels: Channels of the 3x3 convolution.
            num_groups: Groups of the 3x3 convolution.
            stride_in_1x1: Put the stride in the first 1x1 convolution, as the paper and MSRA's
                weights do, instead of the 3x3, as torchvision's do.
            dilation: Dilation of the 3x3 convolution.

        Raises:
            ValueError: The groups do not divide the channels of the 3x3 convolution.
        """
        if bottleneck_channels % num_groups != 0:
            raise ValueError(
                f"num_groups={num_groups} must divide bottleneck_channels={bottleneck_channels}"
            )
        super().__init__(in_channels, out_channels, stride)
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.shortcut = _shortcut(in_channels, out_channels, stride, norm, avg_down)
        self.conv1 = _conv(in_channels, bottleneck_channels, 1, stride=stride_1x1, norm=norm)
        # Any module to a type checker: `DeformBottleneckBlock` puts another class there.
        self.conv2: nn.Module = _conv(
            bottleneck_channels,
            bottleneck_channels,
            3,
            stride=stride_3x3,
            dilation=dilation,
            groups=num_groups,
            norm=norm,
        )
        self.conv3 = _conv(bottleneck_channels, out_channels, 1, norm=norm)

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm before the residual sum."""
        return self.conv3.norm

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / S, W / S)."""
        # In place as in `BasicBlock`.
        out = self._plugged("after_conv1", F.relu_(self.conv1(x)))
        out = self._plugged("after_conv2", F.relu_(self._spatial(out)))
        out = self._plugged("after_conv3", self.conv3(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)

    def _spatial(self, x: Tensor) -> Tensor:
        """Return the 3x3 convolution with its norm, which a subclass may replace."""
        return self.conv2(x)


class DeformBottleneckBlock(BottleneckBlock):
    """A bottleneck whose 3x3 convolution is deformable.

    `conv2_offset`, a convolution over the same map, predicts the offsets.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        num_groups: int = 1,
        norm: Norm = "BN",
        stride_in_1x1: bool = False,
        dilation: int = 1,
        avg_down: bool = False,
        deform_modulated: bool = False,
        deform_num_groups: int = 1,
    ) -> None:
        """Build the block. Arguments that are not listed are those of `BottleneckBlock`.

        Args:
            dilation: Dilation of the 3x3 convolution and of `conv2_offset`.
            deform_modulated: Modulate the samples (v2), by factors in (0, 1) that start at 0.5.
            deform_num_groups: Groups of offsets.
        """
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            num_groups=num_groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            dilation=dilation,
            avg_down=avg_down,
        )
        self.deform_modulated = deform_modulated
        stride_3x3 = 1 if stride_in_1x1 else stride
        # Numbers for each of the 9 places of the kernel: dy and dx, and with modulation a factor.
        self.conv2_offset = Conv2d(
            bottleneck_channels,
            (3 if deform_modulated else 2) * 9 * deform_num_groups,
            3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
        )
        # From zero: a new block samples the regular grid (Dai et al. 2017, arXiv 1703.06211,
        # section 2.3).
        for parameter in self.conv2_offset.parameters():
            nn.init.zeros_(parameter)
        deform_class = ModulatedDeformConv if deform_modulated else DeformConv
        conv2 = deform_class(
            bottleneck_channels,
            bottleneck_channels,
            3,
            stride=stride_3x3,
            padding=dilation,
            dilation=dilation,
            groups=num_groups,
            deformable_groups=deform_num_groups,
            bias=False,
            norm=get_norm(norm, bottleneck_channels),
        )
        c2_msra_fill(conv2)
        self.conv2 = conv2

    def _spatial(self, x: Tensor) -> Tensor:
        offset = self.conv2_offset(x)
        if not self.deform_modulated:
            return self.conv2(x, offset)
        # Two thirds of the channels are (dy, dx) of each place, the last third its factor.
        offset, mask = offset.tensor_split([offset.shape[1] // 3 * 2], dim=1)
        return self.conv2(x, offset, mask.sigmoid())
