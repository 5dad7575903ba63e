"""Tests of detkit.modeling.proposal_generator.rrpn."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling import build_backbone, build_proposal_generator
from detkit.modeling.proposal_generator import RPN, RRPN, find_top_rrpn_proposals
from detkit.structures import ImageList, Instances, RotatedBoxes, pairwise_iou_rotated
from detkit.utils.errors import ConfigError
from tests.helpers import (
    DEVICES,
    iou_of_two_rotated_boxes,
    random_rotated_boxes,
    slow_batched_nms,
)
from tests.modeling.proposal_generator import test_rpn as upright
from tests.structures.test_rotated_boxes import as_rotated

SHAPES = {"p3": ShapeSpec(channels=4, stride=8), "p4": ShapeSpec(channels=4, stride=16)}


def config(*angles):
    cfg = upright.config(BBOX_REG_WEIGHTS=(1.0,) * 5)
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [list(angles)]
    return cfg


def truth(*boxes):
    return Instances(upright.SIZE, gt_boxes=RotatedBoxes(torch.tensor(boxes).reshape(-1, 5)))


def upright_and_rotated():
    """Return an RPN, and an RRPN with the same weights whose anchors and deltas have the angle 0."""
    rpn, rrpn = upright.make(), build_proposal_generator(config(0), SHAPES)
    state = rpn.state_dict()
    for name in ("weight", "bias"):
        deltas = state[f"rpn_head.anchor_deltas.{name}"].unflatten(0, (3, 4))
        angles = torch.zeros_like(deltas[:, :1])
        state[f"rpn_head.anchor_deltas.{name}"] = torch.cat([deltas, angles], dim=1).flatten(0, 1)
    rrpn.load_state_dict(state)
    return rpn, rrpn


def test_without_turns_losses_and_proposals_are_those_of_the_upright_network():
    rpn, rrpn = upright_and_rotated()
    objects = [upright.truth(upright.OBJECT), upright.truth(upright.OBJECT, (40, 5, 60, 40))]
    rotated = [truth(*as_rotated(x.gt_boxes.tensor).tolist()) for x in objects]
    torch.manual_seed(3)
    expected, expected_losses = rpn(*upright.batch(), objects)
    torch.manual_seed(3)
    found, losses = rrpn(*upright.batch(), rotated)
    for name, loss in expected_losses.items():
        torch.testing.assert_close(losses[name], loss, atol=1e-5, rtol=1e-5)
    for found_i, expected_i in zip(found, expected, strict=True):
        boxes = found_i.proposal_boxes
        assert type(boxes) is RotatedBoxes
        torch.testing.assert_close(found_i.objectness_logits, expected_i.objectness_logits)
        torch.testing.assert_close(boxes.upright().tensor, expected_i.proposal_boxes.tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_learns_to_find_a_turned_object(device):
    torch.manual_seed(0)
    cfg = config(-60, 0, 60)
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN = 10
    rrpn = build_proposal_generator(cfg, SHAPES).to(device)
    images, features = upright.batch(1)
    features = {name: x.to(device) for name, x in features.items()}
    box = torch.tensor([[40.0, 30, 36, 12, 50]])
    target = Instances(upright.SIZE, gt_boxes=RotatedBoxes(box.to(device)))
    optimizer = torch.optim.Adam(rrpn.parameters(), lr=0.01)
    for _ in range(40):
        proposals, losses = rrpn(images, features, [target])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    (proposals,), _ = rrpn.eval()(images, features)
    assert pairwise_iou_rotated(proposals.proposal_boxes.tensor[:1].cpu(), box).item() > 0.7


def test_top_proposals_are_those_of_the_slow_reference():
    boxes = [random_rotated_boxes(40)[None], random_rotated_boxes(10, seed=1)[None]]
    logits = [torch.randperm(n, generator=torch.Generator().manual_seed(n)) / n for n in (40, 10)]
    (found,) = find_top_rrpn_proposals(
        boxes, [x[None] for x in logits], [(100, 100)], 0.3, 20, 12, 4.0, training=False
    )
    candidates, scores, levels = [], [], []
    for level, (boxes_l, logits_l) in enumerate(zip(boxes, logits, strict=True)):
        top = logits_l.argsort(descending=True)[:20]
        clipped = RotatedBoxes(boxes_l[0, top])
        clipped.clip((100, 100))
        large = clipped.nonempty(4.0)
        candidates.append(clipped.tensor[large])
        scores.append(logits_l[top][large])
        levels.append(torch.full_like(scores[-1], level).long())
    candidates, scores, levels = (torch.cat(x) for x in (candidates, scores, levels))
    kept = slow_batched_nms(candidates, scores, levels, 0.3, iou_of_two_rotated_boxes)[:12]
    torch.testing.assert_close(found.proposal_boxes.tensor, candidates[kept])
    torch.testing.assert_close(found.objectness_logits, scores[kept])


def test_proposals_of_detectron2_from_the_same_seed():
    # First proposal and best logits of the first image as Detectron2's test records them.
    torch.manual_seed(121)
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.25, 1]]
    cfg.MODEL.ANCHOR_GENERATOR.ANGLES = [[0, 60]]
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1, 1, 1, 1, 1)
    rrpn = build_proposal_generator(cfg, build_backbone(cfg).output_shape())
    images = ImageList(torch.rand(2, 20, 30), [(10, 10), (20, 30)])
    features = {"res4": torch.rand(2, 1024, 1, 2)}
    proposals, _ = rrpn.eval()(images, features)
    first = [-1.77999556, 0.78155339, 68.04367828, 14.78156471, 60.59333801]
    best = [0.10924314, 0.09881870, 0.07649878]
    torch.testing.assert_close(
        proposals[0].proposal_boxes.tensor[0], torch.tensor(first), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        proposals[0].objectness_logits[:3], torch.tensor(best), atol=1e-6, rtol=1e-5
    )
    assert [len(proposals_i) for proposals_i in proposals] == [11, 14]


def test_losses_of_detectron2_where_rounding_decides_which_anchors_are_best():
    # Of a test that Detectron2 records. Each object lies within several anchors of one area.
    torch.manual_seed(121)
    cfg = get_cfg()
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RRPN"
    cfg.MODEL.ANCHOR_GENERATOR.NAME = "RotatedAnchorGenerator"
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (1, 1, 1, 1, 1)
    images = ImageList(torch.rand(2, 20, 30), [(10, 10), (20, 30)])
    features = {"res4": torch.rand(2, 1024, 1, 2)}
    rrpn = build_proposal_generator(cfg, {"res4": ShapeSpec(channels=1024, stride=16)})
    objects = [
        truth([2.0, 2, 2, 2, 30], [4, 4, 4, 4, 0]),
        truth([1.5, 5.5, 1, 3, 0], [8.5, 4, 3, 2, -50]),
    ]
    _, losses = rrpn(images, features, objects)
    assert losses["loss_rpn_cls"].item() == pytest.approx(0.24277292, rel=1e-5)
    assert losses["loss_rpn_loc"].item() == pytest.approx(0.36466211, rel=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        pytest.param(
            "MODEL.ANCHOR_GENERATOR.NAME",
            "DefaultAnchorGenerator",
            "RRPN refines rotated anchors: set MODEL.ANCHOR_GENERATOR.NAME to",
            id="upright anchors",
        ),
        pytest.param(
            "MODEL.RPN.BBOX_REG_WEIGHTS",
            (1.0, 1.0, 1.0, 1.0),
            "five positive numbers",
            id="four weights",
        ),
        pytest.param(
            "MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou", "must be smooth_l1", id="loss of upright boxes"
        ),
        pytest.param(
            "MODEL.LOAD_PROPOSALS", True, "NAME is RRPN, which finds its own", id="two sources"
        ),
    ],
)
def test_settings_that_do_not_fit_are_errors(key, value, message):
    cfg = config(0)
    cfg.merge_from_list([key, value])
    with pytest.raises((ConfigError, ValueError), match=message):
        build_proposal_generator(cfg, SHAPES)


def test_deltas_follow_the_settings():
    cfg = config(0)
    cfg.MODEL.ROTATED_BOX_PERIOD = 180.0
    cfg.MODEL.ROTATED_BOX_ALONG_SIDES = True
    transform = build_proposal_generator(cfg, SHAPES).box2box_transform
    assert transform.angle_period == 180
    assert transform.along_sides


def test_it_is_an_rpn():
    assert issubclass(RRPN, RPN)  # users ask for the kind
