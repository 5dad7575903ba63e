"""Bounds of Cityscapes' AP; as a whole it is held against the scripts in test_evaluator.py."""

import numpy as np
import pytest

from detkit.evaluation.cityscapes.instance import average_precisions, compare_image

CAR, ROAD, VOID = 26, 7, 0


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


def first_precision(ids, *predictions):
    """AP at overlap 0.5 of cars, whose predictions are (first pixel, end, score) of one row."""
    masks = np.array(
        [[(np.arange(len(ids)) >= a) & (np.arange(len(ids)) < b)] for a, b, _ in predictions]
    )
    scores = np.array([score for _, _, score in predictions])
    labels = np.full(len(predictions), CAR)
    (regions,) = compare_image(np.array([ids]), masks, labels, scores, [CAR])
    return average_precisions([regions])[0]


def test_group_below_a_hundred_pixels_excuses_twice():
    # As in the scripts: 30 of the prediction's 100 pixels count as 60.
    ids = [CAR * 1000] * 200 + [CAR] * 30 + [ROAD] * 100
    assert first_precision(ids, (0, 200, 0.5), (200, 300, 0.9)) == 1
    ids = [CAR * 1000] * 200 + [CAR] * 25 + [ROAD] * 100
    assert first_precision(ids, (0, 200, 0.5), (200, 300, 0.9)) < 1


@pytest.mark.parametrize(("in_void", "is_wrong"), [(50, True), (51, False)])
def test_prediction_by_more_than_half_in_void_is_not_wrong(in_void, is_wrong):
    ids = [CAR * 1000] * 200 + [VOID] * in_void + [ROAD] * 100
    assert (first_precision(ids, (0, 200, 0.5), (200, 300, 0.9)) < 1) == is_wrong


def test_empty_masks_are_no_predictions():
    ids = [CAR * 1000] * 200 + [ROAD] * 100
    assert first_precision(ids, (0, 200, 0.5), (7, 7, 0.9)) == 1


def test_hand_worked_curve():
    # By falling score: right, wrong, right, of three objects. Precision 1, 1/2, 2/3 at recall 1/3,
    # 1/3, 2/3, and 1 at recall 0; each is weighted by half the distance between the recalls beside
    # it, here always 1/6.
    ids = [CAR * 1000] * 100 + [CAR * 1000 + 1] * 100 + [CAR * 1000 + 2] * 100 + [ROAD] * 100
    found = first_precision(ids, (0, 100, 0.9), (300, 400, 0.8), (100, 200, 0.7))
    assert found == pytest.approx((1 + 1 + 1 / 2 + 2 / 3) / 6)
