"""Tests of detkit.visualization.plain_values."""

import numpy as np
import pytest
import torch

from detkit.structures import Boxes
from detkit.visualization.plain_values import (
    common_length,
    keypoint_list,
    to_array,
    to_integers,
    to_list,
)

ROW = [[1.0, 2.0, 3.0, 5.0]]


@pytest.mark.parametrize(
    "values",
    [ROW, Boxes(ROW), torch.tensor(ROW, requires_grad=True)],
    ids=["list", "Boxes", "tensor"],
)
def test_numbers_of_any_form_become_an_array(values):
    assert to_array(values).tolist() == ROW
    assert to_array(values).dtype == np.float64


@pytest.mark.parametrize(
    "values", [np.array([3, 4], np.uint8), torch.tensor([3, 4], dtype=torch.int32)]
)
def test_labels_of_any_width_become_int64(values):
    assert to_integers(values).dtype == np.int64
    assert to_integers(values).tolist() == [3, 4]


def test_instance_without_keypoints_has_none():
    first, second = keypoint_list([None, [1.0, 2.0, 2.0, 3.0, 4.0, 1.0]])
    assert first.shape == (0, 3)
    assert second.tolist() == [[1.0, 2.0, 2.0], [3.0, 4.0, 1.0]]
    assert [points.shape for points in keypoint_list(torch.zeros(2, 5, 3))] == [(5, 3), (5, 3)]


def test_nothing_stays_nothing():
    assert to_list(None) is None
    assert to_list(torch.tensor([1, 2])) == [1, 2]


def test_columns_share_a_length():
    assert common_length(boxes=[1, 2], masks=None, labels="ab") == 2
    assert common_length(boxes=None) == 0
    with pytest.raises(
        ValueError, match="same number of instances everywhere: got 2 boxes, 1 labels"
    ):
        common_length(boxes=[1, 2], labels=["a"])
