"""Convolution with its norm and activation.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from detkit.layers.folding import fold, folded, folding_sources
from detkit.layers.norm import FixedNorm, fixed_norm
from detkit.layers.prepared_weights import prepared
from detkit.layers.winograd import transform_weight, winograd_applies, winograd_conv2d


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` followed by an optional norm and an optional activation.

    A norm that is a fixed map per channel at the moment (FrozenBN; BN in eval mode) is folded into
    the convolution's weight and bias: the same numbers and gradients up to rounding, with one pass
    over the feature map less. Folded in every forward pass, so that there is no second state of the
    weights that could be out of date, except where `detkit.layers.prepared_weights` are in use. The
    norm module itself is not called then, nor are hooks on it.

    In eval mode without gradients on a CPU, large 3 x 3 convolutions go by
    `detkit.layers.winograd`: again the same numbers up to rounding.
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
            activation: Applied last. It may work in place: nothing before it needs its own output
                again.
            **kwargs: As in `torch.nn.Conv2d`.
        """
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Return (N, C_out, H_out, W_out) for (N, C_in, H, W). N may be 0."""
        fixed = fixed_norm(self.norm)
        x = self._convolved(input, fixed)
        if fixed is None and self.norm is not None:
            x = self.norm(x)
        return x if self.activation is None else self.activation(x)

    def _convolved(self, input: Tensor, norm: FixedNorm | None) -> Tensor:
        sources = folding_sources(self.weight, self.bias, norm)
        if winograd_applies(input, sources, self):
            points, bias = prepared(self, "winograd", sources, lambda: self._transformed(norm))
            return winograd_conv2d(input, points, bias)
        return self._conv_forward(input, *folded(self, self.weight, self.bias, norm))

    def _transformed(self, norm: FixedNorm | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = fold(self.weight, self.bias, norm)
        return transform_weight(weight), bias
