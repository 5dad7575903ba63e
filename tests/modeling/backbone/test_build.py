import pytest
from torch import nn

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import BACKBONE_REGISTRY, Backbone, build_backbone
from detkit.utils.registry import Registry


class _Recorder(Backbone):
    def __init__(self, cfg, input_shape):
        super().__init__()
        self.input_shape = input_shape

    def forward(self, x):
        return {}

    def output_shape(self):
        return {}


@pytest.fixture
def registry(monkeypatch):
    registry = Registry("BACKBONE")
    monkeypatch.setattr("detkit.modeling.backbone.build.BACKBONE_REGISTRY", registry)
    return registry


def test_builtin_backbones_are_registered():
    for name in (
        "build_resnet_backbone",
        "build_resnet_fpn_backbone",
        "build_retinanet_resnet_fpn_backbone",
    ):
        assert name in BACKBONE_REGISTRY


def test_input_has_one_channel_per_pixel_mean(registry):
    registry.register(_Recorder)
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "_Recorder"
    cfg.MODEL.PIXEL_MEAN = [1.0]
    backbone = build_backbone(cfg)
    assert isinstance(backbone, _Recorder)
    assert backbone.input_shape == ShapeSpec(channels=1)
    assert build_backbone(cfg, ShapeSpec(channels=6)).input_shape.channels == 6


def test_unknown_name_is_an_error_with_near_misses():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn"
    with pytest.raises(KeyError, match="Did you mean 'build_resnet_fpn_backbone'"):
        build_backbone(cfg)


def test_what_is_no_backbone_is_an_error(registry):
    def build_nothing(cfg, input_shape):
        return nn.Identity()

    registry.register(build_nothing)
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_nothing"
    with pytest.raises(
        TypeError,
        match=r"MODEL.BACKBONE.NAME: 'build_nothing' must build a .*Backbone, got Identity",
    ):
        build_backbone(cfg)


def test_wrong_output_shape_is_found_when_the_backbone_is_built(registry):
    class Wrong(_Recorder):
        def output_shape(self):
            return {"s4": ShapeSpec(channels=1, stride=4)}

    registry.register(Wrong)
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "Wrong"
    with pytest.raises(
        ValueError, match=r"MODEL.BACKBONE.NAME: 'Wrong': Wrong.output_shape declares 's4'"
    ):
        build_backbone(cfg)
