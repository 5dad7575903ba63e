"""Tests of detkit.modeling.proposal_generator.rpn_head."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.proposal_generator.rpn_head import StandardRPNHead


def test_maps_have_an_entry_per_anchor():
    logits, deltas = StandardRPNHead(in_channels=8, num_anchors=3)(
        [torch.randn(2, 8, 5, 7), torch.randn(2, 8, 1, 1)]
    )
    assert [tuple(x.shape) for x in logits] == [(2, 3, 5, 7), (2, 3, 1, 1)]
    assert [tuple(x.shape) for x in deltas] == [(2, 12, 5, 7), (2, 12, 1, 1)]


@pytest.mark.parametrize(
    ("conv_dims", "names"),
    [
        pytest.param([-1], {"conv.weight": (8, 8, 3, 3)}, id="one"),
        pytest.param([16], {"conv.weight": (16, 8, 3, 3)}, id="other-width"),
        pytest.param(
            [16, -1],
            {"conv.conv0.weight": (16, 8, 3, 3), "conv.conv1.weight": (16, 16, 3, 3)},
            id="two",
        ),
    ],
)
def test_names_and_shapes_of_weights_are_those_of_detectron2(conv_dims, names):
    state = StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=conv_dims).state_dict()
    last = tuple(names.values())[-1][0]
    names = {
        **names,
        "objectness_logits.weight": (3, last, 1, 1),
        "anchor_deltas.weight": (12, last, 1, 1),
    }
    assert {name: tuple(t.shape) for name, t in state.items() if name.endswith("weight")} == names
    assert {name for name in state if name.endswith("bias")} == {
        name.replace("weight", "bias") for name in names
    }


def test_weights_start_small_and_biases_at_zero():
    state = StandardRPNHead(in_channels=64, num_anchors=15).state_dict()
    for name, t in state.items():
        if name.endswith("bias"):
            assert not t.any()
        else:
            assert 0.008 < t.std() < 0.012


def test_inputs_are_not_changed():
    x = torch.randn(1, 8, 5, 7)
    before = x.clone()
    StandardRPNHead(in_channels=8, num_anchors=3)([x])
    torch.testing.assert_close(x, before)


def test_config_gives_channels_and_anchors():
    cfg = get_cfg()
    cfg.MODEL.RPN.CONV_DIMS = [16, -1]
    head = StandardRPNHead(cfg, [ShapeSpec(channels=8, stride=16)])
    assert head.objectness_logits.weight.shape == (15, 16, 1, 1)


def test_levels_of_different_channels_are_an_error():
    with pytest.raises(ValueError, match=r"MODEL.RPN.IN_FEATURES: .*same channels; got \[8, 16\]"):
        StandardRPNHead(
            get_cfg(), [ShapeSpec(channels=8, stride=16), ShapeSpec(channels=16, stride=32)]
        )


def test_levels_of_different_anchors_are_an_error():
    cfg = get_cfg()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64, 128]]
    with pytest.raises(
        ValueError, match=r"MODEL.ANCHOR_GENERATOR: .*same anchors per cell; got \[3, 6\]"
    ):
        StandardRPNHead(cfg, [ShapeSpec(channels=8, stride=16), ShapeSpec(channels=8, stride=32)])


@pytest.mark.parametrize("conv_dims", [[], [0], [16, -2]], ids=["none", "zero", "negative"])
def test_bad_conv_dims_name_the_key(conv_dims):
    with pytest.raises(ValueError, match="conv_dims must have a number per convolution"):
        StandardRPNHead(in_channels=8, num_anchors=3, conv_dims=conv_dims)
