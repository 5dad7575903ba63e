"""Tests of detkit.modeling.roi_heads.selection."""

import pytest
import torch

from detkit.modeling.roi_heads.selection import select_foreground_proposals
from detkit.structures import Boxes, Instances


def proposals(*classes):
    boxes = Boxes(torch.arange(4.0 * len(classes)).reshape(-1, 4))
    return Instances((9, 9), proposal_boxes=boxes, gt_classes=torch.tensor(classes, dtype=torch.int64))


def test_background_and_ignored_go():
    selected, masks = select_foreground_proposals([proposals(1, 5, -1, 0), proposals(5)], bg_label=5)
    assert [p.gt_classes.tolist() for p in selected] == [[1, 0], []]
    assert [mask.tolist() for mask in masks] == [[True, False, False, True], [False]]
    assert selected[0].proposal_boxes.tensor[1].tolist() == [12, 13, 14, 15]


def test_no_proposals_select_none():
    selected, masks = select_foreground_proposals([proposals()], bg_label=5)
    assert len(selected[0]) == len(masks[0]) == 0


def test_proposals_without_classes_are_an_error():
    with pytest.raises(ValueError, match="image 1 have no gt_classes"):
        select_foreground_proposals([proposals(1), Instances((9, 9), proposal_boxes=Boxes([]))], bg_label=5)
