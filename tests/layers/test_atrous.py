import pytest
import torch
import torch.nn.functional as F

from detkit.layers.atrous import ASPP, DepthwiseSeparableConv2d


def test_separable_convolution_is_its_two_parts():
    layer = DepthwiseSeparableConv2d(4, 6, activation1=F.relu, activation2=F.relu)
    x = torch.randn(2, 4, 7, 9)
    first = F.conv2d(x, layer.depthwise.weight, layer.depthwise.bias, padding=1, groups=4).relu()
    expected = F.conv2d(first, layer.pointwise.weight, layer.pointwise.bias).relu()
    torch.testing.assert_close(layer(x), expected)
    assert layer.depthwise.weight.shape == (4, 1, 3, 3)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("window", [None, (8, 4)])
def test_pyramid_joins_rates_and_the_mean(separable, window):
    layer = ASPP(
        4,
        6,
        [1, 2, 3],
        norm="BN",
        activation=F.relu,
        pool_kernel_size=window,
        dropout=0.1,
        use_depthwise_separable_conv=separable,
    ).eval()
    x = torch.randn(2, 4, 8, 12)
    y = layer(x)
    assert y.shape == (2, 6, 8, 12)
    with torch.no_grad():
        branches = [conv(x) for conv in layer.convs]
        branches[-1] = F.interpolate(branches[-1], (8, 12), mode="bilinear", align_corners=False)
        torch.testing.assert_close(y, layer.project(torch.cat(branches, dim=1)))
    assert {name.split(".")[0] for name in layer.state_dict()} == {"convs", "project"}


def test_wrong_rates_and_windows_are_refused():
    with pytest.raises(ValueError, match="three dilations"):
        ASPP(4, 6, [1], norm="", activation=F.relu)
    layer = ASPP(4, 6, [1, 2, 3], norm="", activation=F.relu, pool_kernel_size=(3, 3))
    with pytest.raises(ValueError, match="must divide"):
        layer(torch.zeros(1, 4, 8, 9))


@pytest.mark.parametrize("window", [None, (8, 8)], ids=["whole", "window"])
def test_mean_has_a_bias_and_no_norm(window):
    layer = ASPP(4, 6, [1, 2, 3], norm="BN", activation=F.relu, pool_kernel_size=window)
    pooled = {name for name in layer.state_dict() if name.startswith("convs.4")}
    assert pooled == {"convs.4.1.weight", "convs.4.1.bias"}
    # So one image can be trained on, whose mean is one pixel.
    layer(torch.randn(1, 4, 8, 8)).sum().backward()
