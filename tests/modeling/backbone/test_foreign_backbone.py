import pytest
import torch
from torch import nn

from detkit.modeling.backbone.foreign_backbone import (
    FeatureMap,
    ForeignBackbone,
    feature_map_of,
    features_to_merge,
)


class _Body(nn.Module):
    """Two convolutions of stride 2, and one that no map needs."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4)
        self.second, self.unused = nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 6, 1)

    def forward(self, image):
        first = self.norm(self.first(image))
        second = self.second(first)
        self.unused(second)
        return [first, second]


class _Backbone(ForeignBackbone):
    def initial_state_dict(self):
        return "", {}


def _build(**kwargs) -> _Backbone:
    maps = {"s2": FeatureMap(4, 2), "s4": FeatureMap(6, 4)}
    arguments = {
        "body": _Body(),
        "maps": maps,
        "out_features": ["s2", "s4"],
        "sync_norm": lambda norm: norm,
    }
    return _Backbone(**{**arguments, "freeze_norm": lambda norm: nn.Identity(), **kwargs})


def _trained(backbone: _Backbone) -> set[str]:
    return {
        name.split(".")[1]
        for name, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }


def test_parameter_that_no_map_needs_does_not_train():
    backbone = _build()
    assert _trained(backbone) == {"first", "norm", "second"}
    sum(value.sum() for value in backbone(torch.randn(1, 3, 8, 8)).values()).backward()
    assert all(
        parameter.requires_grad == (parameter.grad is not None)
        for parameter in backbone.parameters()
    )


def test_parameters_behind_maps_that_are_not_given_do_not_train():
    assert _trained(_build(out_features=["s2"])) == {"first", "norm"}


@pytest.mark.parametrize(
    ("freeze_at", "trained"), [(0, {"first", "norm", "second"}), (1, {"second"}), (2, set())]
)
def test_maps_up_to_a_stride_are_frozen_with_their_norms(freeze_at, trained):
    backbone = _build(freeze_at=freeze_at)
    assert _trained(backbone) == trained
    assert isinstance(backbone.body.norm, nn.Identity) is (freeze_at > 0)


@pytest.mark.parametrize(
    ("shape", "want"),
    [
        pytest.param((2, 5, 32, 48), FeatureMap(5, 8), id="channels first"),
        pytest.param((2, 32, 48, 5), FeatureMap(5, 8, is_channels_last=True), id="channels last"),
        pytest.param((2, 5, 32, 32), None, id="other proportions"),
        pytest.param((2, 5, 37, 55), None, id="stride 7"),
        pytest.param((2, 5), None, id="no map"),
        pytest.param((2, 5, 0, 0), None, id="nothing"),
    ],
)
def test_stride_of_a_value_is_read_from_its_sides(shape, want):
    assert feature_map_of(torch.empty(shape)) == want


def test_only_what_a_pyramid_merges_is_given_unless_it_asks_for_more():
    assert features_to_merge(["s4", "s8", "s16"], ["s16", "s8"]) == ["s8", "s16"]
    assert features_to_merge(["s4", "s8"], ["s8", "s64"]) == ["s4", "s8"]
    assert features_to_merge(["s4", "s8"], []) == ["s4", "s8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "FrozenBM"}, "norm must be one of .*got 'FrozenBM'. Did you mean 'FrozenBN'"),
        (
            {"norm": "SyncBN", "body": nn.Conv2d(3, 4, 1)},
            "norm 'SyncBN' is for batch norms, which this model has none",
        ),
    ],
)
def test_bad_norm_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        _build(**arguments)


def test_stage_of_a_parameter_is_the_finest_map_that_depends_on_it():
    stages = _build().parameter_stages()
    assert {name.split(".")[1]: stage for name, stage in stages.items()} == {
        "first": 0,
        "norm": 0,
        "second": 1,
    }
