import math

import numpy as np
import pytest

from detkit.evaluation.coco.results import (
    COCO_OKS_SIGMAS,
    CocoProtocol,
    CocoScores,
    area_suffix,
    coco_metrics,
    coco_protocol,
    coco_recalls,
    coco_result_dicts,
    instances_to_coco_json,
)
from detkit.evaluation.detections import detections_from_instances


def scores_of_two_classes():
    """The first class has precision 0.5 throughout, 1 at the first threshold; the second has no ground truth."""
    precision = np.full((10, 101, 2, 4, 3), -1.0)
    precision[:, :, 0] = 0.5
    precision[0, :, 0] = 1.0
    precision[:, :, :, 1] = -1.0  # no small objects
    recall = np.full((10, 2, 4, 3), -1.0)
    recall[:, 0] = [0.1, 0.2, 0.4]
    return CocoScores(precision, recall, [1, 10, 100])


def test_what_has_no_ground_truth_is_nan_and_does_not_count():
    metrics = coco_metrics(scores_of_two_classes(), ["cat", "dog"])
    assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cat", "AP-dog"]
    assert metrics["AP"] == metrics["AP-cat"] == metrics["APm"] == pytest.approx(55)
    assert (metrics["AP50"], metrics["AP75"]) == (100, 50)
    assert math.isnan(metrics["APs"])
    assert math.isnan(metrics["AP-dog"])


def test_recall_is_given_at_each_limit():
    recalls = coco_recalls(scores_of_two_classes())
    assert {name: round(value) for name, value in recalls.items()} == {
        "AR@1": 10,
        "AR@10": 20,
        "AR@100": 40,
        "ARs": 40,
        "ARm": 40,
        "ARl": 40,
    }


def test_result_dicts_have_the_ids_of_the_data_set(make_instances):
    instances = make_instances(([1, 2, 4, 6], 1, 0.5))
    detections = detections_from_instances("a", instances, "data", ["cat", "dog"])
    (result,) = coco_result_dicts([detections], {"a": 17}, [3, 8])
    assert result == {"image_id": 17, "category_id": 8, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}


def test_instances_as_json_keep_contiguous_ids(make_instances):
    (result,) = instances_to_coco_json(make_instances(([1, 2, 4, 6], 1, 0.5)), "a")
    assert result == {"image_id": "a", "category_id": 1, "bbox": [1.0, 2.0, 3.0, 4.0], "score": 0.5}


def test_no_instances_give_no_results(make_instances):
    assert instances_to_coco_json(make_instances(), 1) == []


@pytest.mark.parametrize(
    ("max_dets", "limits"),
    [
        (1, [1]),
        (2, [1, 2]),
        (10, [1, 10]),
        (11, [1, 10, 11]),
        (100, [1, 10, 100]),
        (1000, [1, 10, 1000]),
    ],
)
def test_last_limit_is_the_one_asked_for(max_dets, limits):
    assert CocoProtocol(max_dets=max_dets).limits("bbox") == limits


def test_without_changes_the_rules_are_those_of_coco():
    assert coco_protocol() == CocoProtocol()
    assert CocoProtocol().limits("segm") == [1, 10, 100]
    assert CocoProtocol().limits("keypoints") == [20]
    assert list(CocoProtocol().area_ranges_of("keypoints")) == ["all", "medium", "large"]


def test_sigmas_are_those_of_pycocotools():
    from pycocotools.cocoeval import Params

    assert Params("keypoints").kpt_oks_sigmas.tolist() == list(COCO_OKS_SIGMAS)


def test_keypoints_are_limited_by_both_limits():
    assert coco_protocol(max_dets_per_image=5).limits("keypoints") == [5]
    assert coco_protocol(keypoint_max_dets_per_image=50).limits("keypoints") == [50]


def test_areas_of_ones_own_count_for_every_task():
    protocol = coco_protocol(area_ranges=[["tiny", 0, 64], ["rest", 64, 1e10]])
    assert dict(protocol.area_ranges) == {"all": (0, 1e10), "tiny": (0, 64), "rest": (64, 1e10)}
    assert protocol.area_ranges_of("keypoints") == protocol.area_ranges_of("bbox")
    assert (area_suffix("tiny"), area_suffix("small"), area_suffix("all")) == ("_tiny", "s", "")


def test_full_overlap_is_a_threshold_like_others():
    assert coco_protocol(iou_thresholds=[0.5, 1.0]).iou_thresholds == (0.5, 1.0)


def test_each_threshold_of_ones_own_is_named():
    protocol = coco_protocol(iou_thresholds=[0.3, 0.5])
    assert protocol.named_thresholds == protocol.iou_thresholds == (0.3, 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"iou_thresholds": [0.0]},
            r"TEST.IOU_THRESHOLDS .* in \(0, 1\], got \[0.0\]",
            id="threshold 0",
        ),
        pytest.param(
            {"iou_thresholds": [0.5, 0.5]},
            "TEST.IOU_THRESHOLDS .* must rise",
            id="thresholds repeat",
        ),
        pytest.param(
            {"area_ranges": [["a", 5, 5]]},
            r"TEST.AREA_RANGES .* got \['a', 5, 5\]",
            id="empty range",
        ),
        pytest.param(
            {"area_ranges": [["a-b", 5, 6]]},
            r"TEST.AREA_RANGES .* got \['a-b'",
            id="name with a dash",
        ),
        pytest.param(
            {"area_ranges": [["a", 5]]}, r"TEST.AREA_RANGES .* got \['a', 5\]", id="two parts"
        ),
        pytest.param({"area_ranges": ["abc"]}, "TEST.AREA_RANGES .* got 'abc'", id="string"),
        pytest.param({"area_ranges": [["a", "0", 6]]}, "TEST.AREA_RANGES .* got", id="no numbers"),
        pytest.param({"area_ranges": [["all", 0, 6]]}, "TEST.AREA_RANGES .* 'all' twice", id="all"),
        pytest.param(
            {"kpt_oks_sigmas": [0.1, 0.0]},
            r"TEST.KEYPOINT_OKS_SIGMAS .* above 0 and finite, got",
            id="sigma 0",
        ),
        pytest.param(
            {"max_dets_per_image": 0},
            "max_dets_per_image must be at least 1, got 0",
            id="no detections",
        ),
        pytest.param(
            {"keypoint_max_dets_per_image": 0},
            "keypoint_max_dets_per_image must be",
            id="no keypoints",
        ),
    ],
)
def test_bad_rules_are_errors_that_name_the_key(arguments, message):
    with pytest.raises(ValueError, match=message):
        coco_protocol(**arguments)
