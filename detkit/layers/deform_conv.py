"""Deformable convolutions: each sample of the kernel is taken beside its place in the grid, by an offset that is given.

Papers: Jifeng Dai, Haozhi Qi, Yuwen Xiong, Yi Li, Guodong Zhang, Han Hu, Yichen Wei: Deformable
Convolutional Networks, 2017, arXiv 1703.06211; with modulation (v2): Xizhou Zhu, Han Hu, Stephen
Lin, Jifeng Dai: Deformable ConvNets v2: More Deformable, Better Results, 2018, arXiv 1811.11168.

Legend: N images, C channels, H and W height and width, G groups of offsets, P = kernel height *
    kernel width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair
from torchvision.ops import deform_conv2d

from detkit.layers.deform_sampling import deform_conv2d_on_cpu
from detkit.layers.folding import folded
from detkit.layers.norm import fixed_norm
from detkit.layers.tensor_ops import is_traced


class DeformConv(nn.Module):
    """Deformable convolution (v1), followed by an optional norm and an optional activation.

    The arithmetic is torchvision's, on CPUs by `detkit.layers.deform_sampling`, and in float32
    under autocast: half precision has too few digits for offsets in pixels, and torchvision has no
    bfloat16. A norm that is a fixed map per channel is folded into the weight, as in `Conv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Build the layer.

        Args:
            in_channels: C of the input.
            out_channels: C of the output.
            kernel_size: As in `torch.nn.Conv2d`.
            stride: As in `torch.nn.Conv2d`.
            padding: As in `torch.nn.Conv2d`; samples outside the image are zero.
            dilation: As in `torch.nn.Conv2d`.
            groups: Groups of the convolution.
            deformable_groups: G: each of the G equal parts of the input's channels has offsets of
                its own.
            bias: Whether the convolution has a bias.
            norm: Applied to the output of the convolution.
            activation: Applied last. It may work in place.

        Raises:
            ValueError: The groups do not divide the channels.
        """
        super().__init__()
        _check_divides("groups", groups, in_channels=in_channels, out_channels=out_channels)
        _check_divides("deformable_groups", deformable_groups, in_channels=in_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = _pair(kernel_size)
        self.stride: tuple[int, int] = _pair(stride)
        self.padding: tuple[int, int] = _pair(padding)
        self.dilation: tuple[int, int] = _pair(dilation)
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, *self.kernel_size)
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Return (N, C_out, H_out, W_out) for (N, C_in, H, W). N may be 0.

        Args:
            x: (N, C_in, H, W)
            offset: (N, 2 * G * P, H_out, W_out) in pixels of the input: for each group, for each
                place of the kernel row by row, (dy, dx).

        Raises:
            ValueError: The offset has another number of channels.
        """
        return self._convolved(x, offset, None)

    def _convolved(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        num_places = self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        _check_channels("offset", offset, 2 * num_places)
        if mask is not None:
            _check_channels("mask", mask, num_places)
            mask = mask.to(self.weight.dtype)
        fixed = fixed_norm(self.norm)
        weight, bias = folded(self, self.weight, self.bias, fixed)
        dtype = weight.dtype
        # A float32 weight leaves nothing to autocast: what comes in half precision is brought to
        # the weight's type.
        convolve = deform_conv2d_on_cpu if _is_for_cpu(x) else deform_conv2d
        y = convolve(
            x.to(dtype),
            offset.to(dtype),
            weight,
            bias,
            self.stride,
            self.padding,
            self.dilation,
            mask,
        )
        y = y.to(x.dtype)
        if fixed is None and self.norm is not None:
            y = self.norm(y)
        return y if self.activation is None else self.activation(y)

    def extra_repr(self) -> str:
        """Show what `torch.nn.Conv2d` shows, and the groups of offsets."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size},"
            f" stride={self.stride}, padding={self.padding}, dilation={self.dilation},"
            f" groups={self.groups}, deformable_groups={self.deformable_groups},"
            f" bias={self.bias is not None}"
        )


class ModulatedDeformConv(DeformConv):
    """Deformable convolution with modulation (v2): each sample also has a factor, which is given."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Build the layer; the arguments are those of `DeformConv`, the bias is on by default as in
        Detectron2.
        """
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            deformable_groups,
            bias,
            norm,
            activation,
        )

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return (N, C_out, H_out, W_out) for (N, C_in, H, W). N may be 0.

        Args:
            x: (N, C_in, H, W)
            offset: As in `DeformConv`.
            mask: (N, G * P, H_out, W_out), the factor of each sample, usually in [0, 1].

        Raises:
            ValueError: The offset or the mask has another number of channels.
        """
        return self._convolved(x, offset, mask)


def _is_for_cpu(x: Tensor) -> bool:
    # A graph has torchvision's one operator, which exporters know.
    return x.device.type == "cpu" and x.numel() > 0 and not is_traced()


def _check_divides(name: str, groups: int, **channels: int) -> None:
    for which, count in channels.items():
        if groups < 1 or count % groups != 0:
            raise ValueError(f"{name} must divide {which}: got {name}={groups}, {which}={count}")


def _check_channels(name: str, value: Tensor, channels: int) -> None:
    if value.dim() != 4 or value.shape[1] != channels:
        raise ValueError(f"{name} must be (N, {channels}, H, W): got shape {tuple(value.shape)}")
