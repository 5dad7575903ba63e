"""Tests of detkit.visualization.plain_values."""

import numpy as np
import pytest
import torch

from detkit.structures import BitMasks, Boxes, PolygonMasks, bitmask_to_rle
from detkit.visualization.plain_values import (
    binary_mask,
    common_length,
    is_polygons,
    keypoint_list,
    mask_list,
    to_array,
    to_integers,
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


def test_columns_share_a_length():
    assert common_length(boxes=[1, 2], masks=None, labels="ab") == 2
    assert common_length(boxes=None) == 0
    with pytest.raises(
        ValueError, match="same number of instances everywhere: got 2 boxes, 1 labels"
    ):
        common_length(boxes=[1, 2], labels=["a"])


MASK = np.zeros((6, 8), bool)
MASK[1:4, 2:7] = True
SQUARE = [[2.0, 1.0, 7.0, 1.0, 7.0, 4.0, 2.0, 4.0]]
RUNS = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 3, 3, 8]}


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(SQUARE, id="polygons"),
        pytest.param([np.array(SQUARE).reshape(-1, 2)], id="points"),
        pytest.param(bitmask_to_rle(MASK), id="compressed runs"),
        pytest.param(RUNS, id="runs"),
        pytest.param(MASK, id="bitmap"),
        pytest.param(MASK.astype(np.uint8), id="numbers"),
    ],
)
def test_every_form_gives_the_same_bitmap(mask) -> None:
    assert binary_mask(mask, 6, 8).tolist() == MASK.tolist()


def test_no_polygon_is_an_empty_mask() -> None:
    assert not binary_mask([], 6, 8).any()


@pytest.mark.parametrize("mask", [MASK, bitmask_to_rle(MASK)], ids=["bitmap", "runs"])
def test_mask_of_another_size_is_refused(mask) -> None:
    with pytest.raises(ValueError, match="6 x 9"):
        binary_mask(mask, 6, 9)


@pytest.mark.parametrize(
    "masks",
    [
        pytest.param(BitMasks(torch.tensor(MASK)[None]), id="BitMasks"),
        pytest.param(PolygonMasks([SQUARE]), id="PolygonMasks"),
        pytest.param(torch.tensor(MASK)[None], id="tensor"),
        pytest.param(MASK[None], id="array"),
    ],
)
def test_containers_give_their_masks_one_by_one(masks) -> None:
    (mask,) = mask_list(masks)
    assert binary_mask(mask, 6, 8).tolist() == MASK.tolist()
    assert is_polygons(mask) == isinstance(masks, PolygonMasks)
