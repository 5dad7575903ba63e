"""The region proposal network over rotated anchors.

Source: Ma et al. 2017, arXiv 1703.01086; on a pyramid: as the upright one.
"""

import functools
from typing import Any

from detkit.config import CfgNode, configurable
from detkit.modeling.box_regression import Box2BoxTransformRotated, rotated_transform
from detkit.modeling.proposal_generator.build import PROPOSAL_GENERATOR_REGISTRY
from detkit.modeling.proposal_generator.proposals import find_top_rpn_proposals
from detkit.modeling.proposal_generator.rpn import RPN
from detkit.structures import RotatedBoxes
from detkit.utils.errors import ConfigError

find_top_rrpn_proposals = functools.partial(find_top_rpn_proposals, box_class=RotatedBoxes)
"""`find_top_rpn_proposals` of rotated boxes."""


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
    def _init_box2box_transform(cls, cfg: CfgNode) -> Box2BoxTransformRotated:
        """Build the encoding of rotated boxes as deltas."""
        return rotated_transform(cfg, cfg.MODEL.RPN.BBOX_REG_WEIGHTS)
