"""What the blocks of convolutional backbones have in common."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from detkit.layers.norm import FrozenBatchNorm2d

Block = TypeVar("Block", bound="CNNBlockBase")


class CNNBlockBase(nn.Module):
    """A block that takes (N, `in_channels`, H, W) to (N, `out_channels`, H / `stride`, W /
    `stride`).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def freeze(self: Block) -> Block:
        """Stop training the block: no parameter takes a gradient, and batch norms become
        FrozenBatchNorm2d.
        """
        for parameter in self.parameters():
            parameter.requires_grad = False
        FrozenBatchNorm2d.convert_frozen_batchnorm(self)
        return self
