"""Backbones: from images to feature maps."""

from detkit.modeling.backbone.backbone import Backbone, select_features
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
from detkit.modeling.backbone.pixel_settings import (
    PixelSettings,
    follow_backbone_pixels,
    made_for_pixels,
)
from detkit.modeling.backbone.regnet import (
    RegNet,
    build_regnet_backbone,
    build_regnet_fpn_backbone,
    build_retinanet_regnet_fpn_backbone,
)
from detkit.modeling.backbone.resnet import ResNet, make_stage
from detkit.modeling.backbone.resnet_blocks import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeepStem,
    DeformBottleneckBlock,
)
from detkit.modeling.backbone.resnet_config import (
    build_resnet_backbone,
    make_configured_stage,
    stage_module,
)
from detkit.modeling.backbone.timm_backbone import (
    TimmBackbone,
    build_retinanet_timm_fpn_backbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
)
from detkit.modeling.backbone.torchvision_backbone import (
    TorchvisionBackbone,
    build_retinanet_torchvision_fpn_backbone,
    build_torchvision_backbone,
    build_torchvision_fpn_backbone,
)
from detkit.modeling.backbone.transformer import (
    MViT,
    SimpleFeaturePyramid,
    SwinTransformer,
    TimmViT,
    ViT,
    build_mvit_backbone,
    build_mvit_fpn_backbone,
    build_simple_pyramid,
    build_swin_backbone,
    build_swin_fpn_backbone,
    build_timm_vit_fpn_backbone,
    build_vit_backbone,
    build_vit_fpn_backbone,
)

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
    "MViT",
    "PixelSettings",
    "RegNet",
    "ResNet",
    "SimpleFeaturePyramid",
    "SwinTransformer",
    "TimmBackbone",
    "TimmViT",
    "TorchvisionBackbone",
    "ViT",
    "build_backbone",
    "build_fpn",
    "build_mvit_backbone",
    "build_mvit_fpn_backbone",
    "build_regnet_backbone",
    "build_regnet_fpn_backbone",
    "build_resnet_backbone",
    "build_resnet_fpn_backbone",
    "build_retinanet_fpn",
    "build_retinanet_regnet_fpn_backbone",
    "build_retinanet_resnet_fpn_backbone",
    "build_retinanet_timm_fpn_backbone",
    "build_retinanet_torchvision_fpn_backbone",
    "build_simple_pyramid",
    "build_swin_backbone",
    "build_swin_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_vit_fpn_backbone",
    "build_torchvision_backbone",
    "build_torchvision_fpn_backbone",
    "build_vit_backbone",
    "build_vit_fpn_backbone",
    "follow_backbone_pixels",
    "made_for_pixels",
    "make_configured_stage",
    "make_stage",
    "select_features",
    "stage_module",
]
