import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detkit.layers import Conv2d, DeformConv, ModulatedDeformConv, get_norm
from detkit.layers.deform_conv import deform_conv, modulated_deform_conv
from tests.helpers import slow_deform_conv

# (groups, groups of offsets, stride, padding, dilation)
GEOMETRIES = [
    pytest.param(1, 1, 1, 1, 1, id="plain"),
    pytest.param(2, 1, 2, 1, 1, id="groups and stride"),
    pytest.param(1, 2, 1, 2, 2, id="groups of offsets and dilation"),
]


def _inputs(
    layer: DeformConv, x: torch.Tensor, scale: float = 1.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and factors for a layer of a 3x3 kernel, at random."""
    size = F.conv2d(
        x[:, :1], x.new_zeros(1, 1, 3, 3), None, layer.stride, layer.padding, layer.dilation
    ).shape[-2:]
    places = 9 * layer.deformable_groups
    offset = torch.randn(len(x), 2 * places, *size, dtype=x.dtype) * scale
    return offset, torch.rand(len(x), places, *size, dtype=x.dtype)


def _layer(cls, groups, deformable_groups, stride, padding, dilation, **kwargs):
    return cls(4, 6, 3, stride, padding, dilation, groups, deformable_groups, **kwargs)


@pytest.mark.parametrize("cls", [DeformConv, ModulatedDeformConv])
@pytest.mark.parametrize(
    ("groups", "deformable_groups", "stride", "padding", "dilation"), GEOMETRIES
)
def test_output_is_that_of_the_loops(cls, groups, deformable_groups, stride, padding, dilation):
    torch.manual_seed(0)
    layer = _layer(cls, groups, deformable_groups, stride, padding, dilation)
    x = torch.randn(2, 4, 5, 6)
    offset, mask = _inputs(layer, x)
    factors = (mask,) if cls is ModulatedDeformConv else ()
    want = slow_deform_conv(
        x, offset, *(factors or (torch.ones_like(mask),)), layer.weight, stride, padding, dilation
    )
    torch.testing.assert_close(layer(x, offset, *factors), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("groups", "deformable_groups", "stride", "padding", "dilation"), GEOMETRIES
)
def test_zero_offsets_give_the_plain_convolution(
    groups, deformable_groups, stride, padding, dilation
):
    layer = _layer(ModulatedDeformConv, groups, deformable_groups, stride, padding, dilation)
    x = torch.randn(2, 4, 7, 8)
    offset, mask = _inputs(layer, x)
    want = F.conv2d(x, layer.weight, layer.bias, stride, padding, dilation, groups)
    torch.testing.assert_close(
        layer(x, 0 * offset, torch.ones_like(mask)), want, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        layer(x, 0 * offset, 0.5 * torch.ones_like(mask)), want / 2, atol=1e-5, rtol=1e-5
    )


def test_whole_offsets_move_the_image():
    layer = DeformConv(2, 3, 3, padding=1)
    x = torch.randn(1, 2, 9, 9)
    offset, _ = _inputs(layer, x)
    offset[:, 0::2], offset[:, 1::2] = 2, -1  # two rows down, one column to the left
    moved = x.roll((-2, 1), dims=(2, 3))
    inner = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(
        layer(x, offset)[inner], F.conv2d(moved, layer.weight, padding=1)[inner]
    )


@pytest.mark.parametrize("cls", [DeformConv, ModulatedDeformConv])
@pytest.mark.parametrize("norm", ["", "FrozenBN", "LN"])
def test_gradients_are_the_numerical_ones(cls, norm):
    torch.manual_seed(0)
    layer = cls(
        4, 2, 3, padding=2, dilation=2, groups=2, deformable_groups=2, norm=get_norm(norm, 2)
    ).double()
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    # Not near whole numbers, where bilinear interpolation has a kink.
    offset, mask = _inputs(layer, x)
    offset = (offset.floor() + 0.2 + 0.6 * torch.rand_like(offset)).requires_grad_()
    inputs = (x, offset, mask.requires_grad_()) if cls is ModulatedDeformConv else (x, offset)
    assert torch.autograd.gradcheck(layer, inputs)
    weight = layer.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(layer, {"weight": w}, inputs), weight
    )


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", "LN"])
@pytest.mark.parametrize("training", [True, False])
def test_norm_and_activation_follow_as_in_conv2d(norm, training):
    torch.manual_seed(0)
    plain = Conv2d(8, 32, 3, padding=1, bias=True, norm=get_norm(norm, 32), activation=F.relu)
    with torch.no_grad():
        for value in plain.norm.state_dict().values():
            value.uniform_(0.5, 1) if value.is_floating_point() else None
    layer = DeformConv(8, 32, 3, padding=1, bias=True, norm=get_norm(norm, 32), activation=F.relu)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 6, 6)
    offset = torch.zeros(2, 18, 6, 6)
    torch.testing.assert_close(
        layer.train(training)(x, offset), plain.train(training)(x), atol=1e-5, rtol=1e-5
    )


def test_names_and_defaults_are_those_of_detectron2():
    assert list(DeformConv(3, 4, 3).state_dict()) == ["weight"]
    assert list(ModulatedDeformConv(3, 4, 3).state_dict()) == ["weight", "bias"]
    norm = nn.BatchNorm2d(4)
    assert "norm.running_mean" in DeformConv(3, 4, 3, norm=norm).state_dict()


def test_empty_batch_passes_and_has_gradients():
    layer = ModulatedDeformConv(4, 6, 3, padding=1, norm=get_norm("FrozenBN", 6))
    y = layer(torch.zeros(0, 4, 5, 5), torch.zeros(0, 18, 5, 5), torch.zeros(0, 9, 5, 5))
    assert y.shape == (0, 6, 5, 5)
    y.sum().backward()
    assert not layer.weight.grad.any()


@pytest.mark.parametrize("cls", [DeformConv, ModulatedDeformConv])
def test_half_precision_around_it_is_computed_in_float32(cls):
    layer = cls(4, 6, 3, padding=1)
    x = torch.randn(1, 4, 5, 5).bfloat16()
    offset, mask = (value.bfloat16().requires_grad_() for value in _inputs(layer, x))
    factors = (mask,) if cls is ModulatedDeformConv else ()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, offset, *factors)
    assert y.dtype == torch.bfloat16
    want = layer(x.float(), offset.float(), *(value.float() for value in factors))
    torch.testing.assert_close(y.float(), want, atol=1e-2, rtol=1e-2)
    y.sum().backward()
    assert offset.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"groups": 3}, "groups must divide in_channels: got groups=3, in_channels=4", id="input"
        ),
        pytest.param(
            {"groups": 4},
            "groups must divide out_channels: got groups=4, out_channels=6",
            id="output",
        ),
    ],
)
def test_groups_that_do_not_divide_are_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        DeformConv(4, 6, 3, **arguments)


def test_offsets_and_factors_of_another_kernel_are_an_error():
    layer = ModulatedDeformConv(4, 6, 3, padding=1)
    x, offset, mask = torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 5, 5), torch.zeros(1, 9, 5, 5)
    with pytest.raises(
        RuntimeError, match=r"offset must be \(N, 18, H, W\): got shape \(1, 9, 5, 5\)"
    ):
        layer(x, mask, mask)
    with pytest.raises(ValueError, match=r"mask must be \(N, 9, H, W\): got shape \(1, 18, 5, 5\)"):
        layer(x, offset, offset)


def test_functions_with_given_weights_are_the_layers():
    layer = DeformConv(4, 6, kernel_size=3, padding=1)
    x, offset = torch.randn(2, 4, 7, 8), torch.randn(2, 18, 7, 8)
    torch.testing.assert_close(deform_conv(x, offset, layer.weight, padding=1), layer(x, offset))
    layer, mask = ModulatedDeformConv(4, 6, kernel_size=3, padding=1), torch.rand(2, 9, 7, 8)
    found = modulated_deform_conv(x, offset, mask, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(found, layer(x, offset, mask))


def test_offset_groups_that_do_not_divide_are_an_error_where_they_are_used():
    # Not before: Detectron2 builds and prints such a layer.
    layer = DeformConv(4, 6, 3, padding=1, deformable_groups=3)
    with pytest.raises(ValueError, match=r"deformable_groups must divide in_channels: got .*=3"):
        layer(torch.zeros(1, 4, 5, 5), torch.zeros(1, 54, 5, 5))


def test_layers_are_printed_as_in_detectron2():
    assert repr(DeformConv(4, 6, 3, padding=1, deformable_groups=2)) == (
        "DeformConv(in_channels=4, out_channels=6, kernel_size=(3, 3), stride=(1, 1),"
        " padding=(1, 1), dilation=(1, 1), groups=1, deformable_groups=2, bias=False)"
    )
    assert repr(ModulatedDeformConv(4, 6, 3, padding=1)) == (
        "ModulatedDeformConv(in_channels=4, out_channels=6, kernel_size=(3, 3), stride=1,"
        " padding=1, dilation=1, groups=1, deformable_groups=1, bias=True)"
    )
