"""Tests of detkit.modeling.roi_heads.box_head."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.roi_heads.box_head import FastRCNNConvFCHead

SHAPE = ShapeSpec(channels=4, height=3, width=3)


def test_fully_connected_layers_give_a_vector():
    head = FastRCNNConvFCHead(input_shape=SHAPE, conv_dims=[], fc_dims=[8, 6])
    assert head(torch.randn(5, 4, 3, 3)).shape == (5, 6)
    assert head.output_shape == ShapeSpec(channels=6)


def test_convolutions_alone_keep_the_grid():
    head = FastRCNNConvFCHead(input_shape=SHAPE, conv_dims=[8], fc_dims=[])
    assert head(torch.randn(5, 4, 3, 3)).shape == (5, 8, 3, 3)
    assert head.output_shape == ShapeSpec(channels=8, height=3, width=3)


def test_no_regions_pass_through():
    head = FastRCNNConvFCHead(input_shape=SHAPE, conv_dims=[8], fc_dims=[6])
    assert head(torch.zeros(0, 4, 3, 3)).shape == (0, 6)


def test_names_and_shapes_of_weights_are_those_of_detectron2():
    head = FastRCNNConvFCHead(input_shape=SHAPE, conv_dims=[8, 8], fc_dims=[6], conv_norm="BN")
    shapes = {
        name: tuple(t.shape) for name, t in head.state_dict().items() if name.endswith("weight")
    }
    assert shapes == {
        "conv1.weight": (8, 4, 3, 3),
        "conv1.norm.weight": (8,),
        "conv2.weight": (8, 8, 3, 3),
        "conv2.norm.weight": (8,),
        "fc1.weight": (6, 72),
    }
    assert "conv1.bias" not in head.state_dict()


def test_layers_are_listed_for_a_subclass_that_runs_them_itself():
    shape = ShapeSpec(channels=4, height=3, width=3)
    head = FastRCNNConvFCHead(shape, conv_dims=[8, 8], fc_dims=[16, 5])
    x = want = torch.randn(2, 4, 3, 3)
    for layer in head.conv_norm_relus:
        x = layer(x)
    x = x.flatten(1)
    for layer in head.fcs:
        x = layer(x).relu()
    assert torch.equal(x, head(want))


def test_config_gives_the_layers():
    cfg = get_cfg()
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 2, 8
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 6
    assert FastRCNNConvFCHead(cfg, SHAPE).output_shape == ShapeSpec(channels=6)


def test_flattening_does_not_depend_on_the_memory_format():
    head, x = (
        FastRCNNConvFCHead(input_shape=SHAPE, conv_dims=[], fc_dims=[6]),
        torch.randn(5, 4, 3, 3),
    )
    torch.testing.assert_close(head(x.contiguous(memory_format=torch.channels_last)), head(x))


def test_no_layers_name_the_keys():
    with pytest.raises(ValueError, match="conv_dims and fc_dims are both empty"):
        FastRCNNConvFCHead(input_shape=SHAPE, conv_dims=[], fc_dims=[])


def test_unknown_input_shape_is_an_error():
    with pytest.raises(ValueError, match="needs channels, height and width"):
        FastRCNNConvFCHead(input_shape=ShapeSpec(channels=4), conv_dims=[], fc_dims=[6])
