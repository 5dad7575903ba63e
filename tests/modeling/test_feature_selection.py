"""Tests of detkit.modeling.feature_selection."""

import pytest

from detkit.layers import ShapeSpec
from detkit.modeling.feature_selection import select_features

SHAPES = {"p2": ShapeSpec(channels=8, stride=4), "p3": ShapeSpec(channels=8, stride=8)}


def test_shapes_come_in_the_order_of_the_names():
    assert [shape.stride for shape in select_features(SHAPES, ["p3", "p2"], "KEY")] == [8, 4]


def test_unknown_feature_names_key_and_what_there_is():
    with pytest.raises(
        ValueError, match="MODEL.RPN.IN_FEATURES asks for 'p1', but the backbone gives p2, p3"
    ):
        select_features(SHAPES, ["p2", "p1"], "MODEL.RPN.IN_FEATURES")


def test_no_feature_is_an_error():
    with pytest.raises(ValueError, match="KEY names no feature"):
        select_features(SHAPES, [], "KEY")
