import logging

import pytest
import torch
from torch import nn

from detkit.layers import ShapeSpec
from detkit.modeling.backbone import FPN, Backbone
from detkit.modeling.backbone.dry_run import (
    OutputShapeError,
    check_output_shape,
    dry_forward,
    parameters_behind,
)


class Strided(Backbone):
    """Gives s4 with 5 channels and s8 with 6, and declares what it is told to."""

    def __init__(self, **declared):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 4, 4), nn.BatchNorm2d(5), nn.Dropout(0.5))
        self.next = nn.Conv2d(5, 6, 2, 2)
        self.declared = {"s4": (5, 4), "s8": (6, 8), **declared}

    def forward(self, x):
        s4 = self.stem(x)
        return {"s4": s4, "s8": self.next(s4)}

    def output_shape(self):
        return {
            name: ShapeSpec(channels=entry[0], stride=entry[1])
            for name, entry in self.declared.items()
            if entry is not None
        }


class OnOneDevice(Strided):
    """Fails on the meta device, as a table that is no buffer makes it."""

    def forward(self, x):
        return super().forward(x + torch.randn(1))


BACKBONES = pytest.mark.parametrize("kind", [Strided, OnOneDevice])


@BACKBONES
def test_true_output_shape_passes(kind, caplog):
    check_output_shape(kind(), 3)
    assert not caplog.records  # it has run, and nothing stopped it


@BACKBONES
@pytest.mark.parametrize(
    ("declared", "message"),
    [
        pytest.param({"s4": (7, 4)}, "declares 's4' with 7 channels, forward returns 5", id="channels"),
        pytest.param({"s8": (6, 16)}, "declares 's8' with stride 16, forward returns stride 8: a map of 16x24 for an image of 128x192", id="too coarse"),
        pytest.param({"s8": (6, 4)}, "declares 's8' with stride 4, forward returns stride 8", id="too fine"),
        pytest.param({"s16": (6, 16)}, r"declares 's16', forward returns only \['s4', 's8'\]", id="missing"),
    ],
)  # fmt: skip
def test_wrong_output_shape_is_named(kind, declared, message):
    with pytest.raises(OutputShapeError, match=f"{kind.__name__}.*{message}"):
        check_output_shape(kind(**declared), 3)


def test_height_and_width_may_differ_in_stride():
    class Wide(Strided):
        def forward(self, x):
            return {name: value[..., ::2] for name, value in super().forward(x).items()}

    with pytest.raises(
        OutputShapeError, match="'s4' with stride 4, forward returns stride 4 and 8"
    ):
        check_output_shape(Wide(), 3)


@pytest.mark.parametrize(
    ("declared", "message"), [({"s8": (6, 8)}, ""), ({"s8": (9, 8)}, "Strided.output_shape.*9 ch")]
)
def test_backbone_below_a_pyramid_is_checked_before_the_pyramid_fails_on_it(declared, message):
    fpn = FPN(Strided(**declared), in_features=["s4", "s8"], out_channels=4)
    if not message:
        check_output_shape(fpn, 3)
        return
    with pytest.raises(OutputShapeError, match=message):
        check_output_shape(fpn, 3)


@pytest.mark.parametrize("result", [torch.zeros(1), [torch.zeros(1)]])
def test_forward_that_gives_no_dict_is_an_error(result):
    class Bare(Strided):
        def forward(self, x):
            return result

    with pytest.raises(
        OutputShapeError, match=f"features by name, a dict: got {type(result).__name__}"
    ):
        check_output_shape(Bare(), 3)


def test_map_without_height_and_width_is_an_error():
    class Pooled(Strided):
        def forward(self, x):
            return {name: value.mean((2, 3)) for name, value in super().forward(x).items()}

    with pytest.raises(
        OutputShapeError, match=r"forward returns no map \(N, C, H, W\): shape \(2, 5\)"
    ):
        check_output_shape(Pooled(), 3)


def test_maps_a_cell_short_are_accepted(caplog):
    class Valid(Strided):
        def __init__(self):
            super().__init__()
            self.next = nn.Conv2d(5, 6, 3, 2)

    check_output_shape(Valid(), 3)
    assert not caplog.records


def test_size_of_the_image_follows_what_the_backbone_asks_for():
    class Picky(Strided):
        size_divisibility = 40
        seen = None

        def forward(self, x):
            type(self).seen = x.shape
            return super().forward(x)

    check_output_shape(Picky(), 3)
    assert Picky.seen is not None
    assert Picky.seen[1] == 3
    assert [side % 40 for side in Picky.seen[-2:]] == [0, 0]


def test_forward_that_fails_for_another_reason_is_reported_and_let_through(caplog):
    class NeedsGpu(Strided):
        def forward(self, x):
            raise RuntimeError("no kernel for this device")

    with caplog.at_level(logging.WARNING, logger="detkit"):
        check_output_shape(NeedsGpu(), 3)
    assert (
        "output_shape of NeedsGpu is not checked: it fails on 64x96: no kernel for this device"
        in caplog.text
    )


@BACKBONES
def test_nothing_changes(kind):
    backbone = kind().train()
    backbone.next.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    check_output_shape(backbone, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone.modules()] == modes
    after = backbone.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].device.type == "cpu"
        for name, value in before.items()
    )
    assert not any(module._forward_hooks for module in backbone.modules())


def test_own_backbones_are_not_run(monkeypatch):
    backbone = Strided(s4=(7, 4))
    monkeypatch.setattr(Strided, "__module__", "detkit.modeling.backbone.strided")
    check_output_shape(backbone, 3)


def test_dry_forward_gives_shapes_without_numbers():
    outputs = dry_forward(Strided(), (64, 32))
    assert outputs["s8"].shape == (2, 6, 8, 4)
    assert outputs["s8"].device.type == "meta"


@BACKBONES
def test_parameters_behind_each_map(kind):
    backbone = kind()
    stem = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}
    backbone.add_module("unused", nn.Linear(1, 1))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone.stem[0].weight.requires_grad_(False)  # whether it trains does not matter
    assert parameters_behind(backbone, (64, 32)) == [stem, stem | {"next.weight", "next.bias"}]
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_map_that_is_not_declared_is_nobodys():
    check_output_shape(Strided(s4=None), 3)
