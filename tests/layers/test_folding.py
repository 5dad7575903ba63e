import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.layers import FrozenBatchNorm2d
from detkit.layers.folding import fold, folded, folding_sources


def _norm(kind: str) -> nn.Module:
    norm = FrozenBatchNorm2d(4) if kind == "FrozenBN" else nn.BatchNorm2d(4).eval()
    generator = torch.Generator().manual_seed(1)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(norm, name).data.copy_(torch.rand(4, generator=generator) + 0.5)
    return norm


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["FrozenBN", "BN"])
def test_folded_convolution_does_what_the_norm_would(conv, kind, has_bias):
    x, norm, bias = torch.randn(2, 3, 6, 5), _norm(kind), conv.bias if has_bias else None
    want = norm(F.conv2d(x, conv.weight, bias))
    for weights in (fold(conv.weight, bias, norm), folded(conv, conv.weight, bias, norm)):
        torch.testing.assert_close(F.conv2d(x, *weights), want, rtol=1e-5, atol=1e-5)


def test_without_a_norm_weight_and_bias_are_the_layers_own(conv):
    for weight, bias in (
        fold(conv.weight, conv.bias, None),
        folded(conv, conv.weight, conv.bias, None),
    ):
        assert weight is conv.weight
        assert bias is conv.bias


@pytest.mark.parametrize("kind", ["FrozenBN", "BN"])
def test_sources_are_the_tensors_that_change_the_result(conv, kind):
    norm = _norm(kind)
    sources = folding_sources(conv.weight, conv.bias, norm)
    assert len(sources) == 6
    for source in sources:
        before = [tensor.clone() for tensor in fold(conv.weight, conv.bias, norm)]
        with torch.no_grad():
            source.mul_(1.5)
        after = fold(conv.weight, conv.bias, norm)
        assert not all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_sources_without_bias_and_norm_are_the_weight(conv):
    assert folding_sources(conv.weight, None, None) == [conv.weight]
