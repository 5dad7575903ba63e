"""Registries of ROI heads and their branches, and the functions that build what a config names."""

from torch import nn

from detkit.config import CfgNode
from detkit.layers import ShapeSpec
from detkit.utils.registry import Registry

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
"""Called as `(cfg, input_shape: dict[str, ShapeSpec])`. `forward(images, features, proposals, targets=None)` gives
Instances per image and a dict of losses."""

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
"""Called as `(cfg, input_shape: ShapeSpec)`. `forward` turns pooled features (R, C, H, W) into features per region, of
the shape that its `output_shape` names."""

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
"""Called as `(cfg, input_shape: ShapeSpec)`. `forward(x, instances)` takes pooled features (R, C, H, W) and the regions
of each image: foreground proposals with `gt_masks` in training, for which it gives a dict of
losses; else detections, which it gives back with the field `pred_masks`, (M, 1, S, S)
probabilities."""

ROI_KEYPOINT_HEAD_REGISTRY = Registry("ROI_KEYPOINT_HEAD")
"""As for masks, with `gt_keypoints` and `pred_keypoints`, (M, K, 3) as `(x, y, score)`."""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the ROI heads that MODEL.ROI_HEADS.NAME selects, for a backbone of these features."""
    return ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, input_shape)


def build_box_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the box head that MODEL.ROI_BOX_HEAD.NAME selects, for pooled features of this shape."""
    return ROI_BOX_HEAD_REGISTRY.get(cfg.MODEL.ROI_BOX_HEAD.NAME)(cfg, input_shape)


def build_mask_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the mask head that MODEL.ROI_MASK_HEAD.NAME selects, for pooled features of this shape."""
    return ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)(cfg, input_shape)


def build_keypoint_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the keypoint head that MODEL.ROI_KEYPOINT_HEAD.NAME selects, for pooled features of
    this shape.
    """
    return ROI_KEYPOINT_HEAD_REGISTRY.get(cfg.MODEL.ROI_KEYPOINT_HEAD.NAME)(cfg, input_shape)
