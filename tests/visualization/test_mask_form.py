import numpy as np
import pytest
import torch

from detkit.structures import BitMasks, PolygonMasks, bitmask_to_rle
from detkit.visualization.mask_form import binary_mask, is_polygons, mask_list

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
