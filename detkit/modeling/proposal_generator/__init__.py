"""Where objects may be: class-agnostic boxes for the ROI heads."""

from detkit.modeling.proposal_generator.build import (
    PROPOSAL_GENERATOR_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_proposal_generator,
    build_rpn_head,
)
from detkit.modeling.proposal_generator.proposals import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detkit.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detkit.modeling.proposal_generator.rrpn import RRPN, find_top_rrpn_proposals

__all__ = [
    "PROPOSAL_GENERATOR_REGISTRY",
    "RPN",
    "RPN_HEAD_REGISTRY",
    "RRPN",
    "StandardRPNHead",
    "add_ground_truth_to_proposals",
    "build_proposal_generator",
    "build_rpn_head",
    "find_top_rpn_proposals",
    "find_top_rrpn_proposals",
]
