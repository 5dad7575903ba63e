import math

import pytest
import torch
from torch import nn

from detkit.layers import c2_msra_fill, c2_xavier_fill


def test_xavier_fill_is_uniform_with_the_bound_of_fan_in():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, 3)
    c2_xavier_fill(conv)
    bound = math.sqrt(3 / (32 * 9))
    assert 0.98 * bound < conv.weight.max().item() <= bound
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert conv.bias is not None
    assert not conv.bias.any()


def test_msra_fill_is_normal_with_the_variance_of_fan_out():
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 64, 3, bias=False)
    c2_msra_fill(conv)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert conv.weight.mean().item() == pytest.approx(0, abs=1e-3)
