import logging

import pytest

from detkit.config import get_cfg
from detkit.modeling import follow_backbone_pixels
from detkit.modeling.backbone import PixelSettings, build_backbone, made_for_pixels
from detkit.utils.registry import Registry

OWN = PixelSettings([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], "RGB")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    registry = Registry("BACKBONE")
    monkeypatch.setattr("detkit.modeling.backbone.pixel_settings.BACKBONE_REGISTRY", registry)

    @registry.register()
    @made_for_pixels(lambda cfg: OWN)
    def build_made_for_rgb(cfg, input_shape):
        raise NotImplementedError

    @registry.register()
    def build_plain(cfg, input_shape):
        raise NotImplementedError


def _pixels(*options, name="build_made_for_rgb"):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", name, *options])
    cfg.freeze()
    follow_backbone_pixels(cfg)
    assert cfg.is_frozen()
    return cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT


@pytest.mark.parametrize(
    ("options", "want"),
    [
        pytest.param([], ([1, 2, 3], [4, 5, 6], "RGB"), id="nothing set"),
        pytest.param(
            ["INPUT.FORMAT", "BGR"],
            ([3, 2, 1], [6, 5, 4], "BGR"),
            id="order set: numbers are turned round",
        ),
        pytest.param(["MODEL.PIXEL_STD", [7, 8, 9]], ([1, 2, 3], [7, 8, 9], "RGB"), id="std set"),
        pytest.param(
            ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]],
            ([103.53, 116.28, 123.675], [4, 5, 6], "RGB"),
            id="mean set, to the default",
        ),
        pytest.param(
            ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [1], "MODEL.PIXEL_STD", [2]],
            ([1], [2], "L"),
            id="all set",
        ),
    ],
)
def test_each_key_follows_the_backbone_unless_it_is_set(options, want):
    assert _pixels(*options) == want


def test_nothing_changes_for_other_backbones():
    assert _pixels(name="build_plain") == ([103.53, 116.28, 123.675], [1, 1, 1], "BGR")
    assert _pixels(name="not_registered") == ([103.53, 116.28, 123.675], [1, 1, 1], "BGR")


def test_what_was_followed_and_what_was_kept_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="detkit"):
        _pixels("MODEL.PIXEL_STD", [7, 8, 9])
    followed, kept = [record.getMessage() for record in caplog.records]
    assert (
        followed
        == "as build_made_for_rgb expects its images: INPUT.FORMAT RGB, MODEL.PIXEL_MEAN [1.0, 2.0, 3.0]"
    )
    assert kept == "MODEL.PIXEL_STD [7, 8, 9] is kept as the config sets it"


def test_second_call_changes_nothing_and_a_dump_gives_the_same(tmp_path, caplog):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_made_for_rgb"
    follow_backbone_pixels(cfg)
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    again = get_cfg()
    again.merge_from_file(str(tmp_path / "dump.yaml"))
    caplog.clear()
    for tree in (cfg, again):
        follow_backbone_pixels(tree)
        assert (tree.MODEL.PIXEL_MEAN, tree.INPUT.FORMAT) == ([1, 2, 3], "RGB")
    assert caplog.records == []


def test_format_of_other_channels_is_an_error():
    with pytest.raises(
        ValueError,
        match="INPUT.FORMAT 'L' is not what the backbone was made for, RGB: set MODEL.PIX",
    ):
        _pixels("INPUT.FORMAT", "L")


def test_statistics_of_the_unit_range_become_readable_numbers():
    got = PixelSettings.from_unit_range((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert got == PixelSettings([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB")


def test_backbone_built_without_it_says_so(caplog, monkeypatch):
    monkeypatch.undo()
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_torchvision_backbone", "MODEL.TORCHVISION.NAME", "resnet18"]
    )
    build_backbone(cfg)
    assert (
        "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD: detkit's defaults, not what build_torchvision_backbone"
        in caplog.text
    )
    caplog.clear()
    follow_backbone_pixels(cfg)
    build_backbone(cfg)
    assert "detkit's defaults" not in caplog.text
