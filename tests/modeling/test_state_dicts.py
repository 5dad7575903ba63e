"""Names and shapes of whole models, held against those that Detectron2 0.6 gives (tests/golden/state_dicts.json.gz)."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from detkit.config import get_cfg
from detkit.modeling import META_ARCH_REGISTRY

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml",
    "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml",
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "PascalVOC-Detection/faster_rcnn_R_50_FPN.yaml",
    "Detectron1-Comparisons/faster_rcnn_R_50_FPN_noaug_1x.yaml",
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
    "COCO-Detection/faster_rcnn_R_101_C4_3x.yaml",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    "COCO-Detection/faster_rcnn_R_101_DC5_3x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_101_FPN_3x.yaml",
    "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_101_DC5_3x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_giou.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/cascade_mask_rcnn_X_152_32x8d_FPN_IN5k_gn_dconv.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "Cityscapes/mask_rcnn_R_50_FPN.yaml",
    "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/mask_rcnn_R_50_FPN_1x_cls_agnostic.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml",
]
RECORDED = json.loads(gzip.decompress((ROOT / "tests/golden/state_dicts.json.gz").read_bytes()))


def build(config_file):
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / config_file))
    with torch.device("meta"):  # shapes without memory
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


@pytest.mark.parametrize("config_file", CONFIGS)
def test_names_and_shapes_are_those_of_detectron2(config_file):
    state = {name: list(t.shape) for name, t in build(config_file).state_dict().items()}
    recorded = RECORDED[config_file]["keys"]
    assert set(state) == set(recorded)
    assert {name: (shape, recorded[name]) for name, shape in state.items() if shape != recorded[name]} == {}


@pytest.mark.parametrize("config_file", CONFIGS)
def test_trained_parameters_are_those_of_detectron2(config_file):
    trained = {name for name, p in build(config_file).named_parameters() if p.requires_grad}
    assert trained == set(RECORDED[config_file]["trainable"])
