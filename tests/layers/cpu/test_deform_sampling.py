import pytest
import torch
from torchvision.ops import deform_conv2d

from detkit.layers.cpu.deform_sampling import deform_conv2d_on_cpu


def _case(
    groups=1,
    offset_groups=1,
    kernel=(3, 3),
    stride=(1, 1),
    padding=(1, 1),
    dilation=(1, 1),
    N=2,
    spread=1.5,
):
    generator = torch.Generator().manual_seed(0)
    C, K, H, W = 8, 12, 7, 9
    x = torch.randn(N, C, H, W, generator=generator)
    weight = torch.randn(K, C // groups, *kernel, generator=generator)
    geometry = zip((H, W), kernel, stride, padding, dilation, strict=True)
    size = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in geometry]
    places = offset_groups * kernel[0] * kernel[1]
    offset = torch.randn(N, 2 * places, *size, generator=generator) * spread
    mask = torch.rand(N, places, *size, generator=generator)
    return [x, offset, weight, torch.randn(K, generator=generator), mask], (
        stride,
        padding,
        dilation,
    )


def _with_gradients(function, tensors, geometry):
    x, offset, weight, bias, mask = (tensor.clone().requires_grad_() for tensor in tensors)
    y = function(x, offset, weight, bias, *geometry, mask)
    return [y, *torch.autograd.grad(y.square().sum(), (x, offset, weight, bias, mask))]


GEOMETRIES = [
    pytest.param({}, id="plain"),
    pytest.param({"N": 1}, id="one image"),
    pytest.param({"groups": 4}, id="groups"),
    pytest.param({"offset_groups": 4}, id="groups of offsets"),
    pytest.param({"groups": 2, "offset_groups": 4}, id="both"),
    pytest.param({"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}, id="each side its own"),
    pytest.param({"kernel": (1, 5), "padding": (0, 2)}, id="flat kernel"),
    pytest.param({"spread": 0.0}, id="on the kinks"),
    pytest.param({"spread": 100.0}, id="outside"),
]


@pytest.mark.parametrize("settings", GEOMETRIES)
def test_output_and_gradients_are_those_of_torchvision(settings):
    tensors, geometry = _case(**settings)
    got = _with_gradients(deform_conv2d_on_cpu, tensors, geometry)
    for ours, theirs in zip(got, _with_gradients(deform_conv2d, tensors, geometry), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=1e-4)


def test_without_factors_and_bias():
    (x, offset, weight, _, _), geometry = _case()
    want = deform_conv2d(x, offset, weight, None, *geometry)
    torch.testing.assert_close(
        deform_conv2d_on_cpu(x, offset, weight, None, *geometry, None), want, atol=1e-4, rtol=1e-4
    )


def test_layout_in_memory_changes_nothing_but_that():
    (x, offset, weight, bias, mask), geometry = _case(groups=2)
    plain = deform_conv2d_on_cpu(x, offset, weight, bias, *geometry, mask)
    last = {"memory_format": torch.channels_last}
    y = deform_conv2d_on_cpu(
        x.to(**last), offset.to(**last), weight.to(**last), bias, *geometry, mask.to(**last)
    )
    assert y.is_contiguous(**last)
    torch.testing.assert_close(y, plain)


def test_single_pixel():
    x, weight = torch.randn(1, 2, 1, 1), torch.randn(3, 2, 1, 1)
    y = deform_conv2d_on_cpu(x, torch.zeros(1, 2, 1, 1), weight, None, (1, 1), (0, 0), (1, 1), None)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight))
