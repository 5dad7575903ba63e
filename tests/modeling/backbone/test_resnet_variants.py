"""Variants of ResNet beyond Detectron2's, from `MODEL.RESNETS`: against torchvision's class where it has them."""

import functools

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.resnet import ResNet as TorchvisionResNet
from torchvision.ops import SqueezeExcitation as TorchvisionSqueezeExcitation

from detkit.config import get_cfg
from detkit.layers import Conv2d
from detkit.layers.conv import standardized
from detkit.modeling.backbone import build_backbone
from detkit.modeling.backbone.channel_attention import ContextBlock, SqueezeExcitation
from tests.foreign_models import randomised

SMALL = {"DEPTH": 18, "NORM": "BN", "STRIDE_IN_1X1": False, "BLOCKS_PER_STAGE": [1, 2, 1, 2]}


def build(features=("res2", "res3", "res4", "res5"), freeze_at=0, **settings):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    options = {**SMALL, "OUT_FEATURES": list(features), **settings}
    cfg.merge_from_list(
        [x for key, value in options.items() for x in (f"MODEL.RESNETS.{key}", value)]
    )
    return build_backbone(cfg)


def name_in_torchvision(name):
    """Translate `res2.0.conv1.norm.weight` to `layer1.0.bn1.weight`."""
    for number in (1, 2, 3):
        name = name.replace(f"conv{number}.norm", f"bn{number}")
    for number in (2, 3, 4, 5):
        name = name.replace(f"res{number}.", f"layer{number - 1}.")
    name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    return name.removeprefix("stem.")


def same_weights(ours, theirs):
    weights = randomised(theirs).state_dict()
    ours.load_state_dict({name: weights[name_in_torchvision(name)] for name in ours.state_dict()})


def maps_of(theirs, x):
    x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    maps = {}
    for number in (1, 2, 3, 4):
        x = maps[f"res{number + 1}"] = getattr(theirs, f"layer{number}")(x)
    return maps


def assert_close(found, expected):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * value.abs().max())


IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "block", "arguments"),
    [
        pytest.param({}, BasicBlock, {}, id="basic blocks, own numbers"),
        pytest.param({"DEPTH": 50}, Bottleneck, {}, id="bottlenecks, own numbers"),
        pytest.param(
            {
                "DEPTH": 50,
                "STRIDE_PER_STAGE": [1, 2, 1, 1],
                "DILATION_PER_STAGE": [1, 1, 2, 4],
                "DILATION_STYLE": "torchvision",
            },
            Bottleneck,
            {"replace_stride_with_dilation": [False, True, True]},
            id="dilation in place of strides",
        ),
        pytest.param(
            {"DEPTH": 50, "RES5_DILATION": 2, "DILATION_STYLE": "torchvision"},
            Bottleneck,
            {"replace_stride_with_dilation": [False, False, True]},
            id="dilated res5",
        ),
        pytest.param(
            {"NORM_EPS": 0.1, "NORM_MOMENTUM": 0.3},
            BasicBlock,
            {"norm_layer": functools.partial(nn.BatchNorm2d, eps=0.1, momentum=0.3)},
            id="batch norm with arguments",
        ),
        pytest.param(
            {"NORM": "GN", "NORM_GROUPS": 8, "NORM_EPS": 0.01},
            BasicBlock,
            {"norm_layer": lambda channels: nn.GroupNorm(8, channels, eps=0.01)},
            id="group norm with arguments",
        ),
    ],
)
def test_features_and_statistics_are_those_of_torchvision(settings, block, arguments):
    theirs = TorchvisionResNet(block, [1, 2, 1, 2], **arguments)
    ours = build(**settings)
    same_weights(ours, theirs)
    with torch.no_grad():
        for mode in (True, False):  # in training first, so that evaluation sees its statistics
            assert_close(ours.train(mode)(IMAGE), maps_of(theirs.train(mode), IMAGE))


def test_standardized_weights_are_those_of_torchvision_with_such_weights():
    theirs, ours = TorchvisionResNet(BasicBlock, [1, 2, 1, 2]), build(CONV_WS=True)
    same_weights(ours, theirs)
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.Conv2d):
                for row in module.weight:
                    row.copy_((row - row.mean()) / (row.std() + 1e-5))
        assert_close(ours.eval()(IMAGE), maps_of(theirs.eval(), IMAGE))


def test_gradient_of_standardized_weights_is_that_of_the_definition():
    conv = Conv2d(3, 4, 3, bias=False)
    conv.is_standardized = True
    x = torch.randn(1, 3, 5, 5)
    (grad,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    weight = conv.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(
        nn.functional.conv2d(x, standardized(weight)).square().sum(), weight
    )
    torch.testing.assert_close(grad, expected)
    # Neither the mean of a row nor its size matters to the output.
    assert grad.flatten(1).sum(dim=1).abs().max() < 1e-3


def test_five_stages_double_stride_and_channels():
    net = build(["res2", "res6"], NUM_STAGES=5, BLOCKS_PER_STAGE=[2, 1, 1, 1, 3])
    assert {name: (s.channels, s.stride) for name, s in net.output_shape().items()} == {
        "res2": (64, 4),
        "res6": (1024, 64),
    }
    assert [len(stage) for stage in net.stages] == [2, 1, 1, 1, 3]
    assert net.eval()(torch.rand(1, 3, 64, 64))["res6"].shape == (1, 1024, 1, 1)
    frozen = build(["res6"], freeze_at=6, NUM_STAGES=5, BLOCKS_PER_STAGE=[1] * 5)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


def test_lists_of_five_values_set_the_fifth_stage():
    net = build(
        ["res6"],
        NUM_STAGES=5,
        BLOCKS_PER_STAGE=[1] * 5,
        STRIDE_PER_STAGE=[1, 2, 2, 2, 1],
        DILATION_PER_STAGE=[1, 1, 1, 1, 3],
    )
    assert net.output_shape()["res6"].stride == 32
    assert net.res6[0].conv2.dilation == (3, 3)


def test_second_convolution_of_basic_blocks_is_not_dilated_as_in_mmdetection():
    settings = {"DILATION_PER_STAGE": [1, 1, 1, 2], "STRIDE_PER_STAGE": [1, 2, 2, 1]}
    for style, dilation in (("detectron2", 2), ("mmdetection", 1)):
        for block in build(DILATION_STYLE=style, **settings).res5:
            assert (block.conv1.dilation, block.conv2.dilation) == ((2, 2), (dilation, dilation))


def test_blocks_with_a_stride_may_stay_without_deformation():
    settings = {"DEPTH": 50, "DEFORM_ON_PER_STAGE": [False, True, True, False]}
    for on_stride in (True, False):
        net = build(DEFORM_ON_STRIDE=on_stride, **settings)
        deformed = {
            name: [hasattr(block, "conv2_offset") for block in getattr(net, name)]
            for name in ("res2", "res3", "res4", "res5")
        }
        assert deformed == {
            "res2": [False],
            "res3": [on_stride, True],
            "res4": [on_stride],
            "res5": [False, False],
        }
    assert net(torch.rand(1, 3, 64, 64))["res5"].isfinite().all()


def test_stem_may_have_a_smaller_kernel():
    net = build(STEM_KERNEL_SIZE=3)
    assert net.stem.conv1.kernel_size == (3, 3)
    assert net(IMAGE)["res2"].shape[2:] == (16, 24)


CONTEXT = {"name": "ContextBlock", "position": "after_conv2", "stages": ["res3", "res5"]}


def test_plugins_are_where_they_are_asked_for():
    net = build(PLUGINS=[CONTEXT, {"name": "SqueezeExcitation", "position": "after_conv1"}])
    for name in ("res2", "res3", "res4", "res5"):
        for block in getattr(net, name):
            assert isinstance(block.squeeze_excitation, SqueezeExcitation)
            assert hasattr(block, "context_block") == (name in ("res3", "res5"))
    assert net.res3[0].context_block.channel_add_conv[0].out_channels == 8  # 128 / 16


def test_new_context_block_changes_nothing_and_then_learns():
    with_plugin, without = build(PLUGINS=[CONTEXT]), build()
    with_plugin.load_state_dict(without.state_dict(), strict=False)
    with torch.no_grad():
        assert_close(with_plugin.eval()(IMAGE), without.eval()(IMAGE))
    with_plugin.train()(IMAGE)["res5"].square().sum().backward()
    assert with_plugin.res5[0].context_block.channel_add_conv[3].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("depth", "positions"),
    [(18, ["after_conv1", "after_conv2"]), (50, ["after_conv1", "after_conv2", "after_conv3"])],
)
def test_plugin_sees_the_map_of_its_position(depth, positions):
    plugins = [{"name": "SqueezeExcitation", "position": position} for position in positions]
    net = build(DEPTH=depth, PLUGINS=plugins).eval()
    block, seen = net.res3[0], []
    for module in (block.conv1, block.conv2, getattr(block, "conv3", None)):
        if module is not None:
            module.register_forward_hook(lambda _m, _x, out: seen.append(out.clone()))
    for module in block.modules():
        if isinstance(module, SqueezeExcitation):
            module.register_forward_pre_hook(lambda _m, x: seen.append(x[0].clone()))
    with torch.no_grad():
        net(IMAGE)
    assert len(seen) == 2 * len(positions)
    for number in range(len(positions)):
        before, after = seen[2 * number : 2 * number + 2]
        is_last = number == len(positions) - 1
        torch.testing.assert_close(after, before if is_last else before.relu())


def test_same_plugin_at_two_positions_has_two_names():
    both = [{**CONTEXT, "position": position} for position in ("after_conv1", "after_conv2")]
    names = set(build(PLUGINS=both).res3[0]._modules)
    assert {"context_block", "context_block_after_conv2"} <= names


def test_squeeze_excitation_is_that_of_torchvision():
    theirs = TorchvisionSqueezeExcitation(12, 3)
    ours = SqueezeExcitation(12, 3)
    ours.f_ex[0].load_state_dict(theirs.fc1.state_dict())
    ours.f_ex[2].load_state_dict(theirs.fc2.state_dict())
    x = torch.randn(2, 12, 5, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_context_is_the_weighted_mean_over_the_map():
    block = randomised(ContextBlock(6, 2))
    x = torch.randn(2, 6, 3, 4)
    with torch.no_grad():
        found, mask = block(x), block.conv_mask(x)
        for i in range(2):
            weights = (mask[i, 0] - mask[i, 0].max()).exp()
            weights = weights / weights.sum()
            context = sum(
                x[i, :, row, column] * weights[row, column]
                for row in range(3)
                for column in range(4)
            )
            added = block.channel_add_conv(context[None, :, None, None])[0]
            torch.testing.assert_close(found[i], x[i] + added)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"BLOCKS_PER_STAGE": [1, 2, 3]}, "BLOCKS_PER_STAGE needs .* 4 stages"),
        ({"NUM_STAGES": 5}, "BLOCKS_PER_STAGE needs .* 5 stages: got \\[1, 2, 1, 2\\]"),
        ({"PLUGINS": [{"name": "ContextBlok"}]}, r"PLUGINS\[0\]: name .* Did you mean 'ContextB"),
        (
            {"PLUGINS": [{"name": "ContextBlock", "position": "after_conv3"}]},
            r"position must be one of \['after_conv1', 'after_conv2'\]: got 'after_conv3'",
        ),
        ({"PLUGINS": [{**CONTEXT, "ratios": 1}]}, r"PLUGINS\[0\]: unknown \['ratios'\]"),
        ({"PLUGINS": [{**CONTEXT, "stages": ["res9"]}]}, "stages must be a list of .*'res9'"),
        ({"PLUGINS": [{**CONTEXT, "ratio": 0}]}, "ratio must be a number above 0: got 0"),
        ({"PLUGINS": ["ContextBlock"]}, r"PLUGINS\[0\] must be a mapping"),
        ({"NORM": "GN", "NORM_MOMENTUM": 0.1}, "NORM_MOMENTUM is for BN and SyncBN"),
        ({"NORM": "", "NORM_EPS": 0.1}, "NORM_EPS needs a norm"),
        ({"NORM": "GN", "NORM_GROUPS": 7}, "num_channels must be divisible by num_groups|groups"),
    ],
)
def test_bad_setting_is_an_error_that_names_the_key(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)
