"""Backbones: from images to feature maps."""

from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.build import BACKBONE_REGISTRY, build_backbone
from detkit.modeling.backbone.fpn import (
    FPN,
    LastLevelMaxPool,
    LastLevelP6P7,
    build_fpn,
    build_resnet_fpn_backbone,
    build_retinanet_fpn,
    build_retinanet_resnet_fpn_backbone,
)
from detkit.modeling.backbone.resnet import ResNet, make_stage
from detkit.modeling.backbone.resnet_blocks import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeepStem,
    DeformBottleneckBlock,
)
from detkit.modeling.backbone.resnet_config import build_resnet_backbone, make_configured_stage

__all__ = [
    "BACKBONE_REGISTRY",
    "FPN",
    "Backbone",
    "BasicBlock",
    "BasicStem",
    "BottleneckBlock",
    "DeepStem",
    "DeformBottleneckBlock",
    "LastLevelMaxPool",
    "LastLevelP6P7",
    "ResNet",
    "build_backbone",
    "build_fpn",
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_fpn",
    "build_retinanet_resnet_fpn_backbone",
    "make_configured_stage",
    "make_stage",
]
