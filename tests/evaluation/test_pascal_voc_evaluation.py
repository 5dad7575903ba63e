import logging
import math

import numpy as np
import pytest

from detkit.evaluation import PascalVOCDetectionEvaluator
from detkit.evaluation.pascal_voc_evaluation import voc_average_precision
from detkit.structures import Instances
from tests.helpers import slow_voc_average_precision

BOX = [10, 10, 50, 50]
FAR = [60, 60, 100, 100]


def slow_scores(records, detections_of, num_classes, threshold, use_07_metric):
    scores = []
    for class_id in range(num_classes):
        objects = [
            (r["image_id"], a["bbox"], bool(a.get("difficult") or a.get("iscrowd")))
            for r in records
            for a in r["annotations"]
            if a["category_id"] == class_id
        ]
        # Equal scores rank in the order of the data set's images.
        found = [
            (r["image_id"], box, np.float32(value))
            for r in records
            for box, predicted, value in detections_of.get(r["image_id"], [])
            if predicted == class_id
        ]
        if all(is_ignored for _, _, is_ignored in objects):
            scores.append(math.nan)
        else:
            scores.append(
                100 * slow_voc_average_precision(objects, found, threshold, use_07_metric)
            )
    return scores


@pytest.mark.parametrize("use_07_metric", [False, True], ids=["area", "11 points"])
@pytest.mark.parametrize("seed", range(15))
def test_scores_are_those_of_the_slow_reference(
    seed, use_07_metric, random_problem, register, score
):
    records, detections_of = random_problem(seed)
    name = register(records, ["a", "b", "c", "d"])
    metrics = score(PascalVOCDetectionEvaluator(name, use_07_metric=use_07_metric), detections_of)[
        "bbox"
    ]
    at_50 = slow_scores(records, detections_of, 4, 0.5, use_07_metric)
    at_75 = slow_scores(records, detections_of, 4, 0.75, use_07_metric)
    np.testing.assert_allclose([metrics[f"AP50-{c}"] for c in "abcd"], at_50, atol=1e-9)
    valid = [c for c in range(4) if not math.isnan(at_50[c])]
    if valid:
        assert metrics["AP50"] == pytest.approx(np.mean([at_50[c] for c in valid]), abs=1e-9)
        assert metrics["AP75"] == pytest.approx(np.mean([at_75[c] for c in valid]), abs=1e-9)


def test_ap_averages_ten_thresholds_and_the_classes_with_ground_truth(
    random_problem, register, score
):
    records, detections_of = random_problem(9)
    name = register(records, ["a", "b", "c", "d"])
    metrics = score(PascalVOCDetectionEvaluator(name), detections_of)["bbox"]
    thresholds = np.linspace(0.5, 0.95, 10)
    per_class = np.mean(
        [slow_scores(records, detections_of, 4, t, False) for t in thresholds], axis=0
    )
    np.testing.assert_allclose([metrics[f"AP-{c}"] for c in "abcd"], per_class, atol=1e-9)
    assert metrics["AP"] == pytest.approx(np.nanmean(per_class), abs=1e-9)
    assert metrics["AP"] > 0


# Ranks: right, wrong, right, of four objects: recall 1/4, 1/4, 1/2 at precision 1, 1/2, 2/3.
@pytest.mark.parametrize(
    ("use_07_metric", "expected"),
    [
        pytest.param(False, 1 / 4 * 1 + 1 / 4 * 2 / 3, id="area"),
        # Recall 0, 0.1, 0.2 reach precision 1; 0.3, 0.4, 0.5 reach 2/3; the other five nothing.
        pytest.param(True, (3 * 1 + 3 * 2 / 3) / 11, id="11 points"),
    ],
)
def test_hand_worked_curve(use_07_metric, expected, register, make_record, score):
    objects = [([20 * i, 0, 20 * i + 10, 10], 0) for i in range(4)]
    name = register([make_record("a", *objects[:2]), make_record("b", *objects[2:])])
    found = {"a": [(objects[0][0], 0, 0.9), (FAR, 0, 0.8)], "b": [(objects[2][0], 0, 0.7)]}
    metrics = score(PascalVOCDetectionEvaluator(name, use_07_metric=use_07_metric), found)["bbox"]
    assert metrics["AP50"] == pytest.approx(100 * expected)
    assert metrics["AP"] == pytest.approx(100 * expected)


@pytest.mark.parametrize(
    ("year", "expected"), [(2006, 50.0), (2007, 100 * 6 / 11), (2012, 50.0), (None, 50.0)]
)
def test_year_chooses_the_metric(year, expected, register, make_record, score):
    name = register(
        [make_record(1, (BOX, 0), (FAR, 0))], **({} if year is None else {"year": year})
    )
    assert score(PascalVOCDetectionEvaluator(name), {1: [(BOX, 0, 0.5)]})["bbox"][
        "AP50"
    ] == pytest.approx(expected)


def test_second_detection_of_an_object_is_wrong(register, make_record, score):
    name = register([make_record(1, (BOX, 0), (FAR, 0))])
    found = {1: [(BOX, 0, 0.9), (BOX, 0, 0.8), (FAR, 0, 0.7)]}
    expected = 1 / 2 + 1 / 2 * 2 / 3
    assert score(PascalVOCDetectionEvaluator(name), found)["bbox"]["AP50"] == pytest.approx(
        100 * expected
    )


def test_detection_does_not_fall_back_on_the_object_it_overlaps_less(register, make_record, score):
    # Both detections overlap the first object most, and the second one (shifted by a fifth) by more than half.
    name = register([make_record(1, ([0, 0, 50, 50], 0), ([10, 0, 60, 50], 0))])
    found = {1: [([0, 0, 50, 50], 0, 0.9), ([1, 0, 51, 50], 0, 0.8)]}
    assert score(PascalVOCDetectionEvaluator(name), found)["bbox"]["AP50"] == pytest.approx(50)


@pytest.mark.parametrize(("difficult", "expected"), [([0, 1], 100), ([1, 0], 0)])
def test_of_equal_overlaps_the_first_object_counts(
    difficult, expected, register, make_record, score
):
    objects = [(BOX, 0, {"difficult": value}) for value in difficult]
    name = register([make_record(1, *objects)])
    metrics = score(PascalVOCDetectionEvaluator(name), {1: [(BOX, 0, 0.5)]})["bbox"]
    assert metrics["AP"] == pytest.approx(expected)


def test_overlap_equal_to_the_threshold_is_enough(register, make_record, score):
    # Widths 13 of 20: 0.65, which is less than 0.65 in float32.
    name = register([make_record(1, ([0, 0, 20, 10], 0))])
    metrics = score(PascalVOCDetectionEvaluator(name), {1: [([0, 0, 13, 10], 0, 0.5)]})["bbox"]
    assert metrics["AP"] == pytest.approx(100 * 4 / 10)


@pytest.mark.parametrize("key", ["difficult", "iscrowd"])
def test_difficult_objects_count_neither_way(key, register, make_record, score):
    name = register([make_record(1, (BOX, 0), (FAR, 0, {key: 1}))])
    without = score(PascalVOCDetectionEvaluator(name), {1: [(BOX, 0, 0.5)]})
    with_it = score(
        PascalVOCDetectionEvaluator(name), {1: [(BOX, 0, 0.5), (FAR, 0, 0.9), (FAR, 0, 0.8)]}
    )
    assert without["bbox"]["AP"] == with_it["bbox"]["AP"] == pytest.approx(100)


def test_class_with_difficult_objects_only_is_nan(register, make_record, score):
    name = register([make_record(1, (BOX, 0), (FAR, 1, {"difficult": 1}))])
    metrics = score(PascalVOCDetectionEvaluator(name), {1: [(BOX, 0, 0.5), (FAR, 1, 0.5)]})["bbox"]
    assert math.isnan(metrics["AP-dog"])
    assert metrics["AP"] == pytest.approx(100)


def test_no_predictions_score_zero_and_the_reason_is_logged(register, make_record, score, caplog):
    name = register([make_record(1, (BOX, 0))])
    with caplog.at_level(logging.WARNING):
        metrics = score(PascalVOCDetectionEvaluator(name), {1: []})["bbox"]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == 0.0
    assert "AP is 0" in caplog.text


@pytest.mark.parametrize(
    "records", [[], [{"file_name": "1.jpg", "image_id": 1}]], ids=["no images", "not annotated"]
)
def test_without_ground_truth_ap_is_nan(records, register, score, caplog):
    metrics = score(PascalVOCDetectionEvaluator(register(records)), {})["bbox"]
    assert all(math.isnan(value) for value in metrics.values())
    assert "has no ground truth" in caplog.text


def test_order_of_the_images_does_not_matter(random_problem, register, score):
    records, detections_of = random_problem(9)
    evaluator = PascalVOCDetectionEvaluator(register(records, ["a", "b", "c", "d"]))
    backwards = dict(reversed(detections_of.items()))
    np.testing.assert_equal(score(evaluator, detections_of), score(evaluator, backwards))


def test_writes_files_for_the_development_kit(register, make_record, score, tmp_path):
    name = register([make_record("000005", (BOX, 0))], split="test")
    found = {"000005": [([0, 0, 10.5, 20], 1, 0.25)]}
    score(PascalVOCDetectionEvaluator(name, output_dir=str(tmp_path)), found)
    assert (
        tmp_path / "voc_results/comp4_det_test_dog.txt"
    ).read_text() == "000005 0.25 1.0 1.0 10.5 20.0\n"
    assert (tmp_path / "voc_results/comp4_det_test_cat.txt").read_text() == ""


def test_average_precision_of_a_curve_without_detections_is_zero():
    assert voc_average_precision(np.zeros(0), np.zeros(0), use_07_metric=True) == 0
    assert voc_average_precision(np.zeros(0), np.zeros(0), use_07_metric=False) == 0


def test_recall_of_three_tenths_does_not_reach_the_fourth_point():
    # The kit's fourth point is 3 * 0.1 = 0.30000000000000004; the second is reached exactly.
    precision = np.ones(3)
    recall = np.array([0.05, 0.1, 0.3])
    assert voc_average_precision(recall, precision, use_07_metric=True) == pytest.approx(3 / 11)


def test_class_name_with_a_slash_makes_no_folder(register, make_record, score, tmp_path):
    name = register([make_record(1, (BOX, 0))], ["car/truck"], split="test")
    score(PascalVOCDetectionEvaluator(name, output_dir=str(tmp_path)), {1: [(BOX, 0, 0.5)]})
    (path,) = (tmp_path / "voc_results").iterdir()
    assert path.name == "comp4_det_test_car_truck.txt"


def test_output_without_instances_is_an_error(register, make_record):
    evaluator = PascalVOCDetectionEvaluator(register([make_record(1)]))
    with pytest.raises(ValueError, match=r"needs 'instances' .* got the keys \['proposals'\]"):
        evaluator.process([{"image_id": 1}], [{"proposals": Instances((9, 9))}])


def test_class_of_an_object_outside_the_names_is_an_error(register, make_record):
    name = register([make_record("x", (BOX, 2))])
    with pytest.raises(
        ValueError, match=r"has 2 class names, but an object of class id 2 in image 'x' \(x.jpg\)"
    ):
        PascalVOCDetectionEvaluator(name)


def test_image_id_that_two_images_share_is_an_error(register, make_record):
    name = register([make_record("x"), make_record("x")])
    with pytest.raises(ValueError, match="uses image id 'x' twice"):
        PascalVOCDetectionEvaluator(name)


@pytest.mark.parametrize(("num_classes", "shown"), [(30, 3), (31, 1)])
def test_long_tables_are_in_the_file_only(num_classes, shown, register, score, caplog):
    record = {"file_name": "1.jpg", "image_id": 1, "height": 100, "width": 100, "annotations": []}
    name = register([record], [f"class {i}" for i in range(num_classes)])
    with caplog.at_level(logging.INFO, logger="detkit"):
        score(PascalVOCDetectionEvaluator(name), {})
    tables = [r for r in caplog.records if r.getMessage().startswith("Pascal VOC all-point")]
    assert len(tables) == 3
    assert sum(getattr(table, "console", None) != "" for table in tables) == shown
