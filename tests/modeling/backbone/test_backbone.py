import pytest
import torch
from torch import nn

from detkit.layers import ShapeSpec
from detkit.modeling.backbone import Backbone
from detkit.modeling.backbone.backbone import check_features, select_features


class _Halves(Backbone):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2, stride=2)
        self._out_features = ["half"]
        self._out_feature_channels = {"half": 5, "unused": 1}
        self._out_feature_strides = {"half": 2, "unused": 1}

    def forward(self, x):
        return {"half": self.conv(x)}


def test_backbone_tells_its_shapes_and_asks_for_nothing():
    backbone = _Halves()
    assert backbone.output_shape() == {"half": ShapeSpec(channels=5, stride=2)}
    assert backbone.size_divisibility == 0
    assert backbone.padding_constraints == {}
    assert backbone(torch.zeros(1, 3, 4, 4))["half"].shape == (1, 5, 2, 2)


def test_backbone_without_forward_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        Backbone()  # type: ignore[abstract]


SHAPES = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}


def test_shapes_come_in_the_order_of_the_names():
    assert [shape.stride for shape in select_features(SHAPES, ["p3", "p2"], "KEY")] == [8, 4]


def test_unknown_feature_names_key_and_what_there_is():
    with pytest.raises(
        ValueError, match=r"MODEL.RPN.IN_FEATURES must be of \['p2', 'p3'\]: got 'p1'"
    ):
        select_features(SHAPES, ["p2", "p1"], "MODEL.RPN.IN_FEATURES")


def test_no_feature_is_an_error():
    with pytest.raises(ValueError, match="KEY needs at least one of"):
        select_features(SHAPES, [], "KEY")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], r"KEY needs at least one of \['s4', 's8'\]: got none"),
        (["s4", "s5"], r"KEY must be of \['s4', 's8'\]: got 's5'"),
    ],
)
def test_features_that_are_not_there_are_an_error(features, message):
    with pytest.raises(ValueError, match=message):
        check_features("KEY", features, ["s4", "s8"])
