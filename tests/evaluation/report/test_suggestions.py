"""What the error report suggests, and on what evidence."""

import numpy as np
import pytest

import detkit.modeling  # noqa: F401 - declares the architectures, as the command line does
from detkit.config import get_cfg
from detkit.evaluation.report import ReportOptions
from detkit.evaluation.report.report import analyse
from tests.evaluation.report.test_matching import matching_of

NAMES = ("cat", "dog")


@pytest.fixture
def suggested(register, make_record, make_instances):
    """A function that gives the suggestions for objects and detections of one image after another."""

    def run(images, threshold=0.5, resize=1.0, **settings):
        name = register([make_record(i, *objects) for i, (objects, _) in enumerate(images)], NAMES)
        outputs = {i: make_instances(*found) for i, (_, found) in enumerate(images)}
        cfg = get_cfg()
        for key, value in settings.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        options = ReportOptions(confidence_threshold=threshold, num_samples=2)
        scale = np.full(len(images), resize)
        found = analyse(matching_of(name, outputs), cfg, options, scale)["suggestions"]
        for suggestion in found:
            for key in suggestion["keys"]:
                get_cfg().get_by_full_key(key)  # there is such a key
        return found

    return run


def the_one(found, start):
    (suggestion,) = [s for s in found if s["text"].startswith(start)]
    return suggestion


def test_small_objects_that_are_missed_after_the_resize(suggested):
    small, large = [0, 0, 10, 10], [20, 20, 90, 90]
    images = [([(small, 0), (large, 0)], [(large, 0, 0.9)])] * 5
    images += [([(large, 0)], [])] * 5
    suggestion = the_one(suggested(images, resize=1.5), "Small objects are missed")
    assert (
        suggestion["evidence"]
        == "50 % of the 10 missed objects are under 16 pixels a side after the resize"
    )
    assert "INPUT.MIN_SIZE_TEST (now 800" in suggestion["text"]
    assert "or add an anchor of 16" in suggestion["text"]
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in suggestion["keys"]
    # 16 pixels are not under 16.
    assert not [s for s in suggested(images, resize=1.6) if "Small" in s["text"]]
    fcos = the_one(suggested(images, MODEL__META_ARCHITECTURE="FCOS"), "Small objects")
    assert "anchor" not in fcos["text"]


def test_classes_that_are_taken_for_each_other(suggested):
    box = [10, 10, 50, 50]
    images = [([(box, 0)], [(box, 1, 0.9)])] * 3 + [([(box, 0)], [(box, 0, 0.9)])]
    suggestion = the_one(suggested(images), "cat is taken for dog")
    assert suggestion["evidence"] == "3 of 4 objects of class cat"
    assert not [s for s in suggested(images[1:]) if "taken for dog" in s["text"]]  # 2 are chance


def test_class_that_is_hardly_found(suggested):
    box, other = [10, 10, 50, 50], [60, 60, 90, 90]
    images = [([(box, 0), (other, 1)], [(box, 0, 0.9)])] * 15
    images += [([(box, 0), (other, 1)], [(box, 0, 0.9), (other, 1, 0.8)])] * 5
    first = suggested(images)[0]
    assert first["text"].startswith("dog is hardly found")
    assert first["evidence"] == "recall is 25 % of its 20 objects, and 62 % of all"
    assert first["cost"] == pytest.approx((100 - 100 * 26 / 101) / 2)
    assert not [s for s in suggested(images[5:]) if "hardly" in s["text"]]  # 15 are few


def test_duplicates_name_the_threshold_of_the_model(suggested):
    box, near = [10, 10, 50, 50], [12, 10, 52, 50]
    images = [([(box, 0)], [(box, 0, 0.9), (near, 0, 0.8)])] * 4
    # The last object comes after the duplicates of the others.
    found = suggested([*images, ([(box, 0)], [(box, 0, 0.7)])])
    assert the_one(found, "Objects are found more than once")["keys"] == [
        "MODEL.ROI_HEADS.NMS_THRESH_TEST"
    ]
    found = suggested(
        [*images, ([(box, 0)], [(box, 0, 0.7)])], MODEL__META_ARCHITECTURE="RetinaNet"
    )
    assert (
        "lower MODEL.RETINANET.NMS_THRESH_TEST (now 0.5)"
        in the_one(found, "Objects are found more")["text"]
    )


def test_long_objects_need_other_anchors(suggested):
    images = [([([0, 10, 95, 25], 0)], []), ([([10, 0, 20, 90], 0)], [])] * 2
    suggestion = the_one(suggested(images), "Long objects are missed")
    assert suggestion["evidence"] == "4 of 4 missed objects have ratios of 0.16 to 9"
    anchors = "[[0.1, 1.0, 5.0]]"
    found = suggested(images, MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=anchors)
    assert not [s for s in found if s["text"].startswith("Long")]


def test_recall_of_small_objects_counts_where_they_are_not_tiny(suggested):
    small, large = [0, 0, 30, 30], [40, 40, 90, 90]
    images = [([(small, 0), (large, 0)], [(large, 0, 0.9)])] * 5
    images += [([(small, 0), (large, 0)], [(small, 0, 0.9), (large, 0, 0.9)])] * 15
    suggestion = the_one(suggested(images, resize=2.0), "Small objects are missed")
    assert suggestion["evidence"] == "recall is 75 % of the small objects, and 100 % of the others"
    assert not [s for s in suggested(images[1:], resize=2.0) if "Small" in s["text"]]  # too few


@pytest.mark.parametrize(
    ("other", "start", "evidence"),
    [
        ([20, 10, 60, 50], "Objects that overlap", "recall is 50 % of the objects that others overlap by an IoU above 0.3, and 100 % of the rest"),
        ([40, 10, 80, 50], "Objects that touch", "recall is 50 % of the objects that others overlap, and 100 % of those alone"),
    ],
    ids=["crowded", "touching"],
)  # fmt: skip
def test_crowding(other, start, evidence, suggested):
    box = [10, 10, 50, 50]
    images = [([(box, 0), (other, 1)], [(box, 0, 0.9)])] * 10
    images += [([(box, 0)], [(box, 0, 0.9)])] * 20
    assert the_one(suggested(images), start)["evidence"] == evidence


def test_low_scores_few_objects_and_full_images(suggested):
    box, other = [10, 10, 50, 50], [60, 60, 90, 90]
    images = [([(box, 0), (other, 0)], [(box, 0, 0.3), (other, 0, 0.2)])] * 2
    found = suggested(images, TEST__DETECTIONS_PER_IMAGE="2")
    assert (
        the_one(found, "Many missed objects were found")["evidence"]
        == "4 of 4 missed objects have a detection that fits"
    )
    assert the_one(found, "The AP of a class rests")["evidence"] == "cat (4)"
    assert (
        the_one(found, "Raise TEST.DETECTIONS_PER_IMAGE (now 2)")["evidence"]
        == "2 of 2 images have as many detections"
    )
    assert not [s for s in suggested(images) if s["text"].startswith("Raise")]


def test_background_and_places_and_the_order_by_cost(suggested):
    box, moved, away = [10, 10, 30, 30], [18, 10, 38, 30], [60, 60, 80, 80]
    images = [([(box, 0)], [(moved, 0, 0.9)])] * 9 + [
        ([(box, 0)], [(box, 0, 0.8), (away, 0, 0.95)])
    ] * 3
    found = suggested(images)
    costs = [s["cost"] for s in found if np.isfinite(s["cost"])]
    assert costs == sorted(costs, reverse=True)
    assert "DATALOADER.FILTER_EMPTY_ANNOTATIONS" in the_one(found, "Background is taken")["keys"]
    place = the_one(found, "Objects are found, but not well enough placed")
    assert place["evidence"].startswith(
        "9 errors of this type, of any score; without them AP50 would gain "
    )
    assert place["cost"] == found[0]["cost"]


def test_detector_without_errors_gets_no_advice_but_on_few_objects(suggested):
    box = [10, 10, 50, 50]
    assert suggested([([(box, 0)], [(box, 0, 1.0)])] * 30) == []
