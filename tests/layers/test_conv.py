import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.layers import (
    CNNBlockBase,
    Conv2d,
    FrozenBatchNorm2d,
    PreparedWeights,
    ShapeSpec,
    c2_msra_fill,
    c2_xavier_fill,
    get_norm,
)
from detkit.layers.conv import fold, folded, folding_sources


def _random_norm(name: str, channels: int) -> nn.Module:
    norm = get_norm(name, channels)
    assert norm is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in norm.state_dict().items():
            if value.is_floating_point():
                value.copy_(
                    torch.rand(value.shape, generator=generator) + (0.5 if "var" in key else -0.5)
                )
    return norm


def _separately(conv: Conv2d, x: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    x = x if conv.norm is None else conv.norm(x)
    return x if conv.activation is None else conv.activation(x)


CASES = [
    pytest.param("FrozenBN", True, True, id="FrozenBN in training"),
    pytest.param("FrozenBN", False, False, id="FrozenBN in eval"),
    pytest.param("BN", False, True, id="BN in eval"),
    pytest.param("BN", True, False, id="BN in training"),
    pytest.param("GN", True, True, id="GN"),
    pytest.param("LN", False, True, id="LN"),
]


@pytest.mark.parametrize(("norm", "training", "bias"), CASES)
def test_layer_equals_convolution_then_norm_then_activation(norm, training, bias):
    torch.manual_seed(0)
    conv = Conv2d(
        8,
        32,
        3,
        stride=2,
        padding=1,
        groups=2,
        bias=bias,
        norm=_random_norm(norm, 32),
        activation=F.relu,
    )
    conv.train(training)
    x = torch.randn(2, 8, 7, 9)
    torch.testing.assert_close(conv(x), _separately(conv, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("norm", "training", "bias"), CASES)
def test_gradients_equal_those_of_the_separate_steps(norm, training, bias):
    torch.manual_seed(0)
    conv = Conv2d(4, 32, 3, bias=bias, norm=_random_norm(norm, 32)).train(training)
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    inputs = [x, *conv.parameters()]
    factor = torch.randn(2, 32, 4, 4)
    got = torch.autograd.grad((conv(x) * factor).sum(), inputs)
    want = torch.autograd.grad((_separately(conv, x) * factor).sum(), inputs)
    # A bias in front of a batch norm has gradient 0 up to rounding: hence the absolute tolerance.
    torch.testing.assert_close(got, want, atol=2e-3, rtol=1e-4)


def test_fixed_norm_is_folded_and_a_learning_one_is_called():
    norm = _random_norm("BN", 32)
    calls = []
    norm.register_forward_hook(lambda *args: calls.append(args))
    conv = Conv2d(3, 32, 1, norm=norm)
    conv.train()(torch.randn(2, 3, 4, 4))
    assert len(calls) == 1
    conv.eval()(torch.randn(2, 3, 4, 4))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["subclass", "without statistics"])
def test_norms_that_may_compute_something_else_are_not_folded(kind):
    class DoublingNorm(FrozenBatchNorm2d):
        def forward(self, x):
            return x * 2

    norm = DoublingNorm(4) if kind == "subclass" else nn.BatchNorm2d(4, track_running_stats=False)
    conv = Conv2d(3, 4, 1, norm=norm).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(conv(x), _separately(conv, x))


def test_folding_follows_a_change_of_the_statistics():
    conv = Conv2d(3, 4, 1, norm=_random_norm("BN", 4)).eval()
    x = torch.randn(2, 3, 4, 4)
    before = conv(x)
    conv.train()(x + 3)
    conv.eval()
    assert not torch.allclose(conv(x), before)
    torch.testing.assert_close(conv(x), _separately(conv, x))


@pytest.mark.parametrize("norm", ["", "FrozenBN", "BN", "GN", "LN"])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batch_passes_and_has_gradients(norm, training):
    conv = Conv2d(4, 32, 3, padding=1, norm=get_norm(norm, 32), activation=F.relu_).train(training)
    x = torch.zeros(0, 4, 6, 6, requires_grad=True)
    y = conv(x)
    assert y.shape == (0, 32, 6, 6)
    y.sum().backward()
    assert conv.weight.grad is not None
    assert not conv.weight.grad.any()
    assert all(torch.isfinite(value).all() for value in conv.state_dict().values())


def test_channels_last_input_gives_channels_last_output():
    conv = Conv2d(8, 8, 3, padding=1, norm=_random_norm("FrozenBN", 8)).to(
        memory_format=torch.channels_last
    )
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)


def test_autocast_runs_the_folded_convolution_in_low_precision():
    conv = Conv2d(8, 8, 3, norm=_random_norm("FrozenBN", 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv(torch.randn(1, 8, 6, 6))
    assert y.dtype == torch.bfloat16


def test_names_in_the_state_dict():
    conv = Conv2d(3, 4, 1, bias=False, norm=get_norm("FrozenBN", 4))
    assert list(conv.state_dict()) == [
        "weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    ]


def _fixed_norm(kind: str) -> nn.Module:
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
    x, norm, bias = torch.randn(2, 3, 6, 5), _fixed_norm(kind), conv.bias if has_bias else None
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
    norm = _fixed_norm(kind)
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


def test_what_is_not_known_is_none():
    assert ShapeSpec(channels=3) == ShapeSpec(3, None, None, None)


def test_shapes_do_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ShapeSpec(channels=3).channels = 4  # type: ignore[misc]


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


def test_weights_that_are_kept_are_cast_for_autocast_once():
    conv = Conv2d(3, 8, 3, norm=get_norm("FrozenBN", 8))
    x, weights = torch.rand(1, 3, 9, 9), PreparedWeights()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = conv(x)
        with weights.in_use():
            conv(x)
            stored = [value.value[0] for value in weights._of_layer[conv].values()]
            assert [weight.dtype for weight in stored] == [torch.bfloat16]
            assert torch.equal(conv(x), expected)
        # Without autocast, in the same store, the layer has its own precision.
    with torch.no_grad(), weights.in_use():
        torch.testing.assert_close(conv(x), conv.norm(torch.conv2d(x, conv.weight, conv.bias)))
