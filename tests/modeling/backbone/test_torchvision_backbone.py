import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from detkit.config import get_cfg
from detkit.layers import FrozenBatchNorm2d, ShapeSpec
from detkit.modeling import follow_backbone_pixels
from detkit.modeling.backbone import TorchvisionBackbone, build_backbone
from detkit.modeling.backbone.torchvision_backbone import stage_nodes
from detkit.utils.errors import ConfigError

STAGES = ["s4", "s8", "s16", "s32"]
# Channels of s4 to s32, as the papers and torchvision's code give them.
SMALL = {
    "resnet18": [64, 128, 256, 512],
    "mobilenet_v2": [24, 32, 96, 1280],
    "mobilenet_v3_large": [24, 40, 112, 960],
    "efficientnet_b0": [24, 40, 112, 1280],
    "regnet_y_400mf": [48, 104, 208, 440],
}
LARGE = {
    "resnet34": [64, 128, 256, 512],
    "resnet50": [256, 512, 1024, 2048],
    "resnext50_32x4d": [256, 512, 1024, 2048],
    "wide_resnet50_2": [256, 512, 1024, 2048],
    "convnext_tiny": [96, 192, 384, 768],
    "swin_t": [96, 192, 384, 768],
    "densenet121": [256, 512, 1024, 1024],
    "shufflenet_v2_x0_5": [24, 48, 96, 1024],
    "vgg11": [256, 512, 512, 512],
    "googlenet": [192, 480, 832, 1024],
}
MODELS = [*SMALL.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in LARGE.items())]


def _tiny(name="mobilenet_v3_small", **kwargs) -> TorchvisionBackbone:
    return TorchvisionBackbone(**{"name": name, "out_features": STAGES, **kwargs})


def _config(*options, name="build_torchvision_fpn_backbone"):
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", name, "MODEL.TORCHVISION.NAME", "mobilenet_v3_small"]
    )
    cfg.merge_from_list(
        [
            "MODEL.FPN.IN_FEATURES",
            STAGES,
            "MODEL.FPN.OUT_CHANNELS",
            8,
            "MODEL.BACKBONE.FREEZE_AT",
            0,
        ]
    )
    cfg.merge_from_list(list(options))
    follow_backbone_pixels(cfg)
    return cfg


@pytest.mark.parametrize(("name", "channels"), MODELS)
def test_stages_are_found_and_every_parameter_trains(name, channels):
    backbone = _tiny(name).train()
    assert backbone.output_shape() == {
        f: ShapeSpec(channels=c, stride=s)
        for f, c, s in zip(STAGES, channels, (4, 8, 16, 32), strict=True)
    }
    assert backbone.size_divisibility == 32
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert [tuple(maps[f].shape) for f in STAGES] == [
        (2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
    ]
    sum(value.square().mean() for value in maps.values()).backward()
    assert [
        n for n, p in backbone.named_parameters() if p.requires_grad != (p.grad is not None)
    ] == []
    # ResNets without a bias before the norm and the like: nothing is left out by mistake.
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        pytest.param("resnet18", ["layer1", "layer2", "layer3", "layer4"], id="stages are modules"),
        pytest.param(
            "mobilenet_v2",
            ["features.3", "features.6", "features.13", "features.18"],
            id="blocks in a row",
        ),
        pytest.param(
            "swin_t", ["features.1", "features.3", "features.5", "permute"], id="channels last"
        ),
    ],
)
def test_maps_are_the_outputs_of_the_modules_that_end_the_stages(name, modules):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    backbone = _tiny(name).eval()
    weights = model.state_dict()
    backbone.body.load_state_dict({key: weights[key] for key in backbone.body.state_dict()})
    seen = {}
    for module in modules:
        model.get_submodule(module).register_forward_hook(
            lambda _, __, out, m=module: seen.update({m: out.clone()})
        )
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        model(image)
        maps = backbone(image)
    for module, (feature, value) in zip(modules, maps.items(), strict=True):
        want = seen[module]
        if want.shape != value.shape:  # Swin computes with channels last
            want = want.permute(0, 3, 1, 2)
        assert torch.equal(value, want), feature


def test_node_within_the_next_stage_is_not_taken():
    # The first 1x1 convolution of a block still has the stride of the stage before, with six times the channels.
    nodes = stage_nodes(torchvision.models.mobilenet_v2(weights=None), "mobilenet_v2")
    assert [(node, feature.channels) for node, feature in nodes.items()][1:3] == [
        ("features.3.add", 24),
        ("features.6.add", 32),
    ]


@pytest.mark.parametrize("features", [["s8"], ["s16", "s4"], ["s2"]])
def test_only_the_features_asked_for_are_given_and_later_layers_are_not_there(features):
    backbone = _tiny(out_features=features)
    assert list(backbone.output_shape()) == features
    maps = backbone(torch.zeros(1, 3, 64, 64))
    assert list(maps) == features
    sum(value.sum() for value in maps.values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert not any("classifier" in name for name in backbone.state_dict())
    assert backbone.size_divisibility == max(
        shape.stride for shape in backbone.output_shape().values()
    )


def test_modes_switch_dropout_and_statistics():
    backbone = _tiny("efficientnet_b0", out_features=["s16"])  # has stochastic depth
    torch.manual_seed(0)
    image = torch.randn(8, 3, 32, 32)
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    with torch.no_grad():
        backbone.eval()
        assert torch.equal(backbone(image)["s16"], backbone(image)["s16"])
        assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
        backbone.train()
        assert not torch.equal(backbone(image)["s16"], backbone(image)["s16"])
        assert any(not torch.equal(value, before[name]) for name, value in backbone.named_buffers())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))], ids=["deepcopy", "pickle"]
)
def test_copy_computes_the_same_in_the_same_mode(copied):
    backbone = _tiny().eval()
    image = torch.randn(1, 3, 64, 64)
    other = copied(backbone)
    assert torch.equal(other(image)["s32"], backbone(image)["s32"])
    other.train()
    assert not backbone.training


@pytest.mark.parametrize(
    ("freeze_at", "frozen"),
    [
        (0, []),
        (1, ["conv1", "bn1"]),
        (2, ["conv1", "bn1", "layer1"]),
        (3, ["conv1", "bn1", "layer1", "layer2"]),
        (5, ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
    ],
)
def test_freeze_at_counts_as_for_a_resnet(freeze_at, frozen):
    backbone = _tiny("resnet18", freeze_at=freeze_at)
    for name, module in backbone.body.named_children():
        assert all(p.requires_grad is (name not in frozen) for p in module.parameters()), name
        norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d)]
        assert all(isinstance(m, FrozenBatchNorm2d) is (name in frozen) for m in norms), name


def test_frozen_stages_do_not_change_in_training():
    backbone = _tiny(freeze_at=3).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))["s32"].mean().backward()
    torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1).step()
    changed = {int(name.split(".")[2]) for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}  # fmt: skip
    assert min(changed) == 4  # s8 ends with features.3


@pytest.mark.parametrize(("norm", "frozen"), [("", False), ("FrozenBN", True), ("SyncBN", False)])
def test_norm_setting(norm, frozen):
    backbone = _tiny(norm=norm)
    names = set(_tiny().state_dict())
    assert any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules()) is frozen
    assert any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules()) is not frozen
    assert set(backbone.state_dict()) == names


def test_norms_over_all_processes_take_over_the_settings(monkeypatch):
    monkeypatch.setattr("detkit.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    backbone, own = _tiny(norm="SyncBN", freeze_at=1), _tiny(freeze_at=1)
    norms = [module for module in backbone.modules() if "Sync" in type(module).__name__]
    theirs = [module for module in own.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == len(theirs) > 0
    assert [(norm.eps, norm.momentum) for norm in norms] == [
        (norm.eps, norm.momentum) for norm in theirs
    ]


def _publish(tmp_path, monkeypatch, model: nn.Module, enum) -> None:
    """Lie a model's weights where torch.hub would have downloaded them to, and forbid to download."""
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / enum.url.rsplit("/", 1)[1])


@pytest.mark.parametrize("norm", ["", "FrozenBN"])
def test_published_weights_are_taken(tmp_path, monkeypatch, norm):
    enum = torchvision.models.MobileNet_V3_Small_Weights.IMAGENET1K_V1
    model = torchvision.models.mobilenet_v3_small(weights=None).eval()
    _publish(tmp_path, monkeypatch, model, enum)
    backbone = _tiny(weights="DEFAULT", norm=norm).eval()
    assert (
        backbone.load_initial_weights() == "torchvision's MobileNet_V3_Small_Weights.IMAGENET1K_V1"
    )
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(image)["s32"], model.features(image))


@pytest.mark.slow
def test_old_names_of_densenet_are_understood(tmp_path, monkeypatch):
    model = torchvision.models.densenet121(weights=None).eval()
    _publish(tmp_path, monkeypatch, model, torchvision.models.DenseNet121_Weights.DEFAULT)
    (path,) = (tmp_path / "hub" / "checkpoints").iterdir()
    old = {
        n.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): v
        for n, v in model.state_dict().items()
    }
    torch.save(old, path)
    backbone = _tiny("densenet121", weights="DEFAULT", out_features=["s4"])
    assert backbone.load_initial_weights()
    key = "features.denseblock1.denselayer1.norm1.weight"
    assert torch.equal(backbone.body.state_dict()[key], model.state_dict()[key])


def test_weights_without_some_tensors_are_an_error(tmp_path, monkeypatch):
    _publish(
        tmp_path,
        monkeypatch,
        nn.Linear(1, 1),
        torchvision.models.MobileNet_V3_Small_Weights.DEFAULT,
    )
    with pytest.raises(
        ValueError,
        match=r"torchvision's MobileNet.* lacks \d+ of \d+ tensors: features.0.0.weight, ",
    ):
        _tiny(weights="DEFAULT").load_initial_weights()


def test_weights_that_are_not_there_offline_name_file_and_place(tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    backbone = _tiny(weights="IMAGENET1K_V1")  # nothing is looked for when it is built
    with pytest.raises(
        OSError,
        match=r"download https://download\S+ on .*, and place it as .*mobilenet_v3_small-\w+.pth",
    ):
        backbone.load_initial_weights()


@pytest.mark.parametrize("freeze_at", [0, 2])
def test_frozen_random_weights_warn(freeze_at, caplog):
    assert _tiny(freeze_at=freeze_at).load_initial_weights() == ""
    assert ("starts from random weights, and" in caplog.text) is (freeze_at > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["NAME", "resnet51"], "TORCHVISION.NAME: torchvision has no .* 'resnet51'. Did you mean 'resnet", id="name"),
        pytest.param(["NAME", "fasterrcnn_resnet50_fpn"], "no classification model 'fasterrcnn", id="no classifier"),
        pytest.param(["NAME", "vit_b_16"], r"'vit_b_16' does not run on an image of 256x384 \(Wrong image h", id="fixed size"),
        pytest.param(["NAME", "squeezenet1_1"], "'squeezenet1_1' gives no maps of 1/2, 1/4", id="no padding"),
        pytest.param(["WEIGHTS", "IMAGENET1K_V11"], r"TORCHVISION.WEIGHTS: mobilenet_v3_small has \['IMAGENET1K_V1', 'DEFAULT'\], got 'IMAGENET1K_V11'. Did you mean 'IMAGENET1K_V1'", id="weights"),
        pytest.param(["OUT_FEATURES", ["s4", "res5"]], r"out_features must be of \['s2', .*'s32'\]: got 'res5'.*MODEL.TORCHVISION.OUT_FEATURES", id="feature"),
        pytest.param(["OUT_FEATURES", []], "out_features needs at least one.*MODEL.TORCHVISION.OUT_FEATURES", id="no feature"),
        pytest.param(["NAME", "vgg11", "NORM", "FrozenBN"], "norm 'FrozenBN' is for batch norms, which this model.*MODEL.TORCHVISION.NORM", id="no batch norm"),
    ],
)  # fmt: skip
def test_bad_setting_is_an_error(options, message):
    options = [
        f"MODEL.TORCHVISION.{word}" if word in ("NAME", "WEIGHTS", "OUT_FEATURES", "NORM") else word
        for word in options
    ]
    with pytest.raises(ValueError, match=message):
        build_backbone(_config(*options, name="build_torchvision_backbone"))


def test_images_of_other_channels_are_an_error():
    with pytest.raises(
        ValueError, match="torchvision's models take images of 3 channels, MODEL.PIXEL_MEAN has 1"
    ):
        build_backbone(_config("MODEL.PIXEL_MEAN", [1.0], "MODEL.PIXEL_STD", [1.0]))


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("build_torchvision_fpn_backbone", ["p3", "p4", "p5"]),
        ("build_retinanet_torchvision_fpn_backbone", ["p3", "p4", "p5", "p6"]),
    ],
)
def test_pyramid_leaves_out_what_it_does_not_merge(name, levels):
    backbone = build_backbone(_config("MODEL.FPN.IN_FEATURES", ["s8", "s16"], name=name)).train()
    assert list(backbone.output_shape()) == levels
    sum(value.sum() for value in backbone(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_feature_that_the_model_does_not_give_to_the_pyramid_is_an_error():
    with pytest.raises(ValueError, match=r"MODEL.FPN.IN_FEATURES: in_features must be of \['s4', 's8', 's16', 's32'\]: got 's64'"):  # fmt: skip
        build_backbone(_config("MODEL.FPN.IN_FEATURES", ["s32", "s64"]))


@pytest.mark.parametrize(
    ("weights", "name"), [("", "resnet18"), ("DEFAULT", "resnet18"), ("IMAGENET1K_V1", "swin_t")]
)
def test_pixels_follow_the_published_weights(weights, name):
    cfg = _config("MODEL.TORCHVISION.NAME", name, "MODEL.TORCHVISION.WEIGHTS", weights)
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53]
    assert cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def test_weights_made_for_other_statistics_bring_them():
    assert _config("MODEL.TORCHVISION.NAME", "efficientnet_v2_l").MODEL.PIXEL_STD == [
        127.5,
        127.5,
        127.5,
    ]


def test_stage_of_a_parameter_is_the_finest_map_that_depends_on_it():
    backbone = _tiny(name="resnet18")
    stages = backbone.parameter_stages()
    assert set(stages) == {name for name, p in backbone.named_parameters() if p.requires_grad}
    of_layer = {stages[name] for name in stages if name.startswith("body.layer3")}
    assert of_layer == {stages["body.layer2.0.conv1.weight"] + 1}
    assert stages["body.conv1.weight"] == 0


def test_named_nodes_are_those_of_torchvisions_getter():
    theirs = torchvision.models.resnet18(weights=None).eval()
    getter = IntermediateLayerGetter(theirs, {"layer1": "feat1", "layer3": "feat2"})
    ours = _tiny(
        "resnet18",
        out_features=["feat1", "feat2"],
        nodes=[["layer1", "feat1"], ["layer3", "feat2"]],
    ).eval()
    ours.body.load_state_dict(getter.state_dict())  # and nothing of layer4
    assert {name: (s.channels, s.stride) for name, s in ours.output_shape().items()} == {
        "feat1": (64, 4),
        "feat2": (256, 16),
    }
    image = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        for (name, value), expected in zip(
            ours(image).items(), getter(image).values(), strict=True
        ):
            torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize(
    ("name", "node", "channels", "stride"),
    [
        ("alexnet", "features", 256, 32),
        ("squeezenet1_1", "features", 512, 16),
        ("mobilenet_v3_small", "features.3.block", 24, 8),
        pytest.param("inception_v3", "Mixed_7c", 2048, 32, marks=pytest.mark.slow),
    ],
)
def test_named_node_may_be_of_a_model_without_padding(name, node, channels, stride):
    ours = _tiny(name, out_features=["map"], nodes=[[node, "map"]]).eval()
    assert ours.output_shape() == {"map": ShapeSpec(channels=channels, stride=stride)}
    if node == "features":
        part = torchvision.models.get_model(name, weights=None).features.eval()
        state = ours.body.state_dict()
        part.load_state_dict({n.removeprefix("features."): state[n] for n in state})
        image = torch.rand(1, 3, 128, 160)
        with torch.no_grad():
            torch.testing.assert_close(ours(image)["map"], part(image))


def test_nodes_come_from_the_config_and_go_into_a_pyramid():
    nodes = [["features.0", "low"], ["features.1", "middle"], ["features.8", "high"]]
    cfg = _config("MODEL.TORCHVISION.NODES", nodes, "MODEL.FPN.IN_FEATURES", ["low", "high"])
    fpn = build_backbone(cfg)
    assert list(fpn.bottom_up.output_shape()) == ["low", "high"]
    maps = fpn(torch.rand(1, 3, 64, 64))
    assert {name: value.shape[-1] for name, value in maps.items()} == {"p1": 32, "p4": 4, "p5": 2}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([["layer9", "x"]], "the model has no node 'layer9'. Did you mean 'layer"),
        ([["avgpool", "x"]], "'x' is no map of 1/2, .* shape .*512, 1, 1"),
        (["layer1"], r"NODES must be pairs \[node of the model, name\]: got 'layer1'"),
        ([["x", "map"]], "the model has no node 'x'"),  # the image itself
        ([["layer1", "a"], ["layer2", "a"]], "neither may appear twice: got .*layer2"),
        ([["layer1", "a"], ["layer1", "b"]], "neither may appear twice: got .*'b'"),
        ([["layer1", ""]], "each needs a name"),
    ],
)
def test_bad_node_is_an_error(nodes, message):
    cfg = _config("MODEL.TORCHVISION.NAME", "resnet18", "MODEL.TORCHVISION.NODES", nodes)
    with pytest.raises(ValueError, match=message):
        build_backbone(cfg)


@pytest.mark.parametrize(
    ("name", "node"), [("vit_b_16", "encoder.ln"), ("maxvit_t", "blocks.0")], ids=["vit", "maxvit"]
)
def test_named_node_of_a_model_for_images_of_one_size_is_an_error(name, node, capfd):
    cfg = _config("MODEL.TORCHVISION.NAME", name, "MODEL.TORCHVISION.NODES", [[node, "map"]])
    with pytest.raises(ConfigError, match=f"'{name}' does not run on an image of 256x384"):
        build_backbone(cfg)
    assert "Traceback" not in capfd.readouterr().err
