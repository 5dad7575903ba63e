"""Bounds of Cityscapes' AP; as a whole it is held against the scripts in test_evaluator.py."""

import numpy as np
import pytest

from detkit.evaluation.cityscapes.instance import average_precisions, compare_image

CAR, ROAD = 26, 7


def regions_of(predicted, true, *, true_id=CAR * 1000):
    """One row of pixels: an object on the first `true` of them, a prediction on the first `predicted`."""
    ids = np.full((1, 500), ROAD)
    ids[0, :true] = true_id
    masks = (np.arange(500) < predicted).reshape(1, 1, 500)
    (regions,) = compare_image(ids, masks, np.array([CAR]), np.array([0.9]), [CAR])
    return regions


@pytest.mark.parametrize(
    ("predicted", "num_right"),
    [
        pytest.param(200, 10, id="the same pixels"),
        pytest.param(400, 0, id="overlap of exactly one half does not count"),
        pytest.param(399, 1, id="a little more does"),
    ],
)
def test_overlap_must_exceed_the_threshold(predicted, num_right):
    assert int((average_precisions([regions_of(predicted, 200)]) > 0).sum()) == num_right


@pytest.mark.parametrize(("true", "is_object"), [(99, False), (100, True)])
def test_objects_are_of_a_hundred_pixels_or_more(true, is_object):
    precisions = average_precisions([regions_of(true, true)])
    assert np.isnan(precisions).all() == (not is_object)


def test_group_is_no_object_to_find():
    assert np.isnan(average_precisions([regions_of(200, 200, true_id=CAR)])).all()
