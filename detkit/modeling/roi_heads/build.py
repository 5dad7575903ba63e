"""Registries of ROI heads and their branches, and the functions that build from a config."""

from torch import nn

from detkit.config import CfgNode
from detkit.layers import ShapeSpec
from detkit.utils.registry import Registry

ROI_HEADS_REGISTRY = Registry("ROI_HEADS")
"""Called as `(cfg, input_shape: dict[str, ShapeSpec])`; see `ROIHeads`.

`forward(images, features, proposals, targets=None)` returns Instances per image and a dict of
losses.
"""

ROI_BOX_HEAD_REGISTRY = Registry("ROI_BOX_HEAD")
"""Called as `(cfg, input_shape: ShapeSpec)`.

`forward` turns pooled features (R, C, H, W) into features per region, of shape `output_shape`.
"""

ROI_MASK_HEAD_REGISTRY = Registry("ROI_MASK_HEAD")
"""Called as `(cfg, input_shape: ShapeSpec)`; see `BaseMaskRCNNHead`.

`forward(x, instances)` takes pooled features (R, C, H, W) and the regions of each image. In
training these are foreground proposals with `gt_masks`, and it returns a dict of losses. In
inference they are detections, which it returns with `pred_masks`, (M, 1, S, S) probabilities.
"""

ROI_KEYPOINT_HEAD_REGISTRY = Registry("ROI_KEYPOINT_HEAD")
"""As for masks, with `gt_keypoints` and `pred_keypoints`, (M, K, 3) as `(x, y, score)`."""


def build_roi_heads(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module:
    """Build the ROI heads that MODEL.ROI_HEADS.NAME selects, for a backbone of these features."""
    return ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)(cfg, input_shape)


def build_box_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the box head that MODEL.ROI_BOX_HEAD.NAME selects, for pooled features."""
    return ROI_BOX_HEAD_REGISTRY.get(cfg.MODEL.ROI_BOX_HEAD.NAME)(cfg, input_shape)


def build_mask_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the mask head that MODEL.ROI_MASK_HEAD.NAME selects, for pooled features."""
    return ROI_MASK_HEAD_REGISTRY.get(cfg.MODEL.ROI_MASK_HEAD.NAME)(cfg, input_shape)


def build_keypoint_head(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """Build the keypoint head that MODEL.ROI_KEYPOINT_HEAD.NAME selects, for pooled features."""
    return ROI_KEYPOINT_HEAD_REGISTRY.get(cfg.MODEL.ROI_KEYPOINT_HEAD.NAME)(cfg, input_shape)
