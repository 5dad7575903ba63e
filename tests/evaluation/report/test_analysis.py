"""The numbers of the error report: against each other, the library tidecv, and worked out by hand."""

import math

import numpy as np
import pytest

from detkit.evaluation.report import analysis
from detkit.evaluation.report.analysis import ERROR_TYPES
from tests.evaluation.report.test_matching import matching_of

A, B = 0, 1
BOX, MOVED, AWAY = (
    [10, 10, 30, 30],
    [18, 10, 38, 30],
    [60, 60, 80, 80],
)  # IoU of the first two: 0.43

SQUARE = [0, 0, 10, 10]


@pytest.fixture
def match(register, make_record, make_instances):
    """A function that matches detections (box, class, score) with objects (box, class) of one image."""

    def run(objects, *detections):
        name = register([make_record(1, *objects)])
        return matching_of(name, {1: make_instances(*detections)})

    return run


@pytest.fixture
def random_matching(register, random_problem, make_instances):
    """A function that gives a matching of a random problem."""

    def run(seed):
        records, detections_of = random_problem(seed)
        name = register(records, ("a", "b", "c", "d"))
        return matching_of(name, {i: make_instances(*d) for i, d in detections_of.items()})

    return run


@pytest.mark.parametrize(
    ("objects", "detection", "expected"),
    [
        pytest.param([(BOX, A)], (BOX, B, 0.5), "classification", id="classification"),
        pytest.param([(BOX, A)], (MOVED, A, 0.5), "localisation", id="localisation"),
        pytest.param([(BOX, A)], (MOVED, B, 0.5), "both", id="both"),
        pytest.param([(BOX, A)], (BOX, A, 0.5), "duplicate", id="duplicate"),
        pytest.param([(BOX, A)], (AWAY, A, 0.5), "background", id="background"),
        pytest.param([], (AWAY, A, 0.5), "background", id="no-object"),
        pytest.param([(BOX, A, {"iscrowd": 1})], (BOX, A, 0.5), None, id="crowd"),
        pytest.param([(AWAY, A), (MOVED, B)], (BOX, A, 0.5), "both", id="other-class-near"),
        pytest.param([(SQUARE, A)], ([0, 0, 10, 100], A, 0.5), "localisation", id="iou-0.1"),
        pytest.param([(SQUARE, A)], ([0, 0, 10, 101], A, 0.5), "background", id="iou-below-0.1"),
        pytest.param([(SQUARE, A)], ([0, 0, 10, 20], A, 0.5), "duplicate", id="iou-0.5"),
        pytest.param([(SQUARE, A)], ([0, 0, 10, 20], B, 0.5), "classification", id="other-iou-0.5"),
    ],
)
def test_error_types(objects, detection, expected, match):
    others = [(*objects[0], 0.9)] if expected == "duplicate" else []
    errors = analysis.error_types(match(objects, *others, detection))
    assert errors.types[-1] == (-1 if expected is None else ERROR_TYPES.index(expected))


def test_missed_objects_are_those_that_no_other_error_is_about(match):
    objects = [(BOX, A), (AWAY, A), ([10, 60, 30, 80], A, {"iscrowd": 1})]
    errors = analysis.error_types(match(objects, (MOVED, A, 0.5)))
    assert errors.is_missed.tolist() == [False, True, False]
    assert errors.targets.tolist() == [0]


def test_costs_of_errors_by_hand(match):
    # Precision at the objects found: 1/2, then 2/3 of three; the third is missed.
    objects = [(BOX, A), (AWAY, A), ([10, 60, 30, 80], A)]
    found = [(MOVED, A, 0.9), (BOX, A, 0.8), (AWAY, A, 0.7)]
    matching = match(objects, *found)
    costs = analysis.error_costs(matching, analysis.error_types(matching))
    points = lambda precision, recall: 100 * precision * (math.floor(recall * 100) + 1) / 101  # noqa: E731
    assert costs["AP"] == pytest.approx(points(2 / 3, 2 / 3))
    # The object is found already, so that the detection at the wrong place can only go.
    assert costs["types"]["localisation"]["cost"] == pytest.approx(points(1, 2 / 3) - costs["AP"])
    assert costs["types"]["missed"]["cost"] == pytest.approx(points(2 / 3, 1) - costs["AP"])
    assert costs["false_positives"] == pytest.approx(points(1, 2 / 3) - costs["AP"])
    assert {name: row["count"] for name, row in costs["types"].items() if row["count"]} == {
        "localisation": 1,
        "missed": 1,
    }


def test_of_two_errors_about_an_object_the_better_score_could_find_it(match):
    matching = match([(BOX, A)], (MOVED, A, 0.9), (MOVED, A, 0.8))
    costs = analysis.error_costs(matching, analysis.error_types(matching))
    assert costs["types"]["localisation"] == {"count": 2, "cost": pytest.approx(100)}
    assert costs["types"]["missed"]["count"] == 0
    matching = match([(BOX, A)], (MOVED, A, 0.8), (BOX, B, 0.9))
    costs = analysis.error_costs(matching, analysis.error_types(matching))["types"]
    assert (costs["classification"]["cost"], costs["localisation"]["cost"]) == (
        pytest.approx(100),
        0,
    )


@pytest.mark.parametrize("seed", range(6))
def test_errors_are_those_of_tidecv(seed, register, make_record, make_instances, monkeypatch):
    tidecv = pytest.importorskip("tidecv", reason="tidecv is not installed")
    # COCO's recall points come from linspace, which differs from this in the last bit.
    monkeypatch.setattr(analysis, "RECALL_POINTS", np.arange(101) / 100)
    rng = np.random.default_rng(seed)
    records, outputs = [], {}
    truth, found = tidecv.Data("truth"), tidecv.Data("found")
    for image in range(12):
        boxes = rng.uniform(0, 60, (5, 4)) + np.array([0, 0, 20, 20])
        boxes[:, 2:] += boxes[:, :2]
        classes = [0, 1, 2, *rng.integers(0, 3, 2)]
        records.append(make_record(image, *zip(boxes, map(int, classes), strict=True)))
        detections = []
        for box, class_id in [*zip(boxes, classes, strict=True)] * 3:
            moved = np.float32(box + rng.normal(0, rng.choice([1, 8, 30]), 4))
            moved[2:] = np.maximum(moved[2:], moved[:2] + 3)
            class_id = int(class_id if rng.random() < 0.8 else rng.integers(3))
            detections.append((moved.tolist(), class_id, float(np.float32(rng.random()))))
        outputs[image] = make_instances(*detections)
        for box, class_id in zip(boxes.astype(float), classes, strict=True):
            truth.add_ground_truth(image, int(class_id), [*box[:2], *(box[2:] - box[:2])])
        for box, class_id, score in detections:
            box = np.array(box)
            found.add_detection(image, class_id, score, [*box[:2], *(box[2:] - box[:2])])
    matching = matching_of(register(records, ("a", "b", "c")), outputs)
    costs = analysis.error_costs(matching, analysis.error_types(matching))
    run = tidecv.TIDE().evaluate(truth, found, mode=tidecv.TIDE.BOX)
    expected_costs, expected_counts = run.fix_main_errors(), run.count_errors()
    short = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), ERROR_TYPES, strict=True))
    assert costs["AP"] == pytest.approx(run.ap)
    for error, count in expected_counts.items():
        row = costs["types"][short[error.short_name]]
        assert row == {"count": count, "cost": pytest.approx(expected_costs[error], abs=1e-9)}
    special = {e.short_name: value for e, value in run.fix_special_errors().items()}
    assert costs["false_positives"] == pytest.approx(special["FalsePos"])
    assert costs["false_negatives"] == pytest.approx(special["FalseNeg"])


@pytest.mark.parametrize("seed", range(8))
def test_all_parts_of_the_report_agree(seed, random_matching):
    matching = random_matching(seed)
    objects = matching.outcome.num_objects
    for score in (0.0, 0.3, 0.55, 1.0):
        matrix = analysis.confusion_matrix(matching, score)
        np.testing.assert_array_equal(matrix[:-1].sum(axis=1), objects)
        for k in range(len(objects)):
            at = analysis.counts_of(matching, k).at(score)
            if objects[k]:
                assert matrix[k, k] / objects[k] == at["recall"]
            if matrix[:, k].sum():
                assert matrix[k, k] / matrix[:, k].sum() == at["precision"]
        together = analysis.counts_of(matching).at(score)
        assert np.trace(matrix) == pytest.approx(np.nan_to_num(together["recall"]) * objects.sum())
    errors = analysis.error_types(matching)
    is_false = matching.outcome.is_counted & ~matching.outcome.is_hit
    np.testing.assert_array_equal(errors.types >= 0, is_false[matching.index])
    bins = analysis.calibration(matching)["bins"]
    assert sum(row["detections"] for row in bins) == matching.outcome.is_counted[0].sum()
    by_size = {row["name"]: row for row in analysis.breakdown(matching, 0.5) if row["by"] == "size"}
    metrics = analysis.metrics_of(matching)
    for name, metric in (("small", "APs"), ("medium", "APm"), ("large", "APl")):
        assert by_size[name]["AP"] == pytest.approx(metrics[metric], nan_ok=True)


def test_aspects_and_crowding_share_out_all_objects(random_matching):
    matching = random_matching(1)
    for bins in (analysis.aspect_bins(matching), analysis.crowding_bins(matching)):
        np.testing.assert_array_equal(np.sum([inside for *_, inside, _ in bins], axis=0), 1)
        np.testing.assert_array_equal(np.sum([inside for *_, inside in bins], axis=0), 1)


def test_borders_of_aspects_belong_to_compact_boxes(match):
    sides = [(10, 20), (10, 21), (20, 10), (21, 10)]
    matching = match([([0, 0, w, h], A) for w, h in sides])
    inside = {name: objects.tolist() for name, _, objects, _ in analysis.aspect_bins(matching)}
    assert inside["tall"] == [False, True, False, False]
    assert inside["compact"] == [True, False, True, False]


def test_crowding_is_the_overlap_with_the_next_object(match):
    matching = match(
        [(BOX, A), (MOVED, B), (AWAY, A)], (AWAY, A, 0.9), (BOX, A, 0.8), ([0, 80, 9, 99], A, 0.7)
    )
    inside = {
        name: (objects.tolist(), found.tolist())
        for name, _, objects, found in analysis.crowding_bins(matching)
    }
    # Objects are in the order of their classes.
    assert inside["alone"] == ([False, True, False], [True, False, True])
    assert inside["crowded"] == ([True, False, True], [False, True, False])


def test_confusion_across_classes_goes_to_the_best_overlap(match):
    objects = [(BOX, A), (AWAY, A), ([10, 60, 30, 80], B)]
    found = [([11, 10, 31, 30], B, 0.9), (BOX, B, 0.8), (AWAY, A, 0.4), ([10, 60, 30, 80], B, 0.7)]
    matrix = analysis.confusion_matrix(match(objects, *found), 0.5)
    # One object of A is taken for B once, the other is missed at that score; the rest is background.
    assert matrix.tolist() == [[0, 1, 1], [0, 1, 0], [0, 1, 0]]


def test_best_threshold_keeps_equal_scores_together(match):
    matching = match([(BOX, A), (AWAY, A)], (BOX, A, 0.5), (MOVED, A, 0.5), (AWAY, A, 0.4))
    counts = analysis.counts_of(matching, A)
    assert counts.best_threshold() == pytest.approx(0.4)
    assert counts.at(0.4) == {"precision": 2 / 3, "recall": 1.0, "f1": pytest.approx(0.8)}
    assert counts.at(0.5)["precision"] == 0.5
    assert math.isnan(analysis.counts_of(matching, B).best_threshold())
    # The hit alone would give the best F1; with the false ones of the same score, 0.9 does.
    others = [
        (box, A, 0.5) for box in (AWAY, SQUARE, [0, 50, 9, 60], [0, 70, 9, 80], [50, 0, 60, 9])
    ]
    matching = match([(BOX, A), (AWAY, A), ([90, 0, 99, 9], A)], (BOX, A, 0.9), *others)
    assert analysis.counts_of(matching, A).best_threshold() == pytest.approx(0.9)


def test_calibration_error_by_hand(match):
    matching = match([(BOX, A), (AWAY, A)], (BOX, A, 1.0), (MOVED, A, 0.75), (AWAY, A, 0.75))
    result = analysis.calibration(matching)
    assert result["expected_calibration_error"] == pytest.approx(2 / 3 * 0.25)
    assert result["bins"][9] == {
        "low": 0.9,
        "high": 1.0,
        "detections": 1,
        "mean_score": 1.0,
        "precision": 1.0,
    }


def one_object_per_image(register, make_record, make_instances, is_found):
    """Images of one object each, found or not; AP is the share of those found."""
    name = register([make_record(i, (BOX, A)) for i in range(len(is_found))], ("a",))
    found = [[(BOX, A, 0.9)] if hit else [] for hit in is_found]
    outputs = {i: make_instances(*d) for i, d in enumerate(found)}
    return matching_of(name, outputs, iou_thresholds=[0.5])


def test_resampling_each_image_once_gives_ap(random_matching, monkeypatch):
    matching = random_matching(5)
    identity = type("Rng", (), {"integers": lambda self, high, size: np.arange(size)})
    monkeypatch.setattr(analysis.np.random, "default_rng", lambda seed: identity())
    samples = analysis.bootstrap_ap(matching, 1)
    assert analysis.mean_over_classes(samples)[0] == pytest.approx(
        analysis.metrics_of(matching)["AP"]
    )


def test_intervals_cover(register, make_record, make_instances):
    # Of 50 images, each found with probability 0.6; the interval of 95 % should hold 60 nearly always.
    rng = np.random.default_rng(0)
    num_covered, widths = 0, []
    for _ in range(30):
        is_found = rng.random(50) < 0.6
        matching = one_object_per_image(register, make_record, make_instances, is_found)
        low, high = analysis.interval(
            analysis.mean_over_classes(analysis.bootstrap_ap(matching, 100))
        )
        num_covered += low <= 60 <= high
        widths.append(high - low)
    assert num_covered >= 25  # 28.5 expected; fewer than 25 have a probability of 0.3 %
    # Closed form: that of a share.
    assert np.mean(widths) == pytest.approx(2 * 196 * math.sqrt(0.6 * 0.4 / 50), rel=0.12)


def test_no_detection_and_no_object_give_nan_not_an_error(register, make_record):
    matching = matching_of(register([make_record(1)]), {})
    assert math.isnan(analysis.metrics_of(matching)["AP"])
    assert math.isnan(analysis.error_costs(matching, analysis.error_types(matching))["AP"])
    assert analysis.confusion_matrix(matching, 0.5).sum() == 0
    assert np.isnan(analysis.bootstrap_ap(matching, 2)).all()
    assert analysis.overall_threshold(matching) == 0.0
