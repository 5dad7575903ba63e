import gzip
import json
from pathlib import Path

import pytest
import torch

from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint.foreign import translate, translate_for
from tests.foreign_models import as_mmdet

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = json.loads(gzip.decompress((GOLDEN / "state_dicts.json.gz").read_bytes()))


@pytest.mark.parametrize(
    ("model", "first_level"),
    [
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", 2),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", 2),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", 3),
    ],
)
def test_backbone_pyramid_and_two_stage_heads_come_back(model, first_level):
    keys = {
        n: s
        for n, s in MODELS[model]["keys"].items()
        if not n.startswith(("head.", "backbone.top_block."))
    }
    weights = {
        name: torch.tensor(float(i)).expand(shape) for i, (name, shape) in enumerate(keys.items())
    }
    translation = translate_for(as_mmdet(weights, first_level), weights)
    assert translation.layout == "MMDetection"
    assert set(translation.weights) == set(weights)
    assert all(translation.weights[name] is value for name, value in weights.items())


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("backbone.layer2.0.conv2_offset.weight", "res3.0.conv2_offset.weight"),
        ("backbone.layer2.0.conv2.conv_offset.bias", "res3.0.conv2_offset.bias"),
        ("backbone.stem.0.weight", "stem.conv1.weight"),
        ("backbone.stem.4.running_mean", "stem.conv2.norm.running_mean"),
        ("backbone.stem.7.bias", "stem.conv3.norm.bias"),
        ("backbone.layer1.0.downsample.1.weight", "res2.0.shortcut.norm.weight"),
        ("neck.fpn_convs.3.gn.weight", "fpn_output5.norm.weight"),
        ("roi_head.bbox_head.2.shared_fcs.1.weight", "roi_heads.box_head.2.fc2.weight"),
        ("roi_head.bbox_head.0.fc_cls.bias", "roi_heads.box_predictor.0.cls_score.bias"),
        ("roi_head.bbox_head.shared_convs.0.bn.weight", "roi_heads.box_head.conv1.norm.weight"),
        ("roi_head.mask_head.convs.3.conv.weight", "roi_heads.mask_head.mask_fcn4.weight"),
        ("roi_head.mask_head.upsample.weight", "roi_heads.mask_head.deconv.weight"),
        ("roi_head.mask_head.conv_logits.bias", "roi_heads.mask_head.predictor.bias"),
        ("bbox_head.retina_cls.weight", "bbox_head.retina_cls.weight"),
    ],
)
def test_spellings(theirs, ours):
    weights = {"backbone.layer1.0.conv1.weight": torch.ones(1), theirs: torch.ones(1)}
    assert ours in translate(weights).weights


def test_convolution_of_a_shortcut_is_told_from_its_norm_by_shape():
    name = "backbone.layer1.0.downsample.1.weight"  # 1 because an average pool comes first
    weights = {"backbone.layer1.0.conv1.weight": torch.ones(1), name: torch.ones(1, 1, 1, 1)}
    assert "res2.0.shortcut.weight" in translate(weights).weights


def test_pyramid_without_a_backbone_begins_at_res2():
    weights = {"neck.lateral_convs.0.conv.weight": torch.ones(256, 512, 1, 1)}
    assert set(translate(weights).weights) == {"fpn_lateral2.weight"}


def test_its_files_load_with_what_they_say_about_themselves(tmp_path):
    model = torch.nn.ModuleDict({"fpn_lateral2": torch.nn.Conv2d(2, 3, 1)})
    weights = {
        f"neck.lateral_convs.0.conv.{name}": value
        for name, value in torch.nn.Conv2d(2, 3, 1).state_dict().items()
    }
    path = tmp_path / "epoch_12.pth"
    torch.save(
        {
            "meta": {"mmdet_version": "2.28.0", "CLASSES": ("cat",), "epoch": 12},
            "state_dict": weights,
        },
        path,
    )
    DetectionCheckpointer(model).load(str(path), strict=True)
    assert torch.equal(model["fpn_lateral2"].weight, weights["neck.lateral_convs.0.conv.weight"])


def test_what_the_names_cannot_tell_is_said():
    (remark,) = translate({"backbone.layer1.0.conv1.weight": torch.ones(1)}).remarks
    assert "img_norm_cfg" in remark
    assert "STRIDE_IN_1X1" in remark
