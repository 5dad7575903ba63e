import torch
from torch import nn

from detkit.layers import CNNBlockBase, FrozenBatchNorm2d


class _Block(CNNBlockBase):
    def __init__(self):
        super().__init__(3, 4, stride=2)
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)


def test_block_knows_its_shape():
    block = _Block()
    assert (block.in_channels, block.out_channels, block.stride) == (3, 4, 2)


def test_frozen_block_has_no_trainable_parameter_and_no_learning_norm():
    block = _Block()
    assert block.freeze() is block
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert isinstance(block.norm, FrozenBatchNorm2d)
    assert torch.equal(block.norm.weight, torch.ones(4))
