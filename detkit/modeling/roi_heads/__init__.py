"""What is in each proposed region: classes, refined boxes, masks, keypoints."""

from detkit.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detkit.modeling.roi_heads.build import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    build_box_head,
    build_keypoint_head,
    build_mask_head,
    build_roi_heads,
)
from detkit.modeling.roi_heads.cascade_rcnn import CascadeROIHeads
from detkit.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, fast_rcnn_inference
from detkit.modeling.roi_heads.keypoint_head import (
    BaseKeypointRCNNHead,
    KRCNNConvDeconvUpsampleHead,
)
from detkit.modeling.roi_heads.mask_head import BaseMaskRCNNHead, MaskRCNNConvUpsampleHead
from detkit.modeling.roi_heads.res5_roi_heads import Res5ROIHeads
from detkit.modeling.roi_heads.roi_heads import (
    ROIHeads,
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detkit.modeling.roi_heads.rotated_fast_rcnn import (
    RotatedFastRCNNOutputLayers,
    RROIHeads,
    fast_rcnn_inference_rotated,
)
from detkit.modeling.roi_heads.standard_roi_heads import StandardROIHeads

__all__ = [
    "ROI_BOX_HEAD_REGISTRY",
    "ROI_HEADS_REGISTRY",
    "ROI_KEYPOINT_HEAD_REGISTRY",
    "ROI_MASK_HEAD_REGISTRY",
    "BaseKeypointRCNNHead",
    "BaseMaskRCNNHead",
    "CascadeROIHeads",
    "FastRCNNConvFCHead",
    "FastRCNNOutputLayers",
    "KRCNNConvDeconvUpsampleHead",
    "MaskRCNNConvUpsampleHead",
    "ROIHeads",
    "RROIHeads",
    "Res5ROIHeads",
    "RotatedFastRCNNOutputLayers",
    "StandardROIHeads",
    "build_box_head",
    "build_keypoint_head",
    "build_mask_head",
    "build_roi_heads",
    "fast_rcnn_inference",
    "fast_rcnn_inference_rotated",
    "select_foreground_proposals",
    "select_proposals_with_visible_keypoints",
]
