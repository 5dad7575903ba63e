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


def evaluated(evaluator, outputs):
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(8))
def test_ap_of_boxes_is_that_of_the_evaluator(seed, register, random_problem, make_instances):
    records, detections_of = random_problem(seed)
    name = register(records, ("a", "b", "c", "d"))
    outputs = {image_id: make_instances(*found) for image_id, found in detections_of.items()}
    rules = {
        "max_dets_per_image": [100, 7][seed % 2],
        "iou_thresholds": [[], [0.3, 0.5]][seed // 4],
    }
    expected = evaluated(COCOEvaluator(name, ["bbox"], **rules), outputs)["bbox"]
    assert metrics_of(matching_of(name, outputs, **rules)) == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )


@pytest.mark.parametrize("task", ["segm", "keypoints"])
@pytest.mark.parametrize("seed", range(4))
def test_ap_of_masks_and_keypoints_is_that_of_the_evaluator(seed, task, register):
    records, outputs = test_scoring.random_problem(seed)
    name = register(records, test_scoring.CLASSES)
    rules = {"kpt_oks_sigmas": test_scoring.SIGMAS, "area_ranges": [["tiny", 0, 300]]}
    expected = evaluated(COCOEvaluator(name, [task], **rules), outputs)[task]
    assert metrics_of(matching_of(name, outputs, task, **rules)) == pytest.approx(
        expected, abs=1e-9, nan_ok=True
    )


def test_no_detection_and_no_object_leave_nothing_to_match(register, make_record):
    matching = matching_of(register([make_record(1, ([0, 0, 9, 9], 0)), make_record(2)]), {})
    assert matching.outcome.matches.shape == (10, 0)
    assert [overlaps.shape for overlaps in matching.overlaps] == [(0, 1), (0, 0)]
    np.testing.assert_array_equal(matching.outcome.num_objects, [1, 0])
