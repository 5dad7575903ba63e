import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.layers import Conv2d, FrozenBatchNorm2d, get_norm


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
