import sys

import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling import follow_backbone_pixels
from detkit.modeling.backbone import build_backbone

timm = pytest.importorskip("timm", reason="timm is an optional extra")

from detkit.modeling.backbone import TimmBackbone  # noqa: E402
from detkit.modeling.backbone.timm_backbone import placed_weights  # noqa: E402

STAGES = ["s4", "s8", "s16", "s32"]
TINY = "mobilenetv3_small_050"


def _tiny(**kwargs) -> TimmBackbone:
    return TimmBackbone(**{"name": TINY, "out_features": STAGES, **kwargs})


def _config(*options, name="build_timm_fpn_backbone"):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", name, "MODEL.TIMM.NAME", TINY, "MODEL.BACKBONE.FREEZE_AT", 0]
    )
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", STAGES, "MODEL.FPN.OUT_CHANNELS", 8])
    cfg.merge_from_list(list(options))
    follow_backbone_pixels(cfg)
    return cfg


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        pytest.param("resnet18", {4: 64, 8: 128, 16: 256, 32: 512}, id="resnet"),
        pytest.param("mobilenetv3_small_050", {4: 8, 8: 16, 16: 24, 32: 288}, id="mobilenet"),
        pytest.param("convnext_atto", {4: 40, 8: 80, 16: 160, 32: 320}, id="no stride 2"),
        pytest.param("vit_tiny_patch16_224", {16: 192}, id="three maps of one stride"),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            {4: 96, 8: 192, 16: 384, 32: 768},
            id="channels last",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "darknet53", {4: 128, 8: 256, 16: 512, 32: 1024}, id="stride 1", marks=pytest.mark.slow
        ),
    ],
)
def test_stages_are_found_and_every_parameter_that_trains_has_a_gradient(name, channels):
    backbone = _tiny(name=name, out_features=[f"s{stride}" for stride in channels]).train()
    assert backbone.output_shape() == {
        f"s{s}": ShapeSpec(channels=c, stride=s) for s, c in channels.items()
    }
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert {f: tuple(m.shape) for f, m in maps.items()} == {
        f"s{s}": (2, c, 64 // s, 96 // s) for s, c in channels.items()
    }
    sum(value.square().mean() for value in maps.values()).backward()
    assert [
        n for n, p in backbone.named_parameters() if p.requires_grad != (p.grad is not None)
    ] == []


def test_maps_are_those_of_timm():
    backbone = _tiny(out_features=["s16", "s4"]).eval()
    theirs = timm.create_model(TINY, features_only=True, out_indices=(1, 3)).eval()
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    s4, s16 = theirs(image)
    maps = backbone(image)
    assert list(maps) == ["s16", "s4"]
    assert torch.equal(maps["s4"], s4)
    assert torch.equal(maps["s16"], s16)


def test_later_stages_are_not_there():
    backbone = _tiny(name="resnet10t", out_features=["s8"])
    assert {name.split(".")[1] for name in backbone.state_dict()} == {
        "conv1",
        "bn1",
        "layer1",
        "layer2",
    }


@pytest.mark.parametrize(
    ("name", "feature", "blocks"),
    [
        (TINY, "s2", 0),
        (TINY, "s4", 1),
        (TINY, "s16", 4),
        ("efficientnet_lite0", "s2", 1),
        ("efficientnet_lite0", "s8", 3),
    ],
)
def test_later_blocks_that_timm_keeps_are_not_there_either(name, feature, blocks):
    backbone = _tiny(name=name, out_features=[feature])
    numbers = {key.split(".")[2] for key in backbone.state_dict() if key.startswith("body.blocks.")}
    assert numbers == {str(number) for number in range(blocks)}
    backbone(torch.randn(2, 3, 64, 64))[feature].sum().backward()
    assert [key for key, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("freeze_at", "frozen"), [(0, set()), (2, {"conv_stem", "bn1", "blocks.0"})]
)
def test_freeze_at_counts_by_stride(freeze_at, frozen):
    backbone = _tiny(freeze_at=freeze_at)
    got = {
        name if not name.startswith("blocks") else ".".join(name.split(".")[:2])
        for name, parameter in backbone.body.named_parameters()
        if not parameter.requires_grad
        for name in [name.rsplit(".", 1)[0]]
    }
    # The norms of the frozen part have no parameters any more.
    assert got == frozen - {"bn1"}
    assert isinstance(backbone.body.get_submodule("bn1"), nn.BatchNorm2d) is (freeze_at == 0)


def test_frozen_norms_keep_their_activation():
    backbone, frozen = _tiny().eval(), _tiny(norm="FrozenBN").eval()
    frozen.body.load_state_dict(backbone.body.state_dict())
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(frozen(image)["s32"], backbone(image)["s32"])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


def test_images_of_any_channels():
    cfg = _config("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0], "INPUT.FORMAT", "L")
    assert build_backbone(cfg)(torch.zeros(1, 1, 64, 64))["p5"].shape == (1, 8, 2, 2)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)


@pytest.mark.usefixtures("hub")
def test_weights_that_were_placed_are_taken():
    safetensors = pytest.importorskip("safetensors.torch")
    model = timm.create_model(TINY).eval()
    path = placed_weights(TINY)
    path.parent.mkdir(parents=True)
    safetensors.save_file(model.state_dict(), str(path))
    backbone = _tiny(pretrained=True).eval()
    assert backbone.load_initial_weights() == f"timm's {TINY}"
    assert torch.equal(
        backbone.body.get_parameter("conv_stem.weight"), model.get_parameter("conv_stem.weight")
    )


@pytest.mark.usefixtures("hub")
def test_weights_that_are_not_there_offline_name_source_and_place(tmp_path):
    backbone = _tiny(pretrained=True)  # nothing is looked for when it is built
    with pytest.raises(OSError, match=rf"the .safetensors file of https://huggingface.co/timm/mob.* place it as {tmp_path}.*/timm/{TINY}.saf"):  # fmt: skip
        backbone.load_initial_weights()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["NAME", "resnet19"], "TIMM.NAME: timm has no model 'resnet19'. Did you mean 'resnet", id="name"),
        pytest.param(["NAME", "resnet18.a4_in1k"], r"TIMM.NAME: timm has \['resnet18.a1_in1k', .*got 'resnet18.a4_in1k'. Did you", id="tag"),
        pytest.param(["NAME", "levit_128s"], "'levit_128s' does not give features of an image of 256x384", id="fixed size"),
        pytest.param(["NAME", "convmixer_768_32"], "'convmixer_768_32' gives no maps of 1/2, 1/4", id="stride 7", marks=pytest.mark.slow),
        pytest.param(["OUT_FEATURES", ["s3"]], r"out_features must be of \['s2', .*'s32'\]: got 's3'. Did you mean.*MODEL.TIMM.OUT_FEATURES", id="feature"),
    ],
)  # fmt: skip
def test_bad_setting_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(_config(f"MODEL.TIMM.{options[0]}", options[1], name="build_timm_backbone"))


def test_missing_package_says_which_command_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ModuleNotFoundError, match="timm, which is not installed: pip install timm$"
    ):
        _config()


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("build_timm_fpn_backbone", ["p3", "p4", "p5"]),
        ("build_retinanet_timm_fpn_backbone", ["p3", "p4", "p5", "p6"]),
    ],
)
def test_pyramid_leaves_out_what_it_does_not_merge(name, levels):
    backbone = build_backbone(_config("MODEL.FPN.IN_FEATURES", ["s8", "s16"], name=name)).train()
    assert list(backbone.output_shape()) == levels
    sum(value.sum() for value in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [
        name for name, p in backbone.named_parameters() if p.requires_grad != (p.grad is not None)
    ] == []


@pytest.mark.parametrize(
    ("name", "std"),
    [("resnet18", [58.395, 57.12, 57.375]), ("vit_tiny_patch16_224", [127.5, 127.5, 127.5])],
)
def test_pixels_follow_the_published_weights(name, std):
    cfg = _config("MODEL.TIMM.NAME", name)
    assert cfg.INPUT.FORMAT == "RGB"
    assert std == cfg.MODEL.PIXEL_STD
