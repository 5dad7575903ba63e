"""Transformers as backbones."""

from detkit.modeling.backbone.transformer.mvit import (
    MViT,
    build_mvit_backbone,
    build_mvit_fpn_backbone,
)
from detkit.modeling.backbone.transformer.swin import (
    SwinTransformer,
    build_swin_backbone,
    build_swin_fpn_backbone,
)
from detkit.modeling.backbone.transformer.timm_vit import TimmViT, build_timm_vit_fpn_backbone
from detkit.modeling.backbone.transformer.vit import (
    SimpleFeaturePyramid,
    ViT,
    build_simple_pyramid,
    build_vit_backbone,
    build_vit_fpn_backbone,
)

__all__ = [
    "MViT",
    "SimpleFeaturePyramid",
    "SwinTransformer",
    "TimmViT",
    "ViT",
    "build_mvit_backbone",
    "build_mvit_fpn_backbone",
    "build_simple_pyramid",
    "build_swin_backbone",
    "build_swin_fpn_backbone",
    "build_timm_vit_fpn_backbone",
    "build_vit_backbone",
    "build_vit_fpn_backbone",
]
