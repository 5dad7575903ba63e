"""Convolution with its norm and activation; blocks made of it, and the shapes that they declare.

Legend: N images, C channels in, K channels out, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from detkit.layers.cpu.prepared_weights import are_weights_kept, prepared
from detkit.layers.cpu.winograd import (
    WinogradConv2d,
    needs_gradient,
    transform_weight,
    winograd_applies,
    winograd_conv2d,
)
from detkit.layers.norm import (
    FixedNorm,
    FrozenBatchNorm2d,
    fixed_norm,
    get_norm,
    scale_and_shift,
)

Block = TypeVar("Block", bound="CNNBlockBase")


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by an optional norm and an optional activation.

    A norm that is a fixed map per channel at the moment (FrozenBN; BN in eval mode) is folded into
    the weight and bias of the convolution: the same numbers and gradients up to rounding, with one
    pass over the feature map less. The norm module itself, and hooks on it, are not called then.

    With `is_standardized` set, the convolution uses its weight with mean 0 and standard deviation 1
    over each output channel (Siyuan Qiao et al. 2019, arXiv 1903.10520).

    On a CPU, 3x3 convolutions of large maps use Winograd's algorithm, which
    `detkit.layers.cpu_kernels(False)` turns off.

    Example:
        >>> import torch
        >>> conv = Conv2d(3, 8, 3, padding=1, norm=nn.BatchNorm2d(8), activation=nn.ReLU())
        >>> conv(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 8, 32, 32])
    """

    def __init__(
        self,
        *args: Any,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the layer.

        Args:
            *args: As in `torch.nn.Conv2d`.
            norm: Applied to the output of the convolution.
            activation: Applied last. It may work in place.
            **kwargs: As in `torch.nn.Conv2d`.
        """
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation
        self.is_standardized = False

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, K, H_out, W_out) for (N, C, H, W). N may be 0."""
        fixed = fixed_norm(self.norm)
        sources = folding_sources(self.weight, self.bias, fixed)
        if self.is_standardized:
            x = self._conv_forward(input, *fold(standardized(self.weight), self.bias, fixed))
        elif not winograd_applies(input, sources, self):
            dtype = _kept_dtype(self.weight)
            x = self._conv_forward(input, *folded(self, self.weight, self.bias, fixed, dtype))
        elif needs_gradient((input, *sources)):
            x = WinogradConv2d.apply(input, *fold(self.weight, self.bias, fixed))
        else:

            def transform() -> tuple[Tensor, Tensor | None]:
                weight, bias = fold(self.weight, self.bias, fixed)
                return transform_weight(weight), bias

            x = winograd_conv2d(input, *prepared(self, "winograd", sources, transform))
        if fixed is None and self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)


def standardized(weight: Tensor) -> Tensor:
    """Return a weight (K, C, ...) with mean 0 and standard deviation 1 over each row."""
    rows = weight.flatten(1)
    deviation = rows.std(dim=1, keepdim=True) + 1e-5
    return ((rows - rows.mean(dim=1, keepdim=True)) / deviation).view_as(weight)


def fold(
    weight: Tensor, bias: Tensor | None, norm: FixedNorm | None
) -> tuple[Tensor, Tensor | None]:
    """Return weight (K, C, ...) and bias (K,) of a convolution that includes the norm after it."""
    if norm is None:
        return weight, bias
    scale, shift = scale_and_shift(norm)
    return weight * scale.view(-1, 1, 1, 1), shift if bias is None else shift + bias * scale


def folded(
    layer: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    norm: FixedNorm | None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return `fold` of a layer's weight and bias, computed once where weights are kept.

    With a `dtype`, they are cast to it.
    """
    # Elsewhere in every forward pass: a folded weight that is stored would be a second state of the
    # layer, which an optimizer step or a loaded checkpoint leaves out of date.
    if norm is None and dtype is None:
        return weight, bias

    def compute() -> tuple[Tensor, Tensor | None]:
        of_both, shift = fold(weight, bias, norm)
        kind = dtype or of_both.dtype
        return of_both.to(kind), None if shift is None else shift.to(kind)

    return prepared(layer, f"folded {dtype}", folding_sources(weight, bias, norm), compute)


def _kept_dtype(weight: Tensor) -> torch.dtype | None:
    """Return the type to which autocast would cast a kept weight in each forward pass, if any."""
    device_type = weight.device.type
    if not are_weights_kept() or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def folding_sources(weight: Tensor, bias: Tensor | None, norm: FixedNorm | None) -> list[Tensor]:
    """Return the tensors that `fold` reads."""
    of_norm = [] if norm is None else [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [tensor for tensor in (weight, bias, *of_norm) if tensor is not None]


class CNNBlockBase(nn.Module):
    """A block from (N, `in_channels`, H, W) to (N, `out_channels`, H / `stride`, W / `stride`)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self: Block) -> Block:
        """Stop training the block: no gradients, and batch norms become FrozenBatchNorm2d."""
        for parameter in self.parameters():
            parameter.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self


@dataclass(frozen=True)
class ShapeSpec:
    """The shape of a feature map, as far as it is known before there is an input.

    Example:
        >>> ShapeSpec(channels=256, stride=4)
        ShapeSpec(channels=256, height=None, width=None, stride=4)
    """

    channels: int | None = None
    height: int | None = None
    width: int | None = None
    stride: int | None = None
    """Pixels of the input image per step on the feature map."""


class _Weighted(Protocol):
    """A linear or convolutional layer."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


# The two initialisations of Caffe2's detection models, under the names of fvcore. Not imported from
# `fvcore.nn`: importing that package compiles a loss with `torch.jit.script`, for which today's
# torch shows a deprecation warning on every start, and which a later one may lack.


def c2_xavier_fill(module: _Weighted) -> None:
    """Fill the weight from U(-a, a) with `a = sqrt(3 / fan_in)`, and the bias with 0.

    Source: Caffe2's XavierFill, which differs from Glorot and Bengio 2010 in leaving out `fan_out`.
    """
    nn.init.kaiming_uniform_(module.weight, a=1)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def c2_msra_fill(module: _Weighted) -> None:
    """Fill the weight from N(0, 2 / fan_out), and the bias with 0.

    Source: Caffe2's MSRAFill; He et al. 2015, arXiv 1502.01852, section 2.2, the backward form.
    """
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def conv_norm_relu(in_channels: int, out_channels: int, norm: str | None) -> Conv2d:
    """Build a 3x3 convolution with norm and ReLU, as heads stack them, filled by `c2_msra_fill`.

    Args:
        in_channels: C
        out_channels: K
        norm: As in `get_norm`. Without a norm the convolution has a bias.
    """
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        padding=1,
        bias=not norm,
        norm=get_norm(norm, out_channels),
        # In place: neither a convolution nor a norm needs its own output in the backward pass.
        activation=nn.ReLU(inplace=True),
    )
    c2_msra_fill(conv)
    return conv
