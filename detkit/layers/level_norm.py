"""Batch norm of a head that several pyramid levels share.

Legend: N images, C channels, H x W cells of a level, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detkit.layers.norm import get_norm


class CycleBatchNormList(nn.ModuleList):
    """L batch norms, one per level, with statistics of their own and one weight and bias for all.

    The name and the names of its tensors are Detectron2's, where the layer counts its calls to know
    the level. Here the caller says which it is, so that a call too few or too many cannot shift the
    levels.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(self, length: int, norm: str, num_features: int) -> None:
        """Build the norms.

        Args:
            length: L
            norm: "BN" or "SyncBN".
            num_features: C
        """
        norms = [get_norm(norm, num_features) for _ in range(length)]
        for layer in norms:
            assert isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm))
            layer.affine = False
            layer.register_parameter("weight", None)
            layer.register_parameter("bias", None)
        super().__init__(layer for layer in norms if layer is not None)
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Normalise the (N, C, H, W) map of a level."""
        return torch.addcmul(self.bias[:, None, None], self[level](x), self.weight[:, None, None])
