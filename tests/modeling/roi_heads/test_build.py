"""Tests of detkit.modeling.roi_heads.build."""

import pytest

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.roi_heads import FastRCNNConvFCHead, build_box_head, build_roi_heads


def config(**keys):
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 8
    cfg.merge_from_list([item for pair in keys.items() for item in pair])
    return cfg


def test_box_head_by_name():
    assert isinstance(
        build_box_head(config(), ShapeSpec(channels=2, height=3, width=3)), FastRCNNConvFCHead
    )


def test_unknown_roi_heads_offer_a_near_miss():
    cfg = config(**{"MODEL.ROI_HEADS.NAME": "StandartROIHeads"})
    with pytest.raises(
        KeyError, match="not registered as ROI_HEADS. Did you mean 'StandardROIHeads'"
    ):
        build_roi_heads(cfg, {"res4": ShapeSpec(channels=2, stride=16)})


def test_unknown_box_head_offers_a_near_miss():
    cfg = config(**{"MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvHead"})
    with pytest.raises(
        KeyError, match="not registered as ROI_BOX_HEAD. Did you mean 'FastRCNNConvFCHead'"
    ):
        build_roi_heads(cfg, {"res4": ShapeSpec(channels=2, stride=16)})


@pytest.mark.parametrize(
    ("switch", "key", "message"),
    [
        ("MODEL.MASK_ON", "MODEL.ROI_MASK_HEAD.NAME", "not registered as ROI_MASK_HEAD"),
        (
            "MODEL.KEYPOINT_ON",
            "MODEL.ROI_KEYPOINT_HEAD.NAME",
            "not registered as ROI_KEYPOINT_HEAD",
        ),
    ],
)
def test_unknown_head_of_a_branch_is_an_error(switch, key, message):
    with pytest.raises(KeyError, match=message):
        build_roi_heads(
            config(**{switch: True, key: "NoSuchHead"}), {"res4": ShapeSpec(channels=2, stride=16)}
        )
