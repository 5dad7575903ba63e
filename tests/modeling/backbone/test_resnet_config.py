import pytest
import torch
import torchvision
from torch import nn

from detkit.config import get_cfg
from detkit.layers import CheckpointedSequential, EvalBatchNorm2d, FrozenBatchNorm2d, ShapeSpec
from detkit.modeling.backbone import (
    BottleneckBlock,
    DeepStem,
    DeformBottleneckBlock,
    ResNet,
    build_backbone,
)
from detkit.modeling.backbone.resnet_blocks import PooledConv2d
from detkit.modeling.backbone.resnet_config import make_configured_stage, stage_module

ALL = ["stem", "res2", "res3", "res4", "res5"]


def _build(*options, features=("res2", "res3", "res4", "res5")) -> ResNet:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", list(features), *options])
    backbone = build_backbone(cfg)
    assert isinstance(backbone, ResNet)
    return backbone


def _name_in_torchvision(name: str) -> str:
    """Translate `res2.0.conv1.norm.weight` to `layer1.0.bn1.weight`."""
    for old, new in [("stem.conv1.norm", "bn1"), ("stem.conv1", "conv1"), ("linear", "fc")]:
        name = name.replace(old, new)
    for number in (1, 2, 3):
        name = name.replace(f"conv{number}.norm", f"bn{number}")
    for number in (2, 3, 4, 5):
        name = name.replace(f"res{number}.", f"layer{number - 1}.")
    return name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


@pytest.mark.parametrize("depth", [18, 50])
def test_features_equal_those_of_torchvision_with_the_same_weights(depth):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    ours = _build("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_IN_1X1", False).eval()
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights[_name_in_torchvision(name)] for name in ours.state_dict()})

    x = torch.randn(1, 3, 64, 96)
    want = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
    with torch.no_grad():
        got = ours(x)
        for number in (1, 2, 3, 4):
            want = getattr(theirs, f"layer{number}")(want)
            torch.testing.assert_close(got[f"res{number + 1}"], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_has_its_convolutions_and_channels(depth):
    with torch.device("meta"):
        backbone = _build("MODEL.RESNETS.DEPTH", depth)
        features = backbone(torch.empty(2, 3, 64, 96))
    first = 64 if depth < 50 else 256
    for index, (name, shape) in enumerate(backbone.output_shape().items()):
        assert shape == ShapeSpec(channels=first * 2**index, stride=4 * 2**index)
        assert features[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    layers = [
        name
        for name, m in backbone.named_modules()
        if isinstance(m, nn.Conv2d) and "shortcut" not in name
    ]
    # The depth of the paper counts the classifier.
    assert len(layers) == depth - 1


def test_res2_channels_of_shallow_depths_can_be_set():
    backbone = _build("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 16)
    assert [shape.channels for shape in backbone.output_shape().values()] == [16, 32, 64, 128]


def test_groups_and_width_set_the_bottleneck():
    with torch.device("meta"):
        backbone = _build("MODEL.RESNETS.NUM_GROUPS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 8)
    conv = backbone.get_submodule("res3.0.conv2")
    assert isinstance(conv, nn.Conv2d)
    assert (conv.groups, conv.out_channels) == (32, 512)


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_res5_keeps_stride_16(depth):
    with torch.device("meta"):
        backbone = _build("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES5_DILATION", 2)
        features = backbone(torch.empty(1, 3, 64, 64))
    assert backbone.output_shape()["res5"].stride == 16
    assert features["res5"].shape[-2:] == (4, 4)
    assert backbone.get_submodule("res5.1.conv2").dilation == (2, 2)


@pytest.mark.parametrize("modulated", [False, True])
def test_deformable_stages_are_those_asked_for(modulated):
    with torch.device("meta"):
        backbone = _build(
            *("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, False, True]),
            *("MODEL.RESNETS.DEFORM_MODULATED", modulated, "MODEL.RESNETS.DEFORM_NUM_GROUPS", 2),
            *("MODEL.RESNETS.RES5_DILATION", 2),
        )
    kinds = {name: {type(block) for block in backbone.get_submodule(name)} for name in ALL[1:]}
    deformable, plain = {DeformBottleneckBlock}, {BottleneckBlock}
    assert kinds == {"res2": plain, "res3": deformable, "res4": plain, "res5": deformable}
    offsets = backbone.get_submodule("res5.1.conv2_offset")
    assert (offsets.out_channels, offsets.dilation) == (54 if modulated else 36, (2, 2))


@pytest.mark.parametrize("features", [["res4"], ["stem"], ["res3", "stem"], ["res4", "res2"]])
def test_only_the_features_asked_for_are_given_and_later_stages_are_not_built(features):
    with torch.device("meta"):
        backbone = _build(features=features)
        outputs = backbone(torch.empty(1, 3, 32, 32))
    assert list(backbone.output_shape()) == features
    assert outputs.keys() == set(features)
    last = max(ALL.index(name) for name in features)
    assert backbone.stage_names == tuple(ALL[1 : last + 1])
    assert len(backbone.stages) == last


@pytest.mark.parametrize("freeze_at", [-1, 0, 1, 2, 3, 4, 5, 9])
def test_freeze_at_stops_that_many_parts(freeze_at):
    with torch.device("meta"):
        backbone = _build("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "BN")
    for index, name in enumerate(ALL):
        part = backbone.get_submodule(name)
        frozen = index < freeze_at
        assert all(parameter.requires_grad != frozen for parameter in part.parameters())
        assert any(isinstance(module, FrozenBatchNorm2d) for module in part.modules()) == frozen
        assert any(isinstance(module, nn.BatchNorm2d) for module in part.modules()) != frozen


def test_initialisation_is_msra():
    torch.manual_seed(0)
    conv = _build(features=["res2"]).get_submodule("res2.1.conv2")
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_input_channels_follow_the_pixel_mean():
    backbone = _build("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0, 4.0], features=["stem"])
    assert backbone(torch.randn(1, 4, 8, 8))["stem"].shape[1] == 64


TORCHVISION = [
    pytest.param("resnet18", {"DEPTH": 18}, id="resnet18"),
    pytest.param("resnet34", {"DEPTH": 34}, id="resnet34"),
    pytest.param("resnet50", {"DEPTH": 50}, id="resnet50"),
    pytest.param("resnet101", {"DEPTH": 101}, id="resnet101"),
    pytest.param("resnet152", {"DEPTH": 152}, id="resnet152"),
    pytest.param(
        "resnext50_32x4d",
        {"DEPTH": 50, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 4},
        id="resnext50_32x4d",
    ),
    pytest.param(
        "resnext101_32x8d",
        {"DEPTH": 101, "NUM_GROUPS": 32, "WIDTH_PER_GROUP": 8},
        id="resnext101_32x8d",
    ),
    pytest.param("wide_resnet50_2", {"DEPTH": 50, "WIDTH_PER_GROUP": 128}, id="wide_resnet50_2"),
    pytest.param("wide_resnet101_2", {"DEPTH": 101, "WIDTH_PER_GROUP": 128}, id="wide_resnet101_2"),
]


@pytest.mark.parametrize(("name", "settings"), TORCHVISION)
def test_architectures_of_torchvision_have_their_shapes_strides_and_groups(name, settings):
    options = [word for key, value in settings.items() for word in (f"MODEL.RESNETS.{key}", value)]
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None)
        ours = _build(*options, "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.NORM", "BN")
    shapes = {
        key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")
    }
    assert {
        _name_in_torchvision(key): value.shape for key, value in ours.state_dict().items()
    } == shapes
    for key, conv in ours.named_modules():
        if isinstance(conv, nn.Conv2d):
            other = theirs.get_submodule(_name_in_torchvision(key))
            assert (conv.stride, conv.padding, conv.groups) == (
                other.stride,
                other.padding,
                other.groups,
            )


def test_deep_stem_has_three_small_convolutions():
    backbone = _build(
        "MODEL.RESNETS.DEEP_STEM", True, "MODEL.RESNETS.STEM_OUT_CHANNELS", 32, features=["stem"]
    )
    assert isinstance(backbone.stem, DeepStem)
    shapes = [tuple(w.shape) for name, w in backbone.state_dict().items() if w.dim() == 4]
    assert shapes == [(16, 3, 3, 3), (16, 16, 3, 3), (32, 16, 3, 3)]
    assert backbone(torch.randn(1, 3, 32, 64))["stem"].shape == (1, 32, 8, 16)


@pytest.mark.parametrize("depth", [18, 50])
def test_average_pooling_takes_the_stride_of_the_shortcut(depth):
    with torch.device("meta"):
        plain = _build("MODEL.RESNETS.DEPTH", depth)
        backbone = _build("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.AVG_DOWN", True)
        features = backbone(torch.empty(1, 3, 70, 90))
        wanted = plain(torch.empty(1, 3, 70, 90))
    assert {name: f.shape for name, f in features.items()} == {
        name: f.shape for name, f in wanted.items()
    }
    assert list(backbone.state_dict()) == list(plain.state_dict())
    kinds = [
        type(backbone.get_submodule(f"{name}.0.shortcut")) is PooledConv2d
        for name in ("res3", "res4", "res5")
    ]
    assert all(kinds)
    assert not any(isinstance(m, PooledConv2d) for m in backbone.get_submodule("res2").modules())


@pytest.mark.parametrize("depth", [18, 50])
def test_strides_and_dilations_are_set_per_stage(depth):
    with torch.device("meta"):
        backbone = _build(
            *("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.STRIDE_PER_STAGE", [1, 2, 1, 1]),
            *("MODEL.RESNETS.DILATION_PER_STAGE", [1, 1, 2, 4]),
        )
        features = backbone(torch.empty(1, 3, 64, 64))
    assert [shape.stride for shape in backbone.output_shape().values()] == [4, 8, 8, 8]
    assert {name: f.shape[-1] for name, f in features.items()} == {
        "res2": 16,
        "res3": 8,
        "res4": 8,
        "res5": 8,
    }
    assert [backbone.get_submodule(f"{name}.0.conv2").dilation[0] for name in ALL[1:]] == [
        1,
        1,
        2,
        4,
    ]


def test_dilated_res5_may_be_said_in_two_ways():
    with torch.device("meta"):
        short = _build("MODEL.RESNETS.RES5_DILATION", 2)
        long = _build(
            *(
                "MODEL.RESNETS.STRIDE_PER_STAGE",
                [1, 2, 2, 1],
                "MODEL.RESNETS.DILATION_PER_STAGE",
                [1, 1, 1, 2],
            )
        )
    assert str(short) == str(long)


def test_fewer_stages_need_fewer_values():
    with torch.device("meta"):
        backbone = _build(
            *("MODEL.RESNETS.NUM_STAGES", 2, "MODEL.RESNETS.STRIDE_PER_STAGE", [2, 2]),
            features=["res3"],
        )
    assert backbone.output_shape()["res3"].stride == 16


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("norm", ["BN", "GN", "LN"])
def test_blocks_with_zero_last_norm_start_as_their_shortcut(depth, norm):
    backbone = _build(
        *(
            "MODEL.RESNETS.DEPTH",
            depth,
            "MODEL.RESNETS.NORM",
            norm,
            "MODEL.RESNETS.ZERO_INIT_LAST_NORM",
            True,
        ),
        *("MODEL.BACKBONE.FREEZE_AT", 0),
        features=["res2"],
    )
    x = torch.rand(2, backbone.get_submodule("res2.1").in_channels, 8, 8)
    torch.testing.assert_close(backbone.get_submodule("res2.1")(x), x)
    zero = [
        name
        for name, p in backbone.named_parameters()
        if name.endswith("norm.weight") and not p.any()
    ]
    last = "conv2" if depth == 18 else "conv3"
    assert zero == [f"res2.{i}.{last}.norm.weight" for i in range(2 if depth == 18 else 3)]


@pytest.mark.parametrize("norm", ["BN", "SyncBN"])
def test_norms_in_eval_mode_stay_there_and_learn(norm):
    backbone = _build(
        *("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.NORM", norm, "MODEL.RESNETS.NORM_EVAL", True),
        *("MODEL.BACKBONE.FREEZE_AT", 1),
        features=["res2"],
    ).train()
    kinds = {
        type(m) for m in backbone.get_submodule("res2").modules() if "Norm" in type(m).__name__
    }
    assert kinds == {EvalBatchNorm2d}
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.stem.modules())
    buffers = {name: b.clone() for name, b in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 32, 32))["res2"].square().sum().backward()
    assert all(torch.equal(b, buffers[name]) for name, b in backbone.named_buffers())
    assert backbone.get_parameter("res2.0.conv1.norm.weight").grad.any()


def test_checkpointed_stages_are_those_asked_for():
    with torch.device("meta"):
        backbone = _build(
            "MODEL.RESNETS.CHECKPOINT_PER_STAGE", [False, True, False, True], features=["res4"]
        )
    assert [type(stage) is CheckpointedSequential for stage in backbone.stages] == [
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN", "LN", ""])
@pytest.mark.parametrize("depth", [18, 50])
def test_every_norm_goes_with_every_kind_of_block_and_stem(norm, depth):
    options = [
        "MODEL.RESNETS.DEPTH",
        depth,
        "MODEL.RESNETS.NORM",
        norm,
        "MODEL.RESNETS.DEEP_STEM",
        True,
    ]
    with torch.device("meta"):
        backbone = _build(*options, "MODEL.RESNETS.AVG_DOWN", True, features=["res3"])
        assert backbone(torch.empty(2, 3, 32, 32))["res3"].shape[-1] == 4
    convs = [m for m in backbone.modules() if isinstance(m, nn.Conv2d)]
    assert all((conv.norm is None) == (norm == "") for conv in convs)


def test_one_stage_can_be_built_alone():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    blocks = make_configured_stage(cfg.MODEL.RESNETS, 3, 256)
    assert [(block.in_channels, block.out_channels, block.stride) for block in blocks] == [
        (256, 512, 2),
        (512, 512, 1),
    ]


def test_stage_that_is_not_there_cannot_be_built():
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NUM_STAGES = 3
    with pytest.raises(ValueError, match="MODEL.RESNETS.NUM_STAGES is 3, so that there is no res5"):
        make_configured_stage(cfg.MODEL.RESNETS, 3, 1024)


@pytest.mark.parametrize("is_on", [False, True])
def test_stage_alone_is_checkpointed_if_asked_for(is_on):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.CHECKPOINT_PER_STAGE = [False, False, False, is_on]
    stage = stage_module(cfg.MODEL.RESNETS, 3, [nn.Identity()])
    assert isinstance(stage, CheckpointedSequential) == is_on
    assert len(stage) == 1


def _set(cfg, key, value):
    *parents, leaf = key.split(".")
    for name in parents:
        cfg = cfg[name]
    cfg[leaf] = value


# Set past the config's own checks, which know the keys' ranges: constructors are called from Python as well.
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(
            {"DEPTH": 51},
            r"MODEL.RESNETS.DEPTH must be one of \[18, 34, 50, 101, 152\]: got 51",
            id="depth",
        ),
        pytest.param(
            {"OUT_FEATURES": ["res4", "re5"]},
            "MODEL.RESNETS.OUT_FEATURES .*got 're5'. Did you mean 'res5'",
            id="name",
        ),
        pytest.param(
            {"OUT_FEATURES": []}, "MODEL.RESNETS.OUT_FEATURES needs at least one", id="no feature"
        ),
        pytest.param({"NORM": "FBN"}, "MODEL.RESNETS.NORM must be one of .*got 'FBN'", id="norm"),
        pytest.param(
            {"RES5_DILATION": 3},
            "MODEL.RESNETS.RES5_DILATION must be one of .* got 3",
            id="dilation",
        ),
        pytest.param(
            {"DEFORM_ON_PER_STAGE": [True, True]},
            r"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs one value for each of .*got \[True, True\]",
            id="deformable, wrong length",
        ),
        pytest.param(
            {"DEPTH": 18, "DEFORM_ON_PER_STAGE": [False, True, True, True]},
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE must be False for depth 18",
            id="deformable basic blocks",
        ),
        pytest.param(
            {"DEFORM_ON_PER_STAGE": [False, True, False, False], "DEFORM_NUM_GROUPS": 3},
            "MODEL.RESNETS.DEFORM_NUM_GROUPS must divide the 128 channels of the bottlenecks in res3: got 3",
            id="groups of offsets",
        ),
        pytest.param(
            {"NUM_STAGES": 6},
            r"MODEL.RESNETS.NUM_STAGES must be one of \[1, 2, 3, 4, 5\]: got 6",
            id="stages",
        ),
        pytest.param(
            {"NUM_STAGES": 2, "OUT_FEATURES": ["res4"]},
            "MODEL.RESNETS.OUT_FEATURES .*got 'res4'",
            id="no such stage",
        ),
        pytest.param(
            {"STRIDE_PER_STAGE": [1, 2]},
            r"MODEL.RESNETS.STRIDE_PER_STAGE needs one value for each of res2, res3, res4, res5 .*got \[1, 2\]",
            id="strides, wrong length",
        ),
        pytest.param(
            {"DILATION_PER_STAGE": [1, 1, 1, 1, 1]},
            "MODEL.RESNETS.DILATION_PER_STAGE needs",
            id="dilations, length",
        ),
        pytest.param(
            {"CHECKPOINT_PER_STAGE": [True]},
            "MODEL.RESNETS.CHECKPOINT_PER_STAGE needs",
            id="checkpoints, length",
        ),
        pytest.param(
            {"STRIDE_PER_STAGE": [1, 2, 0, 2]},
            "MODEL.RESNETS.STRIDE_PER_STAGE must be whole numbers from 1 on",
            id="stride 0",
        ),
        pytest.param(
            {"DILATION_PER_STAGE": [1, 1, 1, "2"]},
            "DILATION_PER_STAGE must be whole .*'2'",
            id="text",
        ),
        pytest.param(
            {"CHECKPOINT_PER_STAGE": [0, 1, 1, 1]},
            "MODEL.RESNETS.CHECKPOINT_PER_STAGE must be True or False",
            id="flags",
        ),
        pytest.param(
            {"RES5_DILATION": 2, "DILATION_PER_STAGE": [1, 1, 2, 4]},
            "MODEL.RESNETS.RES5_DILATION: 2 means stride 1 and dilation 2 .*DILATION_PER_STAGE say 2 and 4",
            id="two dilations",
        ),
        pytest.param(
            {"RES5_DILATION": 2, "NUM_STAGES": 3}, "RES5_DILATION: 2 needs a res5", id="no res5"
        ),
        pytest.param(
            {"NORM_EVAL": True},
            "MODEL.RESNETS.NORM_EVAL .*got 'FrozenBN'",
            id="eval of fixed norms",
        ),
        pytest.param(
            {"NORM_EVAL": True, "NORM": "GN"}, "MODEL.RESNETS.NORM_EVAL .*got 'GN'", id="eval of GN"
        ),
        pytest.param(
            {"ZERO_INIT_LAST_NORM": True},
            "ZERO_INIT_LAST_NORM needs a norm that learns.*'FrozenBN'",
            id="zero for ever",
        ),
        pytest.param(
            {"ZERO_INIT_LAST_NORM": True, "NORM": ""},
            "ZERO_INIT_LAST_NORM needs a norm",
            id="zero nothing",
        ),
        pytest.param(
            {"DEEP_STEM": True, "STEM_OUT_CHANNELS": 33},
            "MODEL.RESNETS.STEM_OUT_CHANNELS: a deep stem needs an even number .*got 33",
            id="odd stem",
        ),
        pytest.param(
            {"NORM": "GN", "STEM_OUT_CHANNELS": 48},
            "MODEL.RESNETS.STEM_OUT_CHANNELS: norm 'GN'",
            id="GN, stem",
        ),
        pytest.param(
            {"NORM": "GN", "DEPTH": 18, "RES2_OUT_CHANNELS": 48},
            "MODEL.RESNETS, res2: norm 'GN' .*48",
            id="GN, stage",
        ),
        pytest.param(
            {"DEPTH": 18, "NUM_GROUPS": 32},
            "MODEL.RESNETS.NUM_GROUPS must be 1 for depth 18",
            id="groups of basic blocks",
        ),
        pytest.param(
            {"DEPTH": 34, "WIDTH_PER_GROUP": 8},
            "WIDTH_PER_GROUP must be 64 for depth 34",
            id="width of basic",
        ),
    ],
)
def test_bad_setting_is_an_error_that_names_the_key(settings, message):
    cfg = get_cfg()
    for key, value in settings.items():
        _set(cfg, f"MODEL.RESNETS.{key}", value)
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)
