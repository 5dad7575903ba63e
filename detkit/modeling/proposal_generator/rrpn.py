"""The region proposal network over rotated anchors.

Source: Ma et al. 2017, arXiv 1703.01086; on a pyramid: as the upright one.

Legend: N images, L levels, R_l anchors of level l.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.box_regression import Box2BoxTransformRotated, rotated_transform
from detkit.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detkit.modeling.proposal_generator.proposals import find_top_rpn_proposals
from detkit.modeling.proposal_generator.rpn import RPN
from detkit.structures import Instances, RotatedBoxes
from detkit.utils.errors import ConfigError


@PROPOSAL_GENERATOR_REGISTRY.register()
class RRPN(RPN):
    """`RPN` of rotated boxes, on any number of levels.

    Ground truth, anchors and proposals are `RotatedBoxes`. Proposals are clipped to the image only
    where they are nearly upright; see `RotatedBoxes.clip`.
    """

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Set the parts, with the arguments of `RPN`.

        Raises:
            ConfigError: The anchors are upright.
        """
        super().__init__(**kwargs)
        if self.anchor_generator.box_dim != 5:
            raise ConfigError(
                "RRPN refines rotated anchors: set MODEL.ANCHOR_GENERATOR.NAME to"
                f" RotatedAnchorGenerator, got a {type(self.anchor_generator).__name__}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments."""
        return super().from_config(cfg, input_shape)

    @classmethod
    def _init_box2box_transform(cls, cfg: CfgNode) -> Box2BoxTransformRotated:
        """Build the encoding of rotated boxes as deltas."""
        return rotated_transform(cfg, cfg.MODEL.RPN.BBOX_REG_WEIGHTS)


def find_top_rrpn_proposals(
    proposals: Sequence[Tensor],
    pred_objectness_logits: Sequence[Tensor],
    image_sizes: Sequence[tuple[int, int]],
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
    training: bool,
) -> list[Instances]:
    """Return the best rotated proposals of every image, from the boxes of all anchors.

    `RRPN` itself decodes the boxes of the best anchors only.

    Args:
        proposals: Per level (N, R_l, 5).
        pred_objectness_logits: Per level (N, R_l).
        image_sizes: N times (height, width).
        nms_thresh: IoU above which the lower-scored of two boxes of a level is suppressed.
        pre_nms_topk: At most this many boxes of a level.
        post_nms_topk: At most this many proposals per image.
        min_box_size: Boxes must be wider and higher than this, in pixels, after clipping.
        training: Whether numbers that are not finite raise an error. In inference they are dropped.

    Returns:
        N Instances with `proposal_boxes` and `objectness_logits`, best first.
    """
    return find_top_rpn_proposals(
        proposals,
        pred_objectness_logits,
        image_sizes,
        nms_thresh,
        pre_nms_topk,
        post_nms_topk,
        min_box_size,
        training,
        box_class=RotatedBoxes,
    )
