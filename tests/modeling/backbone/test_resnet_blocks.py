import pytest
import torch

from detkit.layers import FrozenBatchNorm2d
from detkit.modeling.backbone import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeepStem,
    DeformBottleneckBlock,
)
from detkit.modeling.backbone.resnet_blocks import PooledConv2d


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN", "LN", ""])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("avg_down", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["basic", "basic, dilated", "bottleneck", "bottleneck, stride in 1x1", "groups", "dilated"],
)
def test_block_gives_its_shape_and_every_parameter_a_gradient(norm, stride, kind, avg_down):
    if "basic" in kind:
        block = BasicBlock(
            32, 64, stride=stride, norm=norm, avg_down=avg_down, dilation=1 + ("dilated" in kind)
        )
    else:
        block = BottleneckBlock(
            32,
            64,
            bottleneck_channels=32,
            stride=stride,
            norm=norm,
            stride_in_1x1="1x1" in kind,
            num_groups=4 if kind == "groups" else 1,
            dilation=2 if kind == "dilated" else 1,
            avg_down=avg_down,
        )
    y = block(torch.randn(2, 32, 8, 12))
    assert y.shape == (2, 64, 8 // stride, 12 // stride)
    assert (y >= 0).all()
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_shortcut_is_the_identity_where_shapes_agree():
    assert BasicBlock(8, 8).shortcut is None
    assert BasicBlock(8, 8, stride=2).shortcut is not None
    assert BottleneckBlock(8, 16, bottleneck_channels=4).shortcut is not None


@pytest.mark.parametrize(
    ("stride_in_1x1", "strides"),
    [(True, ((2, 2), (1, 1))), (False, ((1, 1), (2, 2)))],
    ids=["1x1", "3x3"],
)
def test_stride_is_where_it_was_asked_for(stride_in_1x1, strides):
    block = BottleneckBlock(8, 8, bottleneck_channels=4, stride=2, stride_in_1x1=stride_in_1x1)
    assert (block.conv1.stride, block.conv2.stride) == strides


def test_block_does_not_change_its_input():
    x = torch.randn(1, 8, 4, 4)
    before = x.clone()
    BasicBlock(8, 8, norm="FrozenBN")(x)
    BottleneckBlock(8, 8, bottleneck_channels=4, norm="")(x)
    assert torch.equal(x, before)


def test_stem_has_stride_4_and_no_bias():
    stem = BasicStem(3, 16, norm="FrozenBN")
    assert stem(torch.randn(1, 3, 32, 64)).shape == (1, 16, 8, 16)
    assert stem.stride == 4
    assert stem.conv1.bias is None
    assert isinstance(stem.conv1.norm, FrozenBatchNorm2d)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "LN", ""])
def test_deep_stem_has_stride_4(norm):
    stem = DeepStem(3, 16, norm=norm)
    y = stem(torch.randn(2, 3, 32, 64))
    assert y.shape == (2, 16, 8, 16)
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in stem.parameters())


def test_pooled_shortcut_is_the_convolution_of_means():
    conv = PooledConv2d(2, 3, 2, None)
    x = torch.randn(1, 2, 5, 4)
    means = torch.stack(
        [x[:, :, i : i + 2, j : j + 2].mean(dim=(2, 3)) for i in (0, 2, 4) for j in (0, 2)], dim=-1
    )
    want = torch.einsum("oc,ncp->nop", conv.weight[:, :, 0, 0], means).view(1, 3, 3, 2)
    torch.testing.assert_close(conv(x), want)


def test_shortcut_without_stride_is_not_pooled():
    assert not isinstance(BasicBlock(4, 8, avg_down=True).shortcut, PooledConv2d)


def test_groups_that_do_not_divide_the_bottleneck_are_an_error():
    with pytest.raises(ValueError, match="num_groups=3 must divide bottleneck_channels=8"):
        BottleneckBlock(8, 8, bottleneck_channels=8, num_groups=3)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("dilation", [1, 2])
def test_new_deformable_block_is_a_plain_one(modulated, dilation):
    torch.manual_seed(0)
    settings = {
        "bottleneck_channels": 8,
        "stride": 2,
        "num_groups": 2,
        "norm": "FrozenBN",
        "dilation": dilation,
    }
    deformable = DeformBottleneckBlock(
        8, 16, deform_modulated=modulated, deform_num_groups=2, **settings
    )
    plain = BottleneckBlock(8, 16, **settings)
    state = deformable.state_dict()
    assert not state["conv2_offset.weight"].any()
    assert not state["conv2_offset.bias"].any()
    plain.load_state_dict({name: value for name, value in state.items() if "offset" not in name})
    if modulated:
        plain.conv2.weight.data /= 2  # the factors start in the middle of (0, 1)
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(deformable(x), plain(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_offsets_of_a_deformable_block_learn(modulated, norm):
    torch.manual_seed(0)
    block = DeformBottleneckBlock(
        32, 64, bottleneck_channels=32, norm=norm, deform_modulated=modulated, stride=2
    )
    with torch.no_grad():
        block.conv2_offset.weight.normal_(std=0.1)
    x = torch.randn(2, 32, 8, 8)
    y = block(x)
    assert y.shape == (2, 64, 4, 4)
    y.square().sum().backward()
    assert all(parameter.grad.any() for parameter in block.parameters())


def test_offsets_are_pairs_and_the_factors_come_last():
    torch.manual_seed(0)
    block = DeformBottleneckBlock(
        4, 8, bottleneck_channels=4, norm="", deform_modulated=True, deform_num_groups=2
    )
    assert block.conv2_offset.out_channels == 54
    block.conv2_offset.bias.data[36:] = -100
    assert not block._spatial(torch.randn(1, 4, 5, 5)).any()


def test_frozen_deformable_block_has_no_gradient():
    block = DeformBottleneckBlock(4, 8, bottleneck_channels=4, norm="BN").freeze()
    assert not any(parameter.requires_grad for parameter in block.parameters())
    assert isinstance(block.conv2.norm, FrozenBatchNorm2d)
