"""Norms folded into the convolution before them: one pass over the feature map less.

Legend: K channels out, C channels in.
"""

from __future__ import annotations

from torch import Tensor, nn

from detkit.layers.norm import FixedNorm, scale_and_shift
from detkit.layers.prepared_weights import prepared


def fold(
    weight: Tensor, bias: Tensor | None, norm: FixedNorm | None
) -> tuple[Tensor, Tensor | None]:
    """Return the weight (K, C, ...) and the bias (K,) of a convolution that also does what the norm
    after it would.
    """
    if norm is None:
        return weight, bias
    scale, shift = scale_and_shift(norm)
    return weight * scale.view(-1, 1, 1, 1), shift if bias is None else shift + bias * scale


def folded(
    layer: nn.Module, weight: Tensor, bias: Tensor | None, norm: FixedNorm | None
) -> tuple[Tensor, Tensor | None]:
    """Return what `fold` gives for the weight and bias of a layer, computed once where prepared
    weights are in use.
    """
    if norm is None:
        return weight, bias
    return prepared(
        layer, "folded", folding_sources(weight, bias, norm), lambda: fold(weight, bias, norm)
    )


def folding_sources(weight: Tensor, bias: Tensor | None, norm: FixedNorm | None) -> list[Tensor]:
    """Return the tensors that `fold` reads."""
    of_norm = [] if norm is None else [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [tensor for tensor in (weight, bias, *of_norm) if tensor is not None]
