"""Tests of detkit.modeling.roi_heads.selection."""

import pytest
import torch

from detkit.modeling.roi_heads.selection import (
    select_foreground_proposals,
    select_proposals_with_visible_keypoints,
)
from detkit.structures import Boxes, Instances, Keypoints
from detkit.utils.events import EventStorage


def proposals(*classes):
    boxes = Boxes(torch.arange(4.0 * len(classes)).reshape(-1, 4))
    return Instances(
        (9, 9), proposal_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64)
    )


def test_background_and_ignored_go():
    selected, masks = select_foreground_proposals(
        [proposals(1, 5, -1, 0), proposals(5)], bg_label=5
    )
    assert [p.gt_classes.tolist() for p in selected] == [[1, 0], []]
    assert [mask.tolist() for mask in masks] == [[True, False, False, True], [False]]
    assert selected[0].proposal_boxes.tensor[1].tolist() == [12, 13, 14, 15]


def test_no_proposals_select_none():
    selected, masks = select_foreground_proposals([proposals()], bg_label=5)
    assert len(selected[0]) == len(masks[0]) == 0


def test_proposals_without_classes_are_an_error():
    with pytest.raises(ValueError, match="image 1 have no gt_classes"):
        select_foreground_proposals(
            [proposals(1), Instances((9, 9), proposal_boxes=Boxes([]))], bg_label=5
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
        selected = select_proposals_with_visible_keypoints([given, given[:0], proposals()])
    assert selected[0].number.tolist() == [0, 3]
    assert [len(x) for x in selected] == [2, 0, 0]
    assert storage.latest()["keypoint_head/num_fg_samples"][0] == 2


def test_no_foreground_at_all_selects_none():
    with EventStorage(0) as storage:
        assert [len(x) for x in select_proposals_with_visible_keypoints([proposals()])] == [0]
    assert storage.latest()["keypoint_head/num_fg_samples"][0] == 0


def test_proposals_without_keypoints_are_an_error():
    with pytest.raises(ValueError, match="image 0 have no gt_keypoints: MODEL.KEYPOINT_ON needs"):
        select_proposals_with_visible_keypoints([proposals(1)])
