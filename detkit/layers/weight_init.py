"""The two initialisations that Caffe2's detection models start from, under the names of fvcore.

Not taken from `fvcore.nn`: importing that package compiles a loss with `torch.jit.script`, which
today's torch answers with a deprecation warning on every start, and which a later one may lack.
"""

from __future__ import annotations

from torch import nn

from detkit.layers.deform_conv import DeformConv

_Weighted = nn.Linear | nn.modules.conv._ConvNd | DeformConv


def c2_xavier_fill(module: _Weighted) -> None:
    """Fill the weight from U(-a, a) with `a = sqrt(3 / fan_in)`, and the bias with 0.

    Source: Caffe2's XavierFill, which differs from Glorot and Bengio 2010 in leaving out `fan_out`.
    """
    nn.init.kaiming_uniform_(module.weight, a=1)
    _zero_bias(module)


def c2_msra_fill(module: _Weighted) -> None:
    """Fill the weight from N(0, 2 / fan_out), and the bias with 0.

    Source: Caffe2's MSRAFill; He et al. 2015, arXiv 1502.01852, section 2.2, the backward form.
    """
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(module)


def _zero_bias(module: _Weighted) -> None:
    if module.bias is not None:
        nn.init.zeros_(module.bias)
