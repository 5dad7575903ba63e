"""Transformers as backbones."""

from detkit.modeling.backbone.transformer.vit import (
    SimpleFeaturePyramid,
    ViT,
    build_simple_pyramid,
    build_vit_backbone,
    build_vit_fpn_backbone,
)

__all__ = [
    "SimpleFeaturePyramid",
    "ViT",
    "build_simple_pyramid",
    "build_vit_backbone",
    "build_vit_fpn_backbone",
]
