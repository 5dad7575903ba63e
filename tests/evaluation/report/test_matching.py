"""The matching of the error report against the evaluator, which does not tell what it matched."""

import numpy as np
import pytest

from detkit.evaluation import COCOEvaluator
from detkit.evaluation.coco.ground_truth import load_coco_ground_truth
from detkit.evaluation.coco.results import coco_protocol
from detkit.evaluation.detections import detections_from_instances
from detkit.evaluation.report.analysis import metrics_of
from detkit.evaluation.report.matching import Matching
from tests.evaluation.coco import test_scoring


def matching_of(name, outputs, task="bbox", **protocol):
    """The matching of outputs (instances by image id) on a registered data set."""
    truth = load_coco_ground_truth(name)
    fields = ["pred_masks", "pred_keypoints"]
    detections = [
        detections_from_instances(image_id, instances, name, truth.class_names, fields)
        for image_id, instances in outputs.items()
    ]
    return Matching(truth, detections, coco_protocol(**protocol), task)


@pytest.mark.parametrize("seed", range(8))
def test_ap_of_boxes_is_that_of_the_evaluator(seed, register, random_problem, make_instances):
    records, detections_of = random_problem(seed)
    name = register(records, ("a", "b", "c", "d"))
    outputs = {image_id: make_instances(*found) for image_id, found in detections_of.items()}
    rules = {
        "max_dets_per_image": [100, 7][seed % 2],
        "iou_thresholds": [[], [0.3, 0.5]][seed // 4],
    }
    expected = test_scoring.run(COCOEvaluator(name, ["bbox"], **rules), outputs)["bbox"]
    assert metrics_of(matching_of(name, outputs, **rules)) == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )


@pytest.mark.parametrize("task", ["segm", "keypoints"])
@pytest.mark.parametrize("seed", range(4))
def test_ap_of_masks_and_keypoints_is_that_of_the_evaluator(seed, task, register):
    records, outputs = test_scoring.random_problem(seed)
    name = register(records, test_scoring.CLASSES)
    rules = {"kpt_oks_sigmas": test_scoring.SIGMAS, "area_ranges": [["tiny", 0, 300]]}
    expected = test_scoring.run(COCOEvaluator(name, [task], **rules), outputs)[task]
    assert metrics_of(matching_of(name, outputs, task, **rules)) == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )


def test_objects_out_of_a_range_are_taken_only_when_there_is_no_other(
    register, make_record, make_instances
):
    # The first detection covers the large object better, but only the small one counts: it gets
    # that, and the second one, which covers both, is left with the large one and ignored.
    large, small = ([10, 10, 50, 50], 0), ([10, 10, 50, 40], 0)
    found = make_instances(([10, 10, 50, 48], 0, 0.9), ([10, 10, 50, 45], 0, 0.8))
    matching = matching_of(register([make_record(1, large, small)]), {1: found})
    assert matching.outcome.matches[0].tolist() == [0, 1]
    outcome = matching.outcome_of(np.array([False, True]), np.array([True, True]))
    assert outcome.matches[0].tolist() == [1, 0]
    assert outcome.is_hit[0].tolist() == [True, False]
    assert outcome.is_counted[0].tolist() == [True, False]
    assert outcome.num_objects.tolist() == [1, 0]


def test_no_detection_and_no_object_leave_nothing_to_match(register, make_record):
    matching = matching_of(register([make_record(1, ([0, 0, 9, 9], 0)), make_record(2)]), {})
    assert matching.outcome.matches.shape == (10, 0)
    assert [overlaps.shape for overlaps in matching.overlaps] == [(0, 1), (0, 0)]
    np.testing.assert_array_equal(matching.outcome.num_objects, [1, 0])
