import pytest
import torch
import torchvision
from torch import nn

from detkit.config import get_cfg
from detkit.layers import FrozenBatchNorm2d, ShapeSpec
from detkit.modeling.backbone import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeformBottleneckBlock,
    ResNet,
    build_backbone,
    make_stage,
)

ALL = ["stem", "res2", "res3", "res4", "res5"]


def _build(*options, features=("res2", "res3", "res4", "res5")) -> ResNet:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", list(features), *options])
    backbone = build_backbone(cfg)
    assert isinstance(backbone, ResNet)
    return backbone


def _tiny(**kwargs) -> ResNet:
    stages = [
        make_stage(BasicBlock, 2, in_channels=4, out_channels=4, norm="BN"),
        make_stage(BasicBlock, 1, in_channels=4, out_channels=8, stride_per_block=[2], norm="BN"),
    ]
    return ResNet(BasicStem(3, 4), stages, **kwargs)


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
    layers = [name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d) and "shortcut" not in name]
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


@pytest.mark.parametrize("freeze_at", [0, 1, 2, 3, 4, 5])
def test_freeze_at_stops_that_many_parts(freeze_at):
    with torch.device("meta"):
        backbone = _build("MODEL.BACKBONE.FREEZE_AT", freeze_at, "MODEL.RESNETS.NORM", "BN")
    for index, name in enumerate(ALL):
        part = backbone.get_submodule(name)
        frozen = index < freeze_at
        assert all(parameter.requires_grad != frozen for parameter in part.parameters())
        assert any(isinstance(module, FrozenBatchNorm2d) for module in part.modules()) == frozen
        assert any(isinstance(module, nn.BatchNorm2d) for module in part.modules()) != frozen


def test_frozen_parts_do_not_change_in_training():
    backbone = _tiny(out_features=["res3"], freeze_at=2).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 16, 16))["res3"].sum().backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1).step()
    after = backbone.state_dict()
    changed = {name.split(".")[0] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"res3"}


def test_classifier_gives_logits():
    net = _tiny(num_classes=7)
    assert net(torch.randn(2, 3, 16, 16))["linear"].shape == (2, 7)
    assert net.output_shape() == {"linear": ShapeSpec(channels=7)}


def test_classifier_and_features_together():
    net = _tiny(num_classes=7, out_features=["res2", "linear"])
    assert {name: value.shape[1] for name, value in net(torch.randn(1, 3, 16, 16)).items()} == {"res2": 4, "linear": 7}


@pytest.mark.parametrize(("depth", "block"), [(18, BasicBlock), (50, BottleneckBlock)])
def test_default_stages_are_those_of_the_paper(depth, block):
    with torch.device("meta"):
        stages = ResNet.make_default_stages(depth, norm="FrozenBN")
        net = ResNet(BasicStem(norm="FrozenBN"), stages)
    assert all(type(b) is block for stage in stages for b in stage)
    assert [stage[0].stride for stage in stages] == [1, 2, 2, 2]
    assert net.output_shape()["res5"] == ShapeSpec(channels=512 if depth == 18 else 2048, stride=32)


def test_initialisation_is_msra():
    torch.manual_seed(0)
    conv = _build(features=["res2"]).get_submodule("res2.1.conv2")
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.03)


def test_channels_last_features_are_the_same():
    torch.manual_seed(0)
    backbone = _tiny(out_features=["res2", "res3"]).eval()
    x = torch.randn(2, 3, 32, 32)
    want = backbone(x)
    got = backbone.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    for name, value in got.items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(value, want[name])


def test_input_channels_follow_the_pixel_mean():
    backbone = _build("MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0, 4.0], features=["stem"])
    assert backbone(torch.randn(1, 4, 8, 8))["stem"].shape[1] == 64


def _set(cfg, key, value):
    *parents, leaf = key.split(".")
    for name in parents:
        cfg = cfg[name]
    cfg[leaf] = value


# Set past the config's own checks, which know the keys' ranges: constructors are called from Python as well.
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"DEPTH": 51}, r"MODEL.RESNETS.DEPTH must be one of \[18, 34, 50, 101, 152\]: got 51", id="depth"),
        pytest.param(
            {"OUT_FEATURES": ["res4", "re5"]}, "MODEL.RESNETS.OUT_FEATURES .*got 're5'. Did you mean 'res5'", id="name"
        ),
        pytest.param({"OUT_FEATURES": []}, "MODEL.RESNETS.OUT_FEATURES needs at least one", id="no feature"),
        pytest.param({"NORM": "FBN"}, "MODEL.RESNETS.NORM must be one of .*got 'FBN'", id="norm"),
        pytest.param({"RES5_DILATION": 3}, "MODEL.RESNETS.RES5_DILATION must be 1 or 2: got 3", id="dilation"),
        pytest.param(
            {"DEFORM_ON_PER_STAGE": [True, True]},
            r"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs one value for each of .*got \[True, True\]",
            id="deformable, wrong length",
        ),
        pytest.param(
            {"DEPTH": 18, "DEFORM_ON_PER_STAGE": [False, True, True, True]},
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE must be False four times for depth 18",
            id="deformable basic blocks",
        ),
        pytest.param(
            {"DEFORM_ON_PER_STAGE": [False, True, False, False], "DEFORM_NUM_GROUPS": 3},
            "MODEL.RESNETS.DEFORM_NUM_GROUPS must divide the 128 channels of the bottlenecks in res3: got 3",
            id="groups of offsets",
        ),
        pytest.param(
            {"DEPTH": 18, "NUM_GROUPS": 32},
            "MODEL.RESNETS.NUM_GROUPS must be 1 for depth 18",
            id="groups of basic blocks",
        ),
        pytest.param(
            {"DEPTH": 34, "WIDTH_PER_GROUP": 8}, "WIDTH_PER_GROUP must be 64 for depth 34", id="width of basic"
        ),
    ],
)
def test_bad_setting_is_an_error_that_names_the_key(settings, message):
    cfg = get_cfg()
    for key, value in settings.items():
        _set(cfg, f"MODEL.RESNETS.{key}", value)
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


def test_bad_freeze_at_is_an_error_that_names_the_key():
    cfg = get_cfg()
    _set(cfg, "MODEL.BACKBONE.FREEZE_AT", 6)
    with pytest.raises(ValueError, match="MODEL.BACKBONE.FREEZE_AT must be 0 to 5: got 6"):
        build_backbone(cfg)


def test_unknown_depth_of_default_stages_is_an_error():
    with pytest.raises(ValueError, match=r"depth must be one of \[18, 34"):
        ResNet.make_default_stages(20)


def test_per_block_argument_needs_a_value_for_each_block():
    with pytest.raises(ValueError, match=r"stride_per_block needs one value for each of 3 blocks: got \[1\]"):
        make_stage(BasicBlock, 3, in_channels=4, out_channels=4, stride_per_block=[1])


def test_input_that_is_no_batch_is_an_error():
    with pytest.raises(ValueError, match=r"ResNet takes images \(N, C, H, W\): got shape \(3, 8, 8\)"):
        _tiny()(torch.zeros(3, 8, 8))
