from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool as TorchvisionMaxPool
from torchvision.ops.feature_pyramid_network import LastLevelP6P7 as TorchvisionP6P7

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling import Detector
from detkit.modeling.backbone import (
    FPN,
    Backbone,
    LastLevelMaxPool,
    LastLevelP6P7,
    build_backbone,
    build_fpn,
    build_retinanet_fpn,
)
from detkit.modeling.backbone.fpn import _assert_strides_are_log2_contiguous

CHANNELS = {"res2": 4, "res3": 6, "res4": 8, "res5": 10}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class _Pyramid(Backbone):
    """Random maps of the right shapes; the same for the same image size."""

    _out_features = list(CHANNELS)
    _out_feature_channels = CHANNELS
    _out_feature_strides = STRIDES

    def forward(self, x):
        n, _, height, width = x.shape
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(
                n, CHANNELS[name], height // stride, width // stride, generator=generator
            )
            for name, stride in STRIDES.items()
        }


def _fpn(**kwargs) -> FPN:
    torch.manual_seed(0)
    arguments = {"in_features": list(CHANNELS), "out_channels": 5, "top_block": LastLevelMaxPool()}
    return FPN(_Pyramid(), **{**arguments, **kwargs})


def _in_torchvision(ours: FPN, extra_blocks, norm_layer=None) -> FeaturePyramidNetwork:
    """The same pyramid of torchvision, with the same weights."""
    channels = [CHANNELS[name] for name in ours.in_features]
    theirs = FeaturePyramidNetwork(channels, 5, extra_blocks=extra_blocks, norm_layer=norm_layer)
    state = {}
    for name, value in ours.state_dict().items():
        part, _, leaf = name.partition(".")
        if part == "top_block":
            state[f"extra_blocks.{leaf}"] = value
            continue
        kind, index = part[4:-1], ours._numbers.index(int(part[-1]))
        blocks = "inner_blocks" if kind == "lateral" else "layer_blocks"
        state[
            f"{blocks}.{index}.{leaf.replace('norm', '1') if 'norm' in leaf else f'0.{leaf}'}"
        ] = value
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(
    "features",
    [
        ["res2", "res3", "res4", "res5"],
        ["res3", "res4", "res5"],
        ["res4"],
        ["res2", "res5"],
        ["res2", "res3", "res5"],
    ],
)
@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("top", ["max-pool", "P6 and P7", "none"])
def test_equals_torchvision_with_the_same_weights(features, norm, top):
    channels = CHANNELS[features[-1]]
    top_block = {
        "max-pool": LastLevelMaxPool("p" + features[-1][-1]),
        "P6 and P7": LastLevelP6P7(channels, 5, features[-1]),
        "none": None,
    }[top]
    ours = _fpn(in_features=features, norm=norm, top_block=top_block)
    extra = {
        "max-pool": TorchvisionMaxPool(),
        "P6 and P7": TorchvisionP6P7(channels, 5),
        "none": None,
    }[top]
    theirs = _in_torchvision(ours, extra, nn.BatchNorm2d if norm else None)
    image = torch.zeros(2, 3, 64, 96)
    got = ours(image)
    want = theirs(
        OrderedDict((name, value) for name, value in _Pyramid()(image).items() if name in features)
    )
    numbers = [int(name[-1]) for name in features]
    numbers += range(numbers[-1] + 1, numbers[-1] + 1 + len(want) - len(features))
    assert list(got) == [f"p{number}" for number in numbers]
    for level, expected in zip(got.values(), want.values(), strict=True):
        torch.testing.assert_close(level, expected, atol=1e-5, rtol=1e-5)


def test_levels_have_the_shapes_it_announces():
    fpn = _fpn()
    levels = fpn(torch.zeros(1, 3, 64, 128))
    assert levels.keys() == fpn.output_shape().keys()
    for name, shape in fpn.output_shape().items():
        assert shape == ShapeSpec(channels=5, stride=2 ** int(name[1:]))
        assert levels[name].shape == (1, 5, 64 // shape.stride, 128 // shape.stride)
    assert fpn.size_divisibility == 32


def test_average_halves_the_sum_of_a_map_and_the_one_above():
    fpn = _fpn(fuse_type="avg", in_features=["res4", "res5"], top_block=None)
    image = torch.zeros(1, 3, 64, 64)
    features = _Pyramid()(image)
    upper = fpn.get_submodule("fpn_lateral5")(features["res5"])
    enlarged = upper.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    merged = (fpn.get_submodule("fpn_lateral4")(features["res4"]) + enlarged) / 2
    levels = fpn(image)
    torch.testing.assert_close(levels["p4"], fpn.get_submodule("fpn_output4")(merged))
    torch.testing.assert_close(levels["p5"], fpn.get_submodule("fpn_output5")(upper))


def test_subclass_finds_the_convolutions_coarsest_first():
    fpn = _fpn()
    assert fpn.lateral_convs[0] is fpn.fpn_lateral5
    assert fpn.lateral_convs[-1] is fpn.fpn_lateral2
    assert [conv.kernel_size for conv in fpn.output_convs] == [(3, 3)] * 4


def test_every_parameter_has_a_gradient():
    fpn = _fpn(top_block=LastLevelP6P7(10, 5))
    sum(level.sum() for level in fpn(torch.zeros(1, 3, 128, 128)).values()).backward()
    assert all(parameter.grad is not None for parameter in fpn.parameters())


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "LN"])
def test_norm_takes_the_place_of_the_bias(norm):
    names = set(_fpn(norm=norm).state_dict())
    assert "fpn_lateral2.norm.weight" in names
    assert "fpn_lateral2.bias" not in names
    assert "fpn_lateral2.bias" in set(_fpn().state_dict())


def test_initialisation_is_xavier_with_zero_bias():
    fpn = _fpn(out_channels=64)
    weight, bias = fpn.get_parameter("fpn_output3.weight"), fpn.get_parameter("fpn_output3.bias")
    assert weight.std().item() == pytest.approx((1 / (64 * 9)) ** 0.5, rel=0.03)
    assert not bias.any()


def test_p6_and_p7_come_from_the_bottom_up_map():
    fpn = _fpn(in_features=["res3", "res4", "res5"], top_block=LastLevelP6P7(10, 5))
    image = torch.zeros(1, 3, 128, 128)
    levels = fpn(image)
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"]
    p6 = fpn.top_block.p6(_Pyramid()(image)["res5"])
    torch.testing.assert_close(levels["p6"], p6)
    torch.testing.assert_close(levels["p7"], fpn.top_block.p7(p6.relu()))
    assert fpn.output_shape()["p7"].stride == 128


def test_max_pool_takes_every_second_pixel():
    x = torch.randn(1, 2, 6, 8)
    assert torch.equal(LastLevelMaxPool()(x)[0], x[:, :, ::2, ::2])


def test_square_pad_is_passed_on():
    assert _fpn(square_pad=1024).padding_constraints == {"square_size": 1024}
    assert _fpn().padding_constraints == {"square_size": 0}


@pytest.mark.parametrize(("asked", "want"), [(0, 32), (16, 32), (48, 96)])
def test_images_are_padded_as_the_bottom_up_network_asks_too(asked, want):
    class Asking(_Pyramid):
        size_divisibility = asked

    fpn = FPN(Asking(), in_features=list(CHANNELS), out_channels=5)
    assert fpn.size_divisibility == want
    assert fpn(torch.zeros(1, 3, want, want))["p5"].shape[-1] == want // 32


@pytest.mark.parametrize("size", [(70, 90), (64, 100), (65, 33)])
def test_images_of_any_size_equal_torchvision(size):
    image = torch.zeros(1, 3, *size)
    features = {}
    for name, stride in STRIDES.items():  # rounded up, as strided convolutions round
        sides = [-(-side // stride) for side in size]
        features[name] = torch.randn(1, CHANNELS[name], *sides)

    class Ragged(_Pyramid):
        def forward(self, x):
            return features

    ours = FPN(Ragged(), list(CHANNELS), 5, top_block=LastLevelMaxPool())
    theirs = _in_torchvision(ours, TorchvisionMaxPool())
    for level, expected in zip(ours(image).values(), theirs(features).values(), strict=True):
        torch.testing.assert_close(level, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "align_corners"), [("bilinear", False), ("bilinear", True), ("bicubic", False)]
)
def test_map_above_is_upsampled_by_the_mode(mode, align_corners):
    fpn = _fpn(
        in_features=["res4", "res5"],
        top_block=None,
        upsample_mode=mode,
        align_corners=align_corners,
    )
    image = torch.zeros(1, 3, 64, 96)
    features = _Pyramid()(image)
    upper = fpn.get_submodule("fpn_lateral5")(features["res5"])
    upsample = nn.Upsample(scale_factor=2, mode=mode, align_corners=align_corners)
    merged = fpn.get_submodule("fpn_lateral4")(features["res4"]) + upsample(upper)
    torch.testing.assert_close(fpn(image)["p4"], fpn.get_submodule("fpn_output4")(merged))


def test_maps_of_equal_stride_are_numbered_on():
    class Dilated(_Pyramid):
        _out_feature_strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 16}

        def forward(self, x):
            maps = super().forward(x)
            height, width = maps["res4"].shape[-2:]
            return {**maps, "res5": torch.ones(len(x), CHANNELS["res5"], height, width)}

    ours = FPN(Dilated(), list(CHANNELS), 5, top_block=LastLevelMaxPool())
    image = torch.zeros(1, 3, 64, 96)
    theirs = _in_torchvision(ours, TorchvisionMaxPool())
    found, expected = ours(image), theirs(Dilated()(image))
    assert {name: shape.stride for name, shape in ours.output_shape().items()} == {
        "p2": 4,
        "p3": 8,
        "p4": 16,
        "p5": 16,
        "p6": 32,
    }
    for level, value in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(level, value, atol=1e-5, rtol=1e-5)
    assert ours.size_divisibility == 16


@pytest.mark.parametrize(
    ("features", "divisor"),
    [(["res2", "res3", "res4", "res5"], 32), (["res2", "res3", "res4"], 16), (["res3"], 8)],
)
def test_images_of_any_size_are_padded_to_what_it_divides(features, divisor):
    fpn = _fpn(
        in_features=features, top_block=LastLevelP6P7(CHANNELS[features[-1]], 5, features[-1])
    )
    detector = Detector(backbone=fpn, pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3)
    images = [{"image": torch.zeros(3, 61, 75)}, {"image": torch.zeros(3, 33, 97)}]
    batch = detector.preprocess_image(images)
    assert batch.tensor.shape[-2:] == tuple(-(-side // divisor) * divisor for side in (61, 97))
    levels = fpn(batch.tensor)
    for name, shape in fpn.output_shape().items():
        assert levels[name].shape[-2:] == tuple(
            -(-side // shape.stride) for side in batch.tensor.shape[-2:]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"in_features": ["res2", "rse3"]},
            "got 'rse3'. Did you mean 'res3'",
            id="unknown feature",
        ),
        pytest.param({"in_features": []}, "in_features needs at least one of", id="no feature"),
        pytest.param(
            {"in_features": ["res4", "res2"]},
            r"stride must not fall .*have \[16, 4\]",
            id="coarsest first",
        ),
        pytest.param(
            {"fuse_type": "mean"}, "fuse_type must be 'sum' or 'avg': got 'mean'", id="fuse type"
        ),
        pytest.param({"upsample_mode": "area"}, "upsample_mode must be .*got 'area'", id="mode"),
    ],
)
def test_bad_argument_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        _fpn(**arguments)


def _config(name: str, features: list[str]):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.OUT_FEATURES = features
    cfg.MODEL.FPN.IN_FEATURES = features
    return cfg


def test_built_pyramid_of_faster_rcnn():
    fpn = build_backbone(_config("build_resnet_fpn_backbone", ["res2", "res3", "res4", "res5"]))
    assert list(fpn.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    assert fpn.output_shape()["p6"] == ShapeSpec(channels=256, stride=64)
    assert fpn(torch.zeros(1, 3, 64, 64))["p6"].shape == (1, 256, 1, 1)


def test_built_pyramid_may_end_early():
    fpn = build_backbone(_config("build_resnet_fpn_backbone", ["res2", "res3"]))
    assert list(fpn.output_shape()) == ["p2", "p3", "p4"]
    assert fpn.size_divisibility == 8


def test_built_pyramid_of_retinanet():
    fpn = build_backbone(_config("build_retinanet_resnet_fpn_backbone", ["res3", "res4", "res5"]))
    assert list(fpn.output_shape()) == ["p3", "p4", "p5", "p6", "p7"]
    assert isinstance(fpn.top_block, LastLevelP6P7)
    assert isinstance(fpn.top_block.p6, nn.Conv2d)
    assert fpn.top_block.p6.in_channels == 512


@pytest.mark.parametrize(
    ("top_block", "levels"),
    [
        ("none", ["p3", "p4"]),
        ("LastLevelMaxPool", ["p3", "p4", "p5"]),
        ("LastLevelP6P7", ["p3", "p4", "p5", "p6"]),
    ],
)
@pytest.mark.parametrize(
    "name", ["build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"]
)
def test_top_block_is_that_of_the_key(name, top_block, levels):
    cfg = _config(name, ["res3", "res4"])
    cfg.merge_from_list(["MODEL.FPN.TOP_BLOCK", top_block, "MODEL.FPN.UPSAMPLE_MODE", "bilinear"])
    fpn = build_backbone(cfg)
    assert list(fpn.output_shape()) == list(fpn(torch.zeros(1, 3, 64, 64))) == levels


def test_p6_of_retinanet_may_come_from_the_pyramid():
    cfg = _config("build_retinanet_resnet_fpn_backbone", ["res3", "res4"])
    cfg.MODEL.FPN.P6_FROM = "P5"  # the coarsest level, here p4
    fpn = build_backbone(cfg)
    levels = fpn(torch.rand(1, 3, 64, 64))
    assert isinstance(fpn.top_block, LastLevelP6P7)
    torch.testing.assert_close(levels["p5"], fpn.top_block.p6(levels["p4"]))


@pytest.mark.parametrize(
    "name", ["build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"]
)
def test_features_that_the_backbone_does_not_give_are_an_error_that_names_the_keys(name):
    cfg = _config(name, ["res4", "res5"])
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4"]
    with pytest.raises(
        ValueError, match=r"MODEL.FPN.IN_FEATURES: .*got 'res3'.*MODEL.RESNETS.OUT_FEATURES"
    ):
        build_backbone(cfg)


def test_bad_setting_of_the_pyramid_names_its_key():
    cfg = _config("build_resnet_fpn_backbone", ["res4", "res5"])
    cfg.MODEL.FPN.NORM = "GroupNorm"
    with pytest.raises(ValueError, match="MODEL.FPN.*unknown norm 'GroupNorm'"):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("build", "levels"),
    [(build_fpn, ["p3", "p4", "p5"]), (build_retinanet_fpn, ["p3", "p4", "p5", "p6"])],
)
def test_any_backbone_that_tells_its_shapes_takes_a_pyramid(build, levels):
    cfg = _config("", ["res3", "res4"])
    cfg.MODEL.FPN.OUT_CHANNELS = 5
    fpn = build(cfg, _Pyramid())
    assert list(fpn.output_shape()) == levels
    maps = fpn(torch.zeros(1, 3, 64, 64))
    assert [maps[name].shape[-1] for name in levels] == [
        64 // shape.stride for shape in fpn.output_shape().values()
    ]


@pytest.mark.parametrize("build", [build_fpn, build_retinanet_fpn])
def test_features_that_any_backbone_does_not_give_are_an_error_with_near_misses(build):
    with pytest.raises(
        ValueError,
        match=r"MODEL.FPN.IN_FEATURES: .*got 'res33'. Did you mean 'res3'.*_Pyramid gives",
    ):
        build(_config("", ["res33", "res4"]), _Pyramid())


def test_stride_that_is_no_power_of_two_is_an_error():
    class Thirds(_Pyramid):
        def output_shape(self):
            return {"s3": ShapeSpec(channels=4, stride=3), "s6": ShapeSpec(channels=4, stride=6)}

    with pytest.raises(ValueError, match=r"strides must be powers of two, .*\[3, 6\]"):
        FPN(Thirds(), in_features=["s3", "s6"], out_channels=5)


def test_top_block_reads_the_bottom_up_map_where_a_level_has_the_same_name():
    class NamedAsLevels(_Pyramid):
        _out_features = ["p4", "p5"]
        _out_feature_channels = {"p4": 8, "p5": 10}
        _out_feature_strides = {"p4": 16, "p5": 32}

        def forward(self, x):
            maps = super().forward(x)
            return {"p4": maps["res4"], "p5": maps["res5"]}

    bottom_up = NamedAsLevels()
    fpn = FPN(bottom_up, ["p4", "p5"], 10, top_block=LastLevelMaxPool("p5"))
    x = torch.zeros(1, 3, 64, 96)
    # As in Detectron2.
    assert torch.equal(fpn(x)["p6"], bottom_up(x)["p5"][:, :, ::2, ::2])


def test_pyramids_of_users_own_may_check_their_strides():
    _assert_strides_are_log2_contiguous([4, 8, 16])
    with pytest.raises(AssertionError, match=r"stride 16 is not twice stride 4: \[4, 16\]"):
        _assert_strides_are_log2_contiguous([4, 16])
