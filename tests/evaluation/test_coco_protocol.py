import pytest

from detkit.evaluation.coco_protocol import (
    COCO_OKS_SIGMAS,
    CocoProtocol,
    area_suffix,
    coco_protocol,
    detection_limits,
)


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
    assert detection_limits(max_dets) == limits


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
            r"TEST.KEYPOINT_OKS_SIGMAS .* above 0, got",
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
