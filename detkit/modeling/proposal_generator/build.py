"""Registries of proposal generators and RPN heads, and the functions that build from a config."""

from torch import nn

from detkit.config import CfgNode
from detkit.layers import ShapeSpec
from detkit.utils.errors import ConfigError
from detkit.utils.registry import Registry

PROPOSAL_GENERATOR_REGISTRY = Registry("PROPOSAL_GENERATOR")
"""Called as `(cfg, input_shape: dict[str, ShapeSpec])`.

`forward(images, features, gt_instances=None)` returns proposals (one Instances per image, with
`proposal_boxes` and `objectness_logits`) and a dict of losses.
"""

RPN_HEAD_REGISTRY = Registry("RPN_HEAD")
"""Called as `(cfg, input_shape: list[ShapeSpec])`.

`forward(features)` returns, per level, objectness logits (N, A, H, W) and deltas (N, A * box_dim,
H, W).
"""


def build_proposal_generator(cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> nn.Module | None:
    """Build the proposal generator that MODEL.PROPOSAL_GENERATOR.NAME selects.

    Args:
        cfg: The config.
        input_shape: The backbone's features.

    Returns:
        The module; None for `PrecomputedProposals`: the model takes `proposals` from its input.

    Raises:
        ConfigError: MODEL.LOAD_PROPOSALS is on, but an RPN would not use them.
    """
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if name == "PrecomputedProposals":
        return None
    if name in ("RPN", "RRPN") and cfg.MODEL.LOAD_PROPOSALS:
        raise ConfigError(
            f"MODEL.LOAD_PROPOSALS is True, but MODEL.PROPOSAL_GENERATOR.NAME is {name}, which"
            " finds its own: set that to PrecomputedProposals"
        )
    return PROPOSAL_GENERATOR_REGISTRY.get(name)(cfg, input_shape)


def build_rpn_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> nn.Module:
    """Build the head that MODEL.RPN.HEAD_NAME selects, for features of these shapes."""
    return RPN_HEAD_REGISTRY.get(cfg.MODEL.RPN.HEAD_NAME)(cfg, input_shape)
