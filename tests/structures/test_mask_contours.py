import numpy as np
import pytest

from detkit.structures import bitmask_to_polygons, polygon_area, polygons_to_bitmask


def blobs(seed, height=40, width=50, share=0.5):
    """Noise whose pixels come in blocks, so that there are holes, islands and corners that touch."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // 5, width // 5)) < share
    return np.kron(coarse, np.ones((5, 5), dtype=bool)) ^ (rng.random((height, width)) < 0.02)


def area_of(polygons):
    return sum(polygon_area(p[0::2], p[1::2]) for p in polygons)


def test_square_has_four_corners():
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:4, 2:7] = True
    (polygon,) = bitmask_to_polygons(mask)
    assert {tuple(point) for point in polygon.reshape(-1, 2).tolist()} == {
        (2, 1),
        (7, 1),
        (7, 4),
        (2, 4),
    }
    assert len(polygon) == 8


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("seed", range(8))
def test_polygons_give_the_bitmap_back_and_do_not_overlap(seed, share):
    mask = blobs(seed, share=share)
    polygons = bitmask_to_polygons(mask)
    assert np.array_equal(polygons_to_bitmask(polygons, *mask.shape), mask)
    assert area_of(polygons) == mask.sum()


def test_mask_with_a_hole_is_cut_there():
    mask = np.ones((5, 7), dtype=bool)
    mask[2, 3:5] = False
    polygons = bitmask_to_polygons(mask)
    assert len(polygons) == 2
    assert np.array_equal(polygons_to_bitmask(polygons, 5, 7), mask)


def test_pixels_that_touch_at_a_corner_are_apart():
    assert len(bitmask_to_polygons(np.eye(3))) == 3


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 4)], ids=str)
def test_nothing_has_no_polygons(shape):
    assert bitmask_to_polygons(np.zeros(shape)) == []


def test_turned_mask_has_turned_polygons():
    mask = blobs(3)
    turned = bitmask_to_polygons(mask.T)
    swapped = [p.reshape(-1, 2)[:, ::-1].reshape(-1) for p in turned]
    assert np.array_equal(polygons_to_bitmask(swapped, *mask.shape), mask)


def test_bitmap_of_other_dimensions_is_an_error():
    with pytest.raises(ValueError, match=r"a bitmap is \(H, W\): got shape \(2, 3, 4\)"):
        bitmask_to_polygons(np.zeros((2, 3, 4)))
