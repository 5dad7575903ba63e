"""Tests of detkit.layers.level_norm."""

import pytest
import torch
from torch import nn

from detkit.layers import CycleBatchNormList

C = 4


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_names_are_those_of_detectron2(norm):
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    expected = {"weight", "bias", *(f"{level}.{name}" for level in range(2) for name in statistics)}
    assert set(CycleBatchNormList(2, norm, C).state_dict()) == expected


def test_each_level_is_normalised_with_its_own_statistics():
    norm = CycleBatchNormList(2, "BN", C)
    maps = [torch.randn(3, C, 5, 5), 7 + 3 * torch.randn(3, C, 2, 2)]
    for level, x in enumerate(maps):
        torch.testing.assert_close(norm(x, level), nn.BatchNorm2d(C)(x))
    assert norm[0].running_mean.abs().max() < 0.2
    assert norm[1].running_mean.min() > 0.4


def test_levels_share_weight_and_bias():
    norm = CycleBatchNormList(2, "BN", C).eval()
    with torch.no_grad():
        norm.weight.fill_(2.0)
        norm.bias.fill_(1.0)
    x = torch.randn(1, C, 2, 2)
    for level in range(2):
        torch.testing.assert_close(norm(x, level), 2 * x / (1 + 1e-5) ** 0.5 + 1)
    assert len(list(norm.parameters())) == 2
