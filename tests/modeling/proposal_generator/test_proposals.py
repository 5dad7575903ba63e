"""Tests of detkit.modeling.proposal_generator.proposals."""

import math

import pytest
import torch

from detkit.modeling.proposal_generator.proposals import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
    select_proposals,
    top_indices_per_level,
)
from detkit.structures import Boxes, Instances
from tests.helpers import random_boxes, slow_batched_nms

SIZE = (90, 80)


def find(boxes, logits, level_ids=None, **kwargs):
    arguments = {
        "nms_thresh": 0.7,
        "post_nms_topk": 1000,
        "min_box_size": 0.0,
        "training": False,
        **kwargs,
    }
    level_ids = torch.zeros(boxes.shape[1], dtype=torch.int64) if level_ids is None else level_ids
    return select_proposals(boxes, logits, level_ids, [SIZE] * len(boxes), **arguments)


def test_top_of_every_level_comes_best_first():
    logits = [torch.tensor([[1.0, 3, 2], [3, 1, 2]]), torch.tensor([[5.0], [6]])]
    indices = top_indices_per_level(logits, 2)
    assert [i.tolist() for i in indices] == [[[1, 2], [0, 2]], [[0], [0]]]


def test_best_of_every_level_are_picked_before_they_are_suppressed():
    levels = [random_boxes(30, seed=1)[None], random_boxes(5, seed=2)[None]]
    logits = [torch.randn(1, 30), torch.randn(1, 5)]
    (proposals,) = find_top_rpn_proposals(levels, logits, [SIZE], 0.7, 10, 8, 0.0, False)
    best = logits[0][0].topk(10).indices
    (expected,) = find(
        torch.cat([levels[0][:, best], levels[1]], dim=1),
        torch.cat([logits[0][:, best], logits[1]], dim=1),
        torch.tensor([0] * 10 + [1] * 5),
        post_nms_topk=8,
    )
    torch.testing.assert_close(proposals.proposal_boxes.tensor, expected.proposal_boxes.tensor)


def test_proposals_are_those_of_the_slow_reference():
    boxes, logits, levels = random_boxes(80), torch.randn(80), torch.arange(80) % 3
    (proposals,) = find(boxes[None], logits[None], levels, nms_thresh=0.5, post_nms_topk=20)
    clipped = boxes.clone()
    clipped[:, 0::2] = clipped[:, 0::2].clamp(0, SIZE[1])
    clipped[:, 1::2] = clipped[:, 1::2].clamp(0, SIZE[0])
    inside = ((clipped[:, 2:] - clipped[:, :2]) > 0).all(dim=1)
    clipped, logits, levels = clipped[inside], logits[inside], levels[inside]
    keep = slow_batched_nms(clipped, logits, levels, 0.5)[:20]
    torch.testing.assert_close(proposals.proposal_boxes.tensor, clipped[keep])
    torch.testing.assert_close(proposals.objectness_logits, logits[keep])
    assert proposals.image_size == SIZE


def test_a_batch_is_its_images_one_by_one():
    boxes = torch.stack([random_boxes(40, seed=1), random_boxes(40, seed=2)])
    logits = torch.randn(2, 40)
    together = find(boxes, logits)
    for i in range(2):
        (alone,) = find(boxes[i : i + 1], logits[i : i + 1])
        torch.testing.assert_close(together[i].proposal_boxes.tensor, alone.proposal_boxes.tensor)


def test_boxes_no_larger_than_the_minimum_go():
    boxes = torch.tensor([[[0.0, 0, 5, 9], [0, 0, 6, 9], [70, 0, 90, 20]]])
    (proposals,) = find(boxes, torch.tensor([[3.0, 2, 1]]), min_box_size=5)
    assert proposals.objectness_logits.tolist() == [2, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["box", "logit"])
def test_numbers_not_finite_stop_training_and_are_dropped_in_inference(where, value):
    boxes, logits = torch.tensor([[[0.0, 0, 5, 5], [10, 10, 20, 20]]]), torch.tensor([[2.0, 1.0]])
    if where == "box":
        boxes[0, 0, 1] = value
    else:
        logits[0, 0] = value
    (proposals,) = find(boxes, logits)
    assert proposals.objectness_logits.tolist() == [1]
    with pytest.raises(
        FloatingPointError, match=r"contain Inf or NaN: training has diverged.*SOLVER.BASE_LR"
    ):
        find(boxes, logits, training=True)


def test_images_without_a_size_are_not_looked_at():
    boxes, logits = torch.rand(3, 9, 4), torch.rand(3, 9)
    logits[1, 3:5] = torch.inf
    found = find_top_rpn_proposals([boxes], [logits], [(10, 10)], 0.5, 1000, 1000, 0, True)
    assert len(found) == 1


def test_no_candidates_give_no_proposals():
    proposals = find(torch.zeros(2, 0, 4), torch.zeros(2, 0))
    assert [len(p) for p in proposals] == [0, 0]


def test_worse_boxes_are_asked_for_where_the_best_are_copies_of_one():
    boxes = torch.tensor(
        [[0.0, 0, 9, 9]] * 50 + [[10.0 + 10 * i, 20, 19 + 10 * i, 29] for i in range(5)]
    )
    logits = torch.arange(55.0).flip(0)
    (proposals,) = find(boxes[None], logits[None], post_nms_topk=4)
    assert proposals.objectness_logits.tolist() == [54, 4, 3, 2]


def image_proposals(num=2):
    boxes = Boxes(random_boxes(num))
    return Instances(SIZE, proposal_boxes=boxes, objectness_logits=torch.zeros(num))


def truth(num):
    return Instances(
        SIZE,
        gt_boxes=Boxes(random_boxes(num, seed=7)),
        gt_classes=torch.zeros(num, dtype=torch.int64),
    )


@pytest.mark.parametrize("num", [0, 1, 3], ids=["nothing", "one", "many"])
def test_ground_truth_is_appended(num):
    gt, proposals = truth(num), image_proposals()
    (extended,) = add_ground_truth_to_proposals([gt], [proposals])
    torch.testing.assert_close(
        extended.proposal_boxes.tensor,
        torch.cat([proposals.proposal_boxes.tensor, gt.gt_boxes.tensor]),
    )
    assert sorted(extended.get_fields()) == ["objectness_logits", "proposal_boxes"]
    assert len(proposals) == 2


@pytest.mark.parametrize("as_boxes", [False, True], ids=["instances", "boxes"])
def test_ground_truth_is_nearly_certain(as_boxes):
    gt = truth(1).gt_boxes if as_boxes else truth(1)
    (extended,) = add_ground_truth_to_proposals([gt], [image_proposals()])
    assert extended.objectness_logits[-1].item() == pytest.approx(math.log(1e10), rel=1e-6)


def test_further_fields_come_from_the_ground_truth():
    gt, proposals = truth(1), image_proposals()
    gt.weight, proposals.weight = torch.tensor([7.0]), torch.tensor([1.0, 2.0])
    (extended,) = add_ground_truth_to_proposals([gt], [proposals])
    assert extended.weight.tolist() == [1, 2, 7]


def test_field_that_the_ground_truth_lacks_is_an_error():
    proposals = image_proposals()
    proposals.weight = torch.zeros(2)
    with pytest.raises(ValueError, match="field 'weight' that the ground truth lacks"):
        add_ground_truth_to_proposals([truth(1)], [proposals])


def test_every_image_needs_ground_truth():
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        add_ground_truth_to_proposals([truth(1)], [image_proposals(), image_proposals()])


@pytest.mark.parametrize("topk", [5, 60, 400], ids=["best are enough", "all are needed", "all"])
def test_several_images_have_the_proposals_of_each_alone(topk, monkeypatch):
    # Two images at a time, and of each first the best, whose overlaps leave more or less than are asked for.
    monkeypatch.setattr("detkit.modeling.proposal_generator.proposals._NMS_BOXES", 1000)
    boxes = torch.stack([random_boxes(400, seed=i) for i in range(5)])
    boxes[1, ::2] = 0.0  # no boxes
    boxes[2] = 0.0  # none at all
    logits, levels = torch.randn(5, 400), torch.arange(400) % 3
    boxes[3, 7, 0] = math.nan
    together = find(boxes, logits, levels, nms_thresh=0.2, post_nms_topk=topk)
    for i, proposals in enumerate(together):
        clipped = boxes[i].clone()
        clipped[:, 0::2] = clipped[:, 0::2].clamp(0, SIZE[1])
        clipped[:, 1::2] = clipped[:, 1::2].clamp(0, SIZE[0])
        ((valid,),) = [((clipped[:, 2:] - clipped[:, :2]) > 0).all(dim=1).nonzero(as_tuple=True)]
        keep = valid[slow_batched_nms(clipped[valid], logits[i][valid], levels[valid], 0.2)[:topk]]
        torch.testing.assert_close(proposals.proposal_boxes.tensor, clipped[keep])
        torch.testing.assert_close(proposals.objectness_logits, logits[i][keep])
