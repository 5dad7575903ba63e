"""Deformable convolutions: the kernel samples its input at learned offsets from the regular grid.

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

from detkit.layers.conv import folded
from detkit.layers.cpu.deform_sampling import deform_conv2d_on_cpu
from detkit.layers.cpu.switch import may_run_on
from detkit.layers.norm import fixed_norm
from detkit.utils.errors import ContractError


class ShapeError(ValueError, RuntimeError):
    """An offset or mask of a wrong shape; Detectron2's operators answer with a RuntimeError."""


class _DeformConvBase(nn.Module):
    """What both versions share. The arithmetic is torchvision's, on CPUs `deform_conv2d_on_cpu`.

    A norm that is a fixed map per channel is folded into the weight, as in `Conv2d`.
    """

    _is_modulated: bool

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
        bias: bool | None = None,
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
            bias: Whether the convolution has a bias. None as in Detectron2: v2 has one, v1 not.
            norm: Applied to the output of the convolution.
            activation: Applied last. It may work in place.

        Raises:
            ValueError: `groups` does not divide `in_channels` and `out_channels`.
        """
        super().__init__()
        _check_divides("groups", groups, in_channels=in_channels, out_channels=out_channels)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size: tuple[int, int] = _pair(kernel_size)
        # As they are given in v2, as in Detectron2: scripts read and print them.
        geometry = (stride, padding, dilation)
        if not self._is_modulated:
            geometry = (_pair(stride), _pair(padding), _pair(dilation))
        self.stride, self.padding, self.dilation = geometry
        self.groups = groups
        self.deformable_groups = deformable_groups
        self.norm = norm
        self.activation = activation
        kernel = (out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(kernel))
        has_bias = self._is_modulated if bias is None else bias
        self.bias = nn.Parameter(torch.zeros(out_channels)) if has_bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        _check_divides("deformable_groups", self.deformable_groups, in_channels=self.in_channels)
        num_places = self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        _check_channels("offset", offset, 2 * num_places)
        if mask is not None:
            _check_channels("mask", mask, num_places)
            mask = mask.to(self.weight.dtype)
        fixed = fixed_norm(self.norm)
        weight, bias = folded(self, self.weight, self.bias, fixed)
        # In float32 under autocast too: half precision has too few digits for offsets in pixels,
        # and torchvision has no bfloat16. A float32 weight leaves nothing for autocast to cast.
        dtype = weight.dtype
        convolve = deform_conv2d_on_cpu if may_run_on(x) and x.numel() > 0 else deform_conv2d
        geometry = (_pair(self.stride), _pair(self.padding), _pair(self.dilation))
        y = convolve(x.to(dtype), offset.to(dtype), weight, bias, *geometry, mask).to(x.dtype)
        if fixed is None and self.norm is not None:
            y = self.norm(y)
        return y if self.activation is None else self.activation(y)

    def extra_repr(self) -> str:
        """Show what `torch.nn.Conv2d` shows, and the groups of offsets."""
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels},"
            f" kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding},"
            f" dilation={self.dilation}, groups={self.groups},"
            f" deformable_groups={self.deformable_groups}, bias={self.bias is not None}"
        )


class DeformConv(_DeformConvBase):
    """Deformable convolution (v1), followed by an optional norm and an optional activation.

    Example:
        >>> layer = DeformConv(4, 8, kernel_size=3, padding=1)
        >>> layer(torch.zeros(1, 4, 6, 6), offset=torch.zeros(1, 2 * 9, 6, 6)).shape
        torch.Size([1, 8, 6, 6])
    """

    _is_modulated = False

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Return (N, C_out, H_out, W_out) for (N, C_in, H, W). N may be 0.

        Args:
            x: (N, C_in, H, W)
            offset: (N, 2 * G * P, H_out, W_out) in pixels of the input: for each group, for each
                place of the kernel row by row, (dy, dx).

        Raises:
            ValueError: The offset has another number of channels.
        """
        return self._convolve(x, offset, None)


class ModulatedDeformConv(_DeformConvBase):
    """Deformable convolution with modulation (v2): a factor for each sample as well."""

    _is_modulated = True

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Return (N, C_out, H_out, W_out) for (N, C_in, H, W). N may be 0.

        Args:
            x: (N, C_in, H, W)
            offset: As in `DeformConv`.
            mask: (N, G * P, H_out, W_out), the factor of each sample, usually in [0, 1].

        Raises:
            ValueError: The offset or the mask has another number of channels.
        """
        return self._convolve(x, offset, mask)


def _check_divides(name: str, groups: int, **channels: int) -> None:
    for which, count in channels.items():
        if groups < 1 or count % groups != 0:
            raise ContractError(f"{name} must divide {which}: got {name}={groups}, {which}={count}")


def _check_channels(name: str, value: Tensor, channels: int) -> None:
    if value.dim() != 4 or value.shape[1] != channels:
        raise ShapeError(f"{name} must be (N, {channels}, H, W): got shape {tuple(value.shape)}")


def deform_conv(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """Return the deformable convolution of version 1 with given weights.

    `groups` and `deformable_groups` follow from the shapes; see `DeformConv` for the others.
    """
    return modulated_deform_conv(input, offset, None, weight, None, stride, padding, dilation)


def modulated_deform_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    deformable_groups: int = 1,
) -> Tensor:
    """Return the deformable convolution of version 2 with given weights; see `deform_conv`."""
    geometry = (_pair(stride), _pair(padding), _pair(dilation))
    return deform_conv2d(input, offset, weight, bias, *geometry, mask)
