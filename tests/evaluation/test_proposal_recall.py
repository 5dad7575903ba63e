import math

import numpy as np
import pytest

from detkit.evaluation.coco_ground_truth import load_coco_ground_truth
from detkit.evaluation.detections import ImageDetections
from detkit.evaluation.proposal_recall import covered_overlaps, proposal_recall_metrics
from tests.helpers import slow_covered_overlaps

SMALL, MEDIUM, LARGE = [0, 0, 20, 20], [0, 0, 50, 50], [0, 0, 100, 100]


def proposals(image_id, boxes, scores=None):
    scores = np.arange(len(boxes), 0, -1.0) if scores is None else np.array(scores)
    return ImageDetections(
        image_id, np.array(boxes).reshape(-1, 4), scores, np.zeros(len(boxes), dtype=np.int64)
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (4, 9), (9, 4), (30, 30)])
def test_pairs_are_those_of_the_slow_reference(shape):
    # Some proposals are good for all objects, so that the objects compete for them.
    rng = np.random.default_rng(sum(shape))
    overlaps = (rng.random((shape[0], 1)) + 0.1 * rng.random(shape)) / 1.1
    expected = slow_covered_overlaps(overlaps.tolist()) if shape[0] else [0.0] * shape[1]
    np.testing.assert_allclose(covered_overlaps(overlaps), expected)


def test_proposals_equal_to_the_objects_cover_them_all(register, make_record):
    truth = load_coco_ground_truth(
        register([make_record(1, (SMALL, 0), (MEDIUM, 1), (LARGE, 0)), make_record(2)])
    )
    metrics = proposal_recall_metrics(truth, [proposals(1, [LARGE, SMALL, MEDIUM])])
    assert set(metrics) == {
        f"AR{area}@{limit}" for area in ("", "s", "m", "l") for limit in (100, 1000)
    }
    assert all(value == pytest.approx(100) for value in metrics.values())


def test_hand_worked_recall(register, make_record):
    # Covered at overlaps 0.8 (thresholds 0.50 to 0.80: seven of ten) and not at all.
    truth = load_coco_ground_truth(
        register([make_record(1, (LARGE, 0)), make_record(2, (MEDIUM, 0))])
    )
    metrics = proposal_recall_metrics(truth, [proposals(1, [[0, 0, 80, 100]])])
    assert metrics["ARl@100"] == pytest.approx(70)
    assert metrics["ARm@100"] == 0
    assert metrics["AR@100"] == pytest.approx(35)
    assert math.isnan(metrics["ARs@100"])


@pytest.mark.parametrize(("side", "areas"), [(32, {"s", "m"}), (96, {"m", "l"}), (50, {"m"})])
def test_size_on_the_border_lies_in_both_ranges(side, areas, register, make_record):
    truth = load_coco_ground_truth(register([make_record(1, ([0, 0, side, side], 0))]))
    metrics = proposal_recall_metrics(truth, [], limits=(1,))
    assert {area for area in "sml" if metrics[f"AR{area}@1"] == 0} == areas


def test_best_scored_proposals_count_up_to_the_limit(register, make_record):
    truth = load_coco_ground_truth(register([make_record(1, (LARGE, 0))]))
    found = [proposals(1, [LARGE, SMALL, MEDIUM], scores=[0.1, 0.9, 0.5])]
    assert proposal_recall_metrics(truth, found, limits=(2,))["AR@2"] == 0
    assert proposal_recall_metrics(truth, found, limits=(3,))["AR@3"] == pytest.approx(100)


def test_one_proposal_does_not_cover_two_objects(register, make_record):
    truth = load_coco_ground_truth(register([make_record(1, (LARGE, 0), (LARGE, 1))]))
    assert proposal_recall_metrics(truth, [proposals(1, [LARGE])])["AR@100"] == pytest.approx(50)


def test_crowds_do_not_count(register, make_record):
    truth = load_coco_ground_truth(
        register([make_record(1, (LARGE, 0), (SMALL, 0, {"iscrowd": 1}))])
    )
    assert proposal_recall_metrics(truth, [proposals(1, [LARGE])])["AR@100"] == pytest.approx(100)


def test_without_objects_recall_is_nan(register, make_record):
    truth = load_coco_ground_truth(register([make_record(1)]))
    assert all(math.isnan(value) for value in proposal_recall_metrics(truth, []).values())
