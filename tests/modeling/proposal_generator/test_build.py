"""Tests of detkit.modeling.proposal_generator.build."""

import pytest

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.proposal_generator import (
    RPN,
    StandardRPNHead,
    build_proposal_generator,
    build_rpn_head,
)

SHAPES = {"res4": ShapeSpec(channels=8, stride=16)}


def test_default_is_an_rpn():
    assert isinstance(build_proposal_generator(get_cfg(), SHAPES), RPN)


def test_default_head_is_the_standard_one():
    assert isinstance(build_rpn_head(get_cfg(), list(SHAPES.values())), StandardRPNHead)


def test_precomputed_proposals_need_no_generator():
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert build_proposal_generator(cfg, SHAPES) is None


def test_proposals_that_an_rpn_would_not_look_at_are_an_error():
    cfg = get_cfg()
    cfg.MODEL.LOAD_PROPOSALS = True
    with pytest.raises(
        ValueError,
        match="LOAD_PROPOSALS is True, but .*NAME is RPN.*set that to PrecomputedProposals",
    ):
        build_proposal_generator(cfg, SHAPES)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "PrecomputedProposals"
    assert build_proposal_generator(cfg, SHAPES) is None


def test_unknown_generator_offers_a_near_miss():
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "rpn"
    with pytest.raises(
        KeyError, match="'rpn' is not registered as PROPOSAL_GENERATOR. Did you mean 'RPN'"
    ):
        build_proposal_generator(cfg, SHAPES)


def test_unknown_head_offers_a_near_miss():
    cfg = get_cfg()
    cfg.MODEL.RPN.HEAD_NAME = "StandardRPNhead"
    with pytest.raises(
        KeyError, match="not registered as RPN_HEAD. Did you mean 'StandardRPNHead'"
    ):
        build_proposal_generator(cfg, SHAPES)
