"""Tests of detkit.modeling.backbone.regnet."""

import pytest
import torch
import torchvision

from detkit.checkpoint.foreign.regnet import translate_regnet
from detkit.config import get_cfg
from detkit.layers import FrozenBatchNorm2d, ShapeSpec
from detkit.modeling.backbone import RegNet, build_backbone
from detkit.modeling.backbone.regnet import regnet_stages
from tests.foreign_models import randomised

ALL = ["stem", "s1", "s2", "s3", "s4"]
X_800MF = {"depth": 16, "w_0": 56, "w_a": 35.73, "w_m": 2.28, "group_width": 16}
Y_400MF = {"depth": 16, "w_0": 48, "w_a": 27.89, "w_m": 2.09, "group_width": 8, "se_ratio": 0.25}
TINY = {"depth": 5, "w_0": 8, "w_a": 8, "w_m": 2, "group_width": 8, "stem_width": 8}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("regnet_x_800mf", X_800MF),
        ("regnet_y_400mf", Y_400MF),
        pytest.param(
            "regnet_y_1_6gf",
            {
                "depth": 27,
                "w_0": 48,
                "w_a": 20.71,
                "w_m": 2.65,
                "group_width": 24,
                "se_ratio": 0.25,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_features_are_those_of_torchvision(name, arguments):
    theirs = randomised(getattr(torchvision.models, name)(weights=None)).eval()
    ours = RegNet(**arguments, out_features=ALL).eval()
    weights = translate_regnet(theirs.state_dict(), "").weights
    assert weights.keys() - ours.state_dict().keys() == {"fc.weight", "fc.bias"}
    ours.load_state_dict({name: weights[name] for name in ours.state_dict()})
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found = ours(image)
        x = theirs.stem(image)
        torch.testing.assert_close(found["stem"], x)
        for stage, block in zip(ALL[1:], theirs.trunk_output, strict=True):
            x = block(x)
            torch.testing.assert_close(found[stage], x, rtol=1e-4, atol=1e-4 * x.abs().max())


# Table 3 of the paper gives depth and widths; the numbers are those of pycls' files.
@pytest.mark.parametrize(
    ("numbers", "widths", "blocks"),
    [
        ((16, 56, 35.73, 2.28), [56, 128, 288, 664], [1, 3, 7, 5]),
        ((23, 96, 38.65, 2.43), [96, 232, 568, 1376], [2, 5, 14, 2]),
        ((22, 96, 31.41, 2.24), [96, 216, 480, 1080], [2, 6, 12, 2]),
    ],
    ids=["X-800MF", "X-4.0GF", "Y-4.0GF"],
)
def test_stages_follow_the_line_of_widths(numbers, widths, blocks):
    assert regnet_stages(*numbers) == list(zip(widths, blocks, strict=True))


def test_shapes_are_those_of_the_maps():
    net = RegNet(**TINY, out_features=["stem", "s2"])
    image = torch.rand(2, 3, 70, 90)
    shapes = {name: ShapeSpec(channels=x.shape[1], stride=None) for name, x in net(image).items()}
    declared = net.output_shape()
    assert {k: v.channels for k, v in shapes.items()} == {
        k: v.channels for k, v in declared.items()
    }
    assert [shape.stride for shape in declared.values()] == [2, 8]
    assert not any(name.startswith("s3") for name in net.state_dict())


def test_blocks_start_as_their_shortcut():
    net = RegNet(**TINY, se_ratio=0.25, out_features=["s3"])
    x = torch.rand(1, 32, 8, 8)
    torch.testing.assert_close(net.s3.b2(x), x)


def test_frozen_parts_do_not_change_in_training():
    net = RegNet(**TINY, out_features=["s2"], freeze_at=2).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.rand(2, 3, 32, 32))["s2"].sum().backward()
    torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1).step()
    after = net.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"s2"}
    assert isinstance(net.s1.b1.f.a_bn, FrozenBatchNorm2d)


def test_negative_number_of_frozen_parts_freezes_none():
    net = RegNet(**TINY, out_features=["s2"], freeze_at=-1)
    assert all(p.requires_grad for p in net.parameters())


def test_checkpointed_network_has_the_same_gradients():
    grads = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        net = RegNet(**TINY, se_ratio=0.25, out_features=["s2"], checkpoint=checkpoint)
        net(torch.rand(2, 3, 32, 32))["s2"].square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_layer_decay_sees_a_stage_each():
    net = RegNet(**TINY, out_features=["s2"])
    stages = net.parameter_stages()
    assert stages["stem.conv.weight"] == 0
    assert stages["s2.b1.f.a.weight"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_M": 1.0}, "w_m must be above 1, got 1.0 .*MODEL.REGNET.W_M"),
        ({"W_A": -1.0}, "w_a must be at least 0, got -1.0 .*MODEL.REGNET.W_A"),
        ({"DEPTH": 0}, "depth must be at least 1, got 0 .*MODEL.REGNET.DEPTH"),
        ({"W_0": 30}, "w_0 must be a multiple of 8, got 30 .*MODEL.REGNET.W_0"),
        ({"OUT_FEATURES": ["s5"]}, r"out_features must be of \['stem', .*'s4'\]: got 's5'"),
        ({"NORM": "BM"}, "unknown norm 'BM'.*MODEL.REGNET"),
    ],
)
def test_bad_setting_names_its_key(change, message):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_regnet_backbone"
    cfg.MODEL.REGNET.update(change)
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)
