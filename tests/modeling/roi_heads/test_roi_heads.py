"""Tests of detkit.modeling.roi_heads.roi_heads."""

import pytest
import torch

from detkit.config import get_cfg
from detkit.modeling.matcher import Matcher
from detkit.modeling.roi_heads.roi_heads import (
    ROIHeads,
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detkit.structures import Boxes, Instances, Keypoints, PolygonMasks
from detkit.utils.events import EventStorage

K = 5
SIZE = (100, 100)
OBJECTS = [[10.0, 10, 30, 30], [50, 50, 90, 90]]
NEAR = [[11.0, 10, 31, 30], [50, 52, 90, 92]]
FAR = [[60.0, 5, 70, 15], [5, 60, 15, 70], [35, 35, 40, 40]]


def make(**kwargs):
    matcher = kwargs.pop("proposal_matcher", Matcher([0.5], [0, 1]))
    arguments = {
        "num_classes": K,
        "batch_size_per_image": 100,
        "positive_fraction": 0.5,
        "proposal_matcher": matcher,
    }
    return ROIHeads(**{**arguments, **kwargs})


def proposals(boxes):
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))


def truth(boxes=OBJECTS, classes=(3, 1)):
    gt = Instances(
        SIZE,
        gt_boxes=Boxes(boxes),
        gt_classes=torch.tensor(classes[: len(boxes)], dtype=torch.int64),
    )
    gt.gt_ids = torch.arange(len(boxes)) + 40
    gt.file = ["a"] * len(boxes)
    return gt


def by_box(sampled):
    return {
        tuple(box): int(c)
        for box, c in zip(sampled.proposal_boxes.tensor.tolist(), sampled.gt_classes, strict=True)
    }


def test_proposals_get_class_and_fields_of_their_object():
    (sampled,) = make(proposal_append_gt=False).label_and_sample_proposals(
        [proposals(NEAR + FAR)], [truth()]
    )
    classes = by_box(sampled)
    assert [classes[tuple(box)] for box in NEAR] == [3, 1]
    assert [classes[tuple(box)] for box in FAR] == [K] * 3
    foreground = sampled[sampled.gt_classes < K]
    assert sorted(foreground.gt_ids.tolist()) == [40, 41]
    assert sorted(map(tuple, foreground.gt_boxes.tensor.tolist())) == sorted(map(tuple, OBJECTS))
    assert not sampled.has("file")


@pytest.mark.parametrize("sample", [None, ROIHeads._sample_proposals], ids=["all", "each"])
def test_fields_on_the_host_follow_the_boxes_of_their_object(sample):
    heads = make()
    if sample is not None:  # one's own, which is called per image
        heads._sample_proposals = lambda *args: sample(heads, *args)
    gt = truth()
    gt.gt_masks = PolygonMasks([[[x1, y1, x2, y1, x2, y2]] for x1, y1, x2, y2 in OBJECTS])
    gt.gt_names = ["first", "second"]
    sampled = heads.label_and_sample_proposals(
        [proposals(FAR + NEAR), proposals(FAR + NEAR[::-1])], [gt, gt]
    )
    selected, _ = select_foreground_proposals(sampled, K)
    for instances_i, num in zip([*sampled, *selected], [7, 7, 4, 4], strict=True):
        assert len(instances_i) == num
        boxes = instances_i.gt_boxes.tensor
        torch.testing.assert_close(instances_i.gt_masks.get_bounding_boxes().tensor, boxes)
        names = ["first" if box == OBJECTS[0] else "second" for box in boxes.tolist()]
        assert instances_i.gt_names == names


def test_ground_truth_is_among_the_proposals():
    (sampled,) = make().label_and_sample_proposals([proposals(FAR)], [truth()])
    assert [by_box(sampled)[tuple(box)] for box in OBJECTS] == [3, 1]


def test_image_without_objects_is_background_without_ground_truth_fields():
    (sampled,) = make().label_and_sample_proposals([proposals(FAR)], [truth([])])
    assert sampled.gt_classes.tolist() == [K] * 3
    assert not sampled.has("gt_boxes")


def test_image_without_proposals_and_objects_gives_none():
    (sampled,) = make().label_and_sample_proposals([proposals([])], [truth([])])
    assert len(sampled) == 0
    assert sampled.gt_classes.dtype == torch.int64


def test_ignored_proposals_are_not_sampled():
    heads = make(proposal_matcher=Matcher([0.5, 0.99], [0, -1, 1]), proposal_append_gt=False)
    (sampled,) = heads.label_and_sample_proposals([proposals(NEAR + FAR + OBJECTS)], [truth()])
    assert set(by_box(sampled)) == {tuple(box) for box in FAR + OBJECTS}


def test_sample_is_bounded():
    heads = make(batch_size_per_image=4, positive_fraction=0.25)
    (sampled,) = heads.label_and_sample_proposals([proposals(NEAR + FAR)], [truth()])
    assert sorted(c == K for c in sampled.gt_classes.tolist()) == [False, True, True, True]


def test_proposals_given_are_not_changed():
    given = proposals(NEAR + FAR)
    make().label_and_sample_proposals([given], [truth()])
    assert sorted(given.get_fields()) == ["objectness_logits", "proposal_boxes"]
    assert len(given) == 5


def test_numbers_are_logged_per_image():
    with EventStorage(0) as storage:
        make().label_and_sample_proposals(
            [proposals(NEAR + FAR), proposals(FAR)], [truth(), truth([])]
        )
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest == {"roi_head/num_fg_samples": 2.0, "roi_head/num_bg_samples": 3.0}


def test_config_gives_the_sampling():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS = [0.6]
    heads = ROIHeads(cfg)
    assert (heads.num_classes, heads.proposal_matcher.thresholds[1:-1]) == (7, [0.6])
    assert not heads.proposal_matcher.allow_low_quality_matches


def test_base_has_neither_losses_nor_detections():
    with pytest.raises(NotImplementedError, match="ROIHeads does not implement losses"):
        make()(None, {}, [], [])
    with pytest.raises(NotImplementedError, match="ROIHeads does not implement predict"):
        make().eval()(None, {}, [])
    with pytest.raises(
        NotImplementedError, match="ROIHeads does not implement forward_with_given_boxes"
    ):
        make().eval().forward_with_given_boxes({}, [])


def test_settings_come_from_the_config():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.update(
        {"NUM_CLASSES": 7, "BATCH_SIZE_PER_IMAGE": 9, "POSITIVE_FRACTION": 0.4}
    )
    cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = False
    heads = ROIHeads(cfg)
    assert (heads.num_classes, heads.batch_size_per_image, heads.positive_fraction) == (7, 9, 0.4)
    assert not heads.proposal_append_gt


def classified(*classes):
    boxes = Boxes(torch.arange(4.0 * len(classes)).reshape(-1, 4))
    return Instances(
        (9, 9), proposal_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64)
    )


def test_background_and_ignored_go():
    selected, masks = select_foreground_proposals(
        [classified(1, 5, -1, 0), classified(5)], bg_label=5
    )
    assert [p.gt_classes.tolist() for p in selected] == [[1, 0], []]
    assert [mask.tolist() for mask in masks] == [[True, False, False, True], [False]]
    assert selected[0].proposal_boxes.tensor[1].tolist() == [12, 13, 14, 15]


def test_no_proposals_select_none():
    selected, masks = select_foreground_proposals([classified()], bg_label=5)
    assert len(selected[0]) == len(masks[0]) == 0


def test_proposals_without_classes_are_an_error():
    with pytest.raises(ValueError, match="image 1 have no gt_classes"):
        select_foreground_proposals(
            [classified(1), Instances((9, 9), proposal_boxes=Boxes([]))], bg_label=5
        )


def with_keypoints(*keypoints):
    """One proposal (0, 0, 10, 10) per list of keypoints."""
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10]]).repeat(len(keypoints), 1))
    points = torch.tensor(keypoints, dtype=torch.float32).reshape(len(keypoints), 2, 3)
    return Instances(
        (9, 9),
        proposal_boxes=boxes,
        gt_keypoints=Keypoints(points),
        number=torch.arange(len(keypoints)),
    )


def test_proposals_without_a_labelled_keypoint_inside_go():
    given = with_keypoints(
        [[5, 5, 2], [50, 50, 2]],
        [[50, 5, 2], [5, -1, 2]],  # outside
        [[5, 5, 0], [50, 50, 2]],  # not labelled, and outside
        [[10, 0, 1], [5, 5, 0]],  # hidden, on the border
    )
    with EventStorage(0) as storage:
        selected = select_proposals_with_visible_keypoints([given, given[:0], classified()])
    assert selected[0].number.tolist() == [0, 3]
    assert [len(x) for x in selected] == [2, 0, 0]
    assert storage.latest()["keypoint_head/num_fg_samples"][0] == 2


def test_no_foreground_at_all_selects_none():
    with EventStorage(0) as storage:
        assert [len(x) for x in select_proposals_with_visible_keypoints([classified()])] == [0]
    assert storage.latest()["keypoint_head/num_fg_samples"][0] == 0


def test_proposals_without_keypoints_are_an_error():
    with pytest.raises(ValueError, match="image 0 have no gt_keypoints: MODEL.KEYPOINT_ON needs"):
        select_proposals_with_visible_keypoints([classified(1)])
