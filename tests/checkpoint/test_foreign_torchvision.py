import re

import pytest
import torch

from detkit.checkpoint import CheckpointError, DetectionCheckpointer
from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.backbone import build_resnet_backbone
from tests.foreign_models import random_torchvision_model

STAGES = {"res2": "layer1", "res3": "layer2", "res4": "layer3", "res5": "layer4"}


def detkit_resnet(depth, groups=1, width=64, **settings):
    cfg = get_cfg()
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.NUM_GROUPS, resnets.WIDTH_PER_GROUP = depth, groups, width
    resnets.STRIDE_IN_1X1 = False
    resnets.OUT_FEATURES = list(STAGES)
    for key, value in settings.items():
        resnets[key] = value
    return build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()


def torchvision_stages(model, images):
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    features = {}
    for name, layer in STAGES.items():
        features[name] = x = getattr(model, layer)(x)
    return features


def saved(model, tmp_path, **extra):
    path = tmp_path / "weights.pth"
    torch.save({**model.state_dict(), **extra}, path)
    return str(path)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_norms_of_either_kind_take_the_statistics(norm, tmp_path):
    check_features("resnet18", 18, 1, 64, tmp_path, NORM=norm)


@pytest.mark.parametrize(
    ("name", "depth", "groups", "width"),
    [
        ("resnet18", 18, 1, 64),
        ("resnet34", 34, 1, 64),
        ("resnet50", 50, 1, 64),
        ("resnext50_32x4d", 50, 32, 4),
        pytest.param("resnet101", 101, 1, 64, marks=pytest.mark.slow),
        pytest.param("resnet152", 152, 1, 64, marks=pytest.mark.slow),
        pytest.param("resnext101_32x8d", 101, 32, 8, marks=pytest.mark.slow),
        pytest.param("wide_resnet50_2", 50, 1, 128, marks=pytest.mark.slow),
        pytest.param("wide_resnet101_2", 101, 1, 128, marks=pytest.mark.slow),
    ],
)
def test_features_equal_torchvisions(name, depth, groups, width, tmp_path):
    check_features(name, depth, groups, width, tmp_path)


def check_features(name, depth, groups, width, tmp_path, **settings):
    theirs, ours = random_torchvision_model(name), detkit_resnet(depth, groups, width, **settings)
    checkpointer = DetectionCheckpointer(ours)
    checkpointer.load(saved(theirs, tmp_path), strict=True)
    assert checkpointer.load_report.unexpected == ("linear.weight", "linear.bias")
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        wanted, got = torchvision_stages(theirs, images), ours(images)
    for stage, features in wanted.items():
        scale = features.abs().max()
        assert scale > 0.1, "a test on features of nothing but zeros would say nothing"
        torch.testing.assert_close(got[stage] / scale, features / scale, rtol=0, atol=1e-5)


def test_wrong_stride_placement_is_told(tmp_path, caplog):
    path = saved(random_torchvision_model("resnet50"), tmp_path)
    DetectionCheckpointer(detkit_resnet(50)).load(path)
    assert "STRIDE_IN_1X1" not in caplog.text
    DetectionCheckpointer(detkit_resnet(50, STRIDE_IN_1X1=True)).load(path)
    assert re.search(r"stride in the 3x3 convolution.*set MODEL\.RESNETS\.STRIDE_IN_1X1 False", caplog.text)


@pytest.mark.parametrize(("file", "model"), [("resnet18", 34), ("resnet34", 18), ("resnet34", 50)])
def test_weights_of_another_depth_are_an_error(file, model, tmp_path):
    path = saved(random_torchvision_model(file), tmp_path)
    with pytest.raises(CheckpointError, match=r"weights\.pth holds weights of a ResNet of another depth: res2 has \d"):
        DetectionCheckpointer(detkit_resnet(model)).load(path)
