"""Fast R-CNN of rotated boxes.

Source: Ma et al. 2017, arXiv 1703.01086, with the regions of `ROIAlignRotated`.
"""

import functools
from typing import Any

from detkit.config import CfgNode
from detkit.layers import ShapeSpec
from detkit.modeling.box_regression import Box2BoxTransformRotated, rotated_transform
from detkit.modeling.roi_heads.build import ROI_HEADS_REGISTRY, build_box_head
from detkit.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    fast_rcnn_inference,
    fast_rcnn_inference_single_image,
)
from detkit.modeling.roi_heads.standard_roi_heads import StandardROIHeads, build_pooler
from detkit.structures import RotatedBoxes
from detkit.utils.errors import ConfigError

fast_rcnn_inference_rotated = functools.partial(fast_rcnn_inference, box_class=RotatedBoxes)
"""`fast_rcnn_inference` of rotated boxes."""

fast_rcnn_inference_single_image_rotated = functools.partial(
    fast_rcnn_inference_single_image, box_class=RotatedBoxes
)
"""The same for one image."""


class RotatedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """`FastRCNNOutputLayers` with five deltas per box."""

    @classmethod
    def _init_box2box_transform(cls, cfg: CfgNode) -> Box2BoxTransformRotated:
        """Build the encoding of rotated boxes as deltas."""
        return rotated_transform(cfg, cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS)


@ROI_HEADS_REGISTRY.register()
class RROIHeads(StandardROIHeads):
    """`StandardROIHeads` of rotated boxes, on any number of levels; without masks or keypoints.

    Proposals, ground truth and detections are `RotatedBoxes`.
    """

    @classmethod
    def _init_box_head(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Build the parts of the box branch.

        Raises:
            ConfigError: A setting asks for a branch or a pooler of upright boxes.
        """
        for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON"):
            if cfg.get_by_full_key(key):
                raise ConfigError(f"{key} is True, but RROIHeads only have boxes: set it to False")
        if cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE != "ROIAlignRotated":
            raise ConfigError(
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE must be ROIAlignRotated for RROIHeads, got"
                f" {cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE}"
            )
        pooler, pooled_shape = build_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, input_shape)
        head = build_box_head(cfg, pooled_shape)
        return {
            "box_in_features": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "box_pooler": pooler,
            "box_head": head,
            "box_predictor": RotatedFastRCNNOutputLayers(cfg, head.output_shape),
        }
