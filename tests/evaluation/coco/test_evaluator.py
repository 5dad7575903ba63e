import contextlib
import copy
import io
import json
import logging
import math
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import register_coco_instances, register_pascal_voc
from detkit.data.datasets.coco_export import convert_to_coco_json
from detkit.evaluation import (
    COCOEvaluator,
    PascalVOCDetectionEvaluator,
    RotatedCOCOEvaluator,
    instances_to_coco_json,
)
from detkit.evaluation.coco.evaluator import (
    covered_overlaps,
    evaluate_predictions_on_coco,
    proposal_recall_metrics,
)
from detkit.evaluation.coco.ground_truth import load_coco_ground_truth
from detkit.evaluation.coco.results import coco_metrics, coco_protocol, coco_recalls
from detkit.evaluation.coco.scoring import score_detections
from detkit.evaluation.detections import ImageDetections, detections_from_instances
from detkit.structures import Boxes, BoxMode, Instances, RotatedBoxes
from tests.helpers import slow_covered_overlaps
from tests.structures.test_rotated_boxes import as_rotated

BOX = [10, 10, 50, 50]


def pycocotools_stats(truth_file, results, max_dets):
    """The twelve numbers, with `max_dets` in the place of 100, in [0, 100]; nan for -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth_file)
        # It cannot load an empty list.
        found = coco.loadRes(copy.deepcopy(results)) if results else COCO()
        evaluation = COCOeval(coco, found, "bbox")
        evaluation.params.maxDets = [1, 10, max_dets]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    values = [precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2]]
    values += [precision[..., area, 2] for area in (1, 2, 3)]
    values += [recall[..., 0, limit] for limit in (0, 1, 2)] + [
        recall[..., area, 2] for area in (1, 2, 3)
    ]
    return [100 * v[v > -1].mean() if (v > -1).any() else math.nan for v in values]


def twelve_numbers(name, detections_of, make_instances, max_dets):
    truth = load_coco_ground_truth(name)
    detections = [
        detections_from_instances(image_id, make_instances(*found), name, truth.class_names)
        for image_id, found in detections_of.items()
    ]
    scores = score_detections(truth, detections, coco_protocol(max_dets_per_image=max_dets))
    metrics = coco_metrics(scores, truth.class_names)
    return [metrics[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")] + list(
        coco_recalls(scores).values()
    )


@pytest.mark.parametrize("seed", range(40))
def test_all_numbers_are_those_of_pycocotools(
    seed, random_problem, register, score, make_instances, tmp_path
):
    records, detections_of = random_problem(seed)
    name = register(
        records, ["a", "b", "c", "d"], thing_dataset_id_to_contiguous_id={7: 0, 3: 1, 90: 2, 1: 3}
    )
    max_dets = [100, 11, 100, 400][seed % 4]
    results = score(
        COCOEvaluator(name, output_dir=str(tmp_path), max_dets_per_image=max_dets), detections_of
    )
    convert_to_coco_json(name, tmp_path / "truth.json")
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    expected = pycocotools_stats(str(tmp_path / "truth.json"), written, max_dets)
    np.testing.assert_allclose(list(results["bbox"].values())[:6], expected[:6], atol=1e-9)
    np.testing.assert_allclose(
        twelve_numbers(name, detections_of, make_instances, max_dets), expected, atol=1e-9
    )


def test_hand_worked_numbers(register, make_record, score):
    # Two cats. Rank 1 finds one exactly, rank 2 is wrong, rank 3 finds the other at overlap 0.6: precision 1, 1/2, 2/3 at
    # recall 1/2, 1/2, 1. Up to threshold 0.6 (three of ten) 51 recall points have precision 1 and 50 have 2/3; above, the
    # 51 have 1 and the others 0.
    name = register([make_record(1, (BOX, 0), ([60, 60, 100, 100], 0))])
    found = {1: [(BOX, 0, 0.9), ([0, 60, 9, 69], 0, 0.8), ([60, 60, 100, 84], 0, 0.7)]}
    metrics = score(COCOEvaluator(name), found)["bbox"]
    below, above = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert metrics["AP50"] == pytest.approx(100 * below)
    assert metrics["AP75"] == pytest.approx(100 * above)
    assert metrics["AP"] == pytest.approx(100 * (3 * below + 7 * above) / 10)
    assert metrics["AP-cat"] == metrics["AP"]


@pytest.mark.parametrize("evaluator_class", [COCOEvaluator, PascalVOCDetectionEvaluator])
@pytest.mark.parametrize("data_format", ["coco", "voc"])
def test_ground_truth_as_predictions_scores_100(
    evaluator_class, data_format, tmp_path, score, truth_as_detections
):
    name = f"truth_as_predictions_{data_format}"
    {"coco": write_and_register_coco, "voc": write_and_register_voc}[data_format](name, tmp_path)
    try:
        records = DatasetCatalog.get(name)
        metrics = score(evaluator_class(name), truth_as_detections(records))["bbox"]
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert metrics["AP"] == metrics["AP50"] == metrics["AP75"] == pytest.approx(100)
    assert metrics["AP-cat"] == metrics["AP-dog"] == pytest.approx(100)
    assert math.isnan(metrics["AP-cow"])


def write_and_register_coco(name, folder):
    """Without info, area and iscrowd in most places, and with ids that are not contiguous."""
    boxes = [
        [3.3, 4.4, 20.1, 30.7],
        [50, 50, 120, 100],
        [0, 0, 5.5, 6.5],
        [200.25, 100.125, 10, 300],
    ]
    annotations = [
        {"id": n, "image_id": 10 * (n % 2), "category_id": 7 if n < 2 else 3, "bbox": box}
        for n, box in enumerate(boxes)
    ]
    annotations.append(
        {
            "id": 9,
            "image_id": 10,
            "category_id": 3,
            "bbox": [0, 0, 300, 300],
            "iscrowd": 1,
            "area": 9e4,
        }
    )
    categories = [
        {"id": id_, "name": class_name} for id_, class_name in [(3, "cat"), (7, "dog"), (8, "cow")]
    ]
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 400, "width": 400} for i in (10, 0, 20)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    register_coco_instances(name, {}, str(folder / "truth.json"), str(folder))


def write_and_register_voc(name, folder):
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True)
    objects = {
        "000005": [
            ("cat", 0, [1, 1, 40, 60]),
            ("dog", 0, [30, 30, 90, 99]),
            ("dog", 1, [5, 70, 20, 90]),
        ],
        "2008_000008": [("cat", 0, [11, 12, 13, 14])],
        "empty": [],
    }
    for image, found in objects.items():
        Image.new("RGB", (100, 100)).save(folder / "JPEGImages" / f"{image}.png")
        parts = [
            f"<object><name>{class_name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin>"
            f"<ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for class_name, difficult, (x1, y1, x2, y2) in found
        ]
        size = "<size><width>100</width><height>100</height></size>"
        (folder / "Annotations" / f"{image}.xml").write_text(
            f"<annotation>{size}{''.join(parts)}</annotation>"
        )
    (folder / "ImageSets/Main/val.txt").write_text("\n".join(objects))
    register_pascal_voc(name, str(folder), "val", 2012, ["cat", "dog", "cow"])


@pytest.mark.parametrize("detections_of", [{}, {1: [], 2: []}], ids=["no image", "no detection"])
def test_no_predictions_score_zero_and_the_reason_is_logged(
    detections_of, register, make_record, score, caplog
):
    name = register([make_record(1, (BOX, 0)), make_record(2)])
    with caplog.at_level(logging.WARNING):
        metrics = score(COCOEvaluator(name), detections_of)["bbox"]
    assert metrics["AP"] == metrics["AP50"] == metrics["AP-cat"] == 0.0
    assert math.isnan(metrics["AP-dog"])
    assert "AP is 0" in caplog.text


def test_without_ground_truth_ap_is_nan_and_the_reason_is_logged(
    register, make_record, score, caplog
):
    name = register([make_record(1)])
    with caplog.at_level(logging.WARNING):
        metrics = score(COCOEvaluator(name), {1: [(BOX, 0, 0.5)]})["bbox"]
    assert all(math.isnan(value) for value in metrics.values())
    assert "has no ground truth" in caplog.text


def test_data_set_without_images_gives_nan(register, score):
    assert math.isnan(score(COCOEvaluator(register([])), {})["bbox"]["AP"])


def test_images_that_were_not_predicted_are_reported(register, make_record, score, caplog):
    name = register([make_record(1, (BOX, 0)), make_record(2, (BOX, 0))])
    with caplog.at_level(logging.WARNING):
        score(COCOEvaluator(name), {1: [(BOX, 0, 0.5)]})
    assert "only 1 of the 2 images" in caplog.text


def test_class_without_ground_truth_does_not_count_in_the_mean(register, make_record, score):
    name = register([make_record(1, (BOX, 0))])
    metrics = score(COCOEvaluator(name), {1: [(BOX, 0, 0.5), (BOX, 1, 0.9)]})["bbox"]
    assert metrics["AP"] == pytest.approx(100)
    assert math.isnan(metrics["AP-dog"])


def test_detections_beyond_a_limit_of_five_do_not_count(register, make_record, score):
    # The object is found by the sixth detection: at [1, 10, 5], which COCO's tools sort, it would still count.
    name = register([make_record(1, (BOX, 0))])
    found = [([60, 60, 70, 70 + i], 0, 0.9 - 0.1 * i) for i in range(5)] + [(BOX, 0, 0.1)]
    assert score(COCOEvaluator(name, max_dets_per_image=5), {1: found})["bbox"]["AP"] == 0
    assert score(COCOEvaluator(name, max_dets_per_image=6), {1: found})["bbox"]["AP"] > 0


@pytest.mark.parametrize("max_dets", [1, 5, 10, 100, 1000])
def test_all_summary_rows_are_valid_at_any_limit(max_dets, register, make_record, make_instances):
    objects = [([0, 0, side, side], 0) for side in (20, 80, 100)]
    objects = [*objects, ([0, 0, 200, 200], 0)]
    name = register([make_record(1, *objects)])
    found = {1: [(box, class_id, 0.5) for box, class_id in objects]}
    assert not np.isnan(twelve_numbers(name, found, make_instances, max_dets)).any()


def test_more_objects_in_an_image_than_detections_are_reported(
    register, make_record, score, caplog
):
    name = register([make_record(1, (BOX, 0), (BOX, 0), (BOX, 1)), make_record(2)])
    with caplog.at_level(logging.WARNING):
        score(COCOEvaluator(name, max_dets_per_image=2), {1: [(BOX, 0, 0.5)], 2: []})
    assert "1 of 2 images" in caplog.text
    assert "TEST.DETECTIONS_PER_IMAGE" in caplog.text


def test_ids_beyond_double_precision_are_told_apart(register, make_record, score):
    ids = [2**53 + 1, 2**53 + 2, 2**63 + 11]
    name = register([make_record(i, ([0, 0, 10 + n, 20], 0)) for n, i in enumerate(ids)])
    found = {i: [([0, 0, 10 + n, 20], 0, 0.5)] for n, i in enumerate(ids)}
    assert score(COCOEvaluator(name), found)["bbox"]["AP"] == pytest.approx(100)


def test_result_file_has_full_precision_and_the_ids_of_the_data_set(
    register, make_record, score, tmp_path
):
    name = register([make_record(42, (BOX, 0))], thing_dataset_id_to_contiguous_id={9: 0, 4: 1})
    box = [0.1, 0.2, 10.3, 20.7]
    score(COCOEvaluator(name, output_dir=str(tmp_path / "new" / "folder")), {42: [(box, 1, 1 / 3)]})
    (result,) = json.loads(
        (tmp_path / "new" / "folder" / "coco_instances_results.json").read_text()
    )
    x1, y1, x2, y2 = (float(np.float32(value)) for value in box)
    assert result == {
        "image_id": 42,
        "category_id": 4,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": float(np.float32(1 / 3)),
    }


@pytest.mark.parametrize("limit", [8, 100])
def test_detectron2s_calls_of_pycocotools_give_the_same_ap(
    limit, random_problem, register, score, tmp_path, capsys
):
    records, detections_of = random_problem(6)
    name = register(
        records, ["a", "b", "c", "d"], thing_dataset_id_to_contiguous_id={7: 0, 3: 1, 90: 2, 1: 3}
    )
    evaluator = COCOEvaluator(name, output_dir=str(tmp_path), max_dets_per_image=limit)
    expected = score(evaluator, detections_of)["bbox"]["AP"]
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    capsys.readouterr()
    truth = evaluator._coco_api
    assert capsys.readouterr().out == ""
    with pytest.raises(AssertionError, match="no results to score"):
        evaluate_predictions_on_coco(truth, [], "bbox")
    limits = [1, 3, limit]
    scored = evaluate_predictions_on_coco(truth, written, "bbox", max_dets_per_image=limits)
    assert 100 * scored.stats[0] == pytest.approx(expected)
    summary = [line for line in capsys.readouterr().out.splitlines() if "@[" in line]
    assert len(summary) == 12
    assert f"area=   all | maxDets={limit:3} ] = {scored.stats[0]:.3f}" in summary[0]


def test_evaluating_twice_gives_the_same(register, make_record, score):
    name = register([make_record(1, (BOX, 0)), make_record(2, (BOX, 0))])
    evaluator = COCOEvaluator(name)
    first = score(evaluator, {1: [(BOX, 0, 0.5)]})
    assert first["bbox"]["AP50"] == pytest.approx(100 * 51 / 101)
    np.testing.assert_equal(evaluator.evaluate(), first)


def test_reset_forgets_predictions(register, make_record, score):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    assert score(evaluator, {1: [(BOX, 0, 0.5)]})["bbox"]["AP"] == pytest.approx(100)
    assert score(evaluator, {1: []})["bbox"]["AP"] == 0


def test_proposals_are_scored_by_recall(register, make_record):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    proposals = Instances(
        (100, 100), proposal_boxes=Boxes([BOX]), objectness_logits=torch.tensor([3.0])
    )
    evaluator.process([{"image_id": 1}], [{"proposals": proposals}])
    results = evaluator.evaluate()
    assert list(results) == ["box_proposals"]
    assert results["box_proposals"]["AR@100"] == pytest.approx(100)


def test_image_predicted_twice_is_an_error(register, make_record, score):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    score(evaluator, {1: []})
    with pytest.raises(ValueError, match="image 1 of data set .* was predicted twice"):
        evaluator.process([{"image_id": 1}], [{"instances": Instances((9, 9), **_no_detections())}])


def _no_detections():
    return {
        "pred_boxes": Boxes([]),
        "scores": torch.zeros(0),
        "pred_classes": torch.zeros(0, dtype=torch.int64),
    }


def test_predictions_are_there_as_a_list_of_dicts_for_a_subclass(register, make_record, score):
    """As in Detectron2: its own `evaluate` may read them, and hand on what it has made of them."""

    class Sure(COCOEvaluator):
        def evaluate(self):
            kept = []
            for prediction in self._predictions:
                sure = [found for found in prediction["instances"] if found["score"] > 0.4]
                kept.append({"image_id": prediction["image_id"], "instances": sure})
            self._results = {}
            self._eval_predictions(kept)
            return self._results

    found = {2: [(BOX, 0, 0.9), ([0, 0, 9, 9], 0, 0.3)], 1: [(BOX, 1, 0.8)]}
    name = register([make_record(1, (BOX, 1)), make_record(2, (BOX, 0))])
    evaluator = Sure(name)
    results = score(evaluator, found)
    assert evaluator._predictions == [
        {
            "image_id": 2,
            "instances": [
                {"image_id": 2, "category_id": 0, "bbox": [10, 10, 40, 40], "score": ANY},
                {"image_id": 2, "category_id": 0, "bbox": [0, 0, 9, 9], "score": ANY},
            ],
        },
        {"image_id": 1, "instances": [ANY]},
    ]
    assert results["bbox"]["AP"] == pytest.approx(100)


def test_what_a_subclass_adds_to_the_predictions_is_scored_and_handed_on(
    register, make_record, score
):
    class Adding(COCOEvaluator):
        def process(self, inputs, outputs):
            if inputs[0]["image_id"] == 3:  # in its own way alone
                found = {"image_id": 3, "category_id": 0, "bbox": [10, 10, 40, 40], "score": 1.0}
                self._predictions.append({"image_id": 3, "instances": [found]})
                return
            super().process(inputs, outputs)
            if inputs[0]["image_id"] == 1:
                self._predictions[-1]["mark"] = "seen"

        def _eval_predictions(self, predictions, img_ids=None):
            self.marks = [prediction.get("mark") for prediction in predictions]
            super()._eval_predictions(predictions, img_ids)

    records = [make_record(number, (BOX, 0)) for number in (1, 2, 3)]
    evaluator = Adding(register(records))
    truth = {number: [(BOX, 0, 1.0)] for number in (1, 3, 2)}
    results = score(evaluator, truth)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert evaluator.marks == ["seen", None, None]
    np.testing.assert_equal(evaluator.evaluate(), results)
    assert score(evaluator, {1: []})["bbox"]["AP"] == 0


def test_predictions_that_nobody_looks_at_are_not_held_as_dicts(register, make_record, score):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    score(evaluator, {1: [(BOX, 0, 1.0)]})
    assert evaluator._listed == []
    assert len(evaluator._predictions) == 1
    assert len(evaluator._detections) == 0


@pytest.mark.parametrize(
    ("image_ids", "message"),
    [([1, 1], "image 1 of data set .* was predicted twice"), ([5], "image 5 was predicted, but")],
)
def test_bad_images_of_a_subclass_are_errors(image_ids, message, register, make_record):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    evaluator._predictions += [{"image_id": number, "instances": []} for number in image_ids]
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate()


def test_image_of_another_data_set_is_an_error(register, make_record, score):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    with pytest.raises(ValueError, match="image 'other' was predicted, but is not in data set"):
        score(evaluator, {"other": []})


@pytest.mark.parametrize("class_id", [2, -1])
def test_predicted_class_that_the_data_set_does_not_have_is_an_error(
    class_id, register, make_record, score
):
    evaluator = COCOEvaluator(register([make_record(1, (BOX, 0))]))
    with pytest.raises(
        ValueError,
        match=rf"class ids \[{class_id}\] in image 1, .* has 2 classes.*NUM_CLASSES\) to 2",
    ):
        score(evaluator, {1: [(BOX, class_id, 0.5)]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {"tasks": ["box"]},
            "tasks must be among bbox, segm, keypoints, got 'box'",
            id="unknown task",
        ),
        pytest.param({"tasks": "bbox"}, "must be a list of names", id="string"),
        pytest.param({"max_dets_per_image": 0}, "must be at least 1, got 0", id="no detections"),
    ],
)
def test_bad_arguments_are_errors(arguments, message, register, make_record):
    with pytest.raises(ValueError, match=message):
        COCOEvaluator(register([make_record(1)]), **arguments)


def test_scoring_prints_nothing_and_leaves_the_records_alone(register, make_record, score, capsys):
    records = [make_record(1, (BOX, 0, {"iscrowd": 1, "id": 5}))]
    before = copy.deepcopy(records)
    score(COCOEvaluator(register(records)), {1: [(BOX, 0, 0.5)]})
    assert records == before
    assert capsys.readouterr().out == ""


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


def test_as_many_objects_as_detections_are_not_reported(register, make_record, score, caplog):
    # Two objects and a crowd region, which need not be found.
    objects = (BOX, 0), (BOX, 0), (BOX, 0, {"iscrowd": 1})
    evaluator = COCOEvaluator(register([make_record(1, *objects)]), max_dets_per_image=2)
    with caplog.at_level(logging.WARNING):
        score(evaluator, {1: [(BOX, 0, 0.5)]})
    assert caplog.messages == []


def test_of_equal_proposals_the_first_count_up_to_the_limit(register, make_record):
    truth = load_coco_ground_truth(register([make_record(1, (LARGE, 0))]))
    for boxes, expected in (([LARGE, SMALL], 100), ([SMALL, LARGE], 0)):
        found = [proposals(1, boxes, scores=[0.5, 0.5])]
        metrics = proposal_recall_metrics(truth, found, limits=(1,))
        assert metrics["AR@1"] == pytest.approx(expected)


def test_covered_object_is_not_covered_again():
    overlaps = np.array([[0.9, 0, 0], [0.8, 0, 0], [0.7, 0, 0]])
    assert covered_overlaps(overlaps).tolist() == [0.9, 0, 0]


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


def rotated_records(records):
    """Return the records with boxes XYWHA of angle 0."""
    return [
        {
            **record,
            "annotations": [
                {
                    **a,
                    "bbox": as_rotated(torch.tensor([a["bbox"]], dtype=torch.float64))[0].tolist(),
                    "bbox_mode": BoxMode.XYWHA_ABS,
                }
                for a in record["annotations"]
            ],
        }
        for record in records
    ]


# Seeds with crowds, and with several detections of a class in an image.
@pytest.mark.parametrize("seed", [6, 8, 9, 12])
@pytest.mark.parametrize("truth_is_rotated", [False, True])
@pytest.mark.parametrize("model_is_rotated", [False, True])
def test_boxes_at_angle_0_score_as_upright_ones(
    seed, truth_is_rotated, model_is_rotated, random_problem, register, make_instances
):
    records, detections_of = random_problem(seed)
    classes = [str(k) for k in range(4)]
    upright = register(records, classes)
    rotated = register(rotated_records(records), classes) if truth_is_rotated else upright
    results = []
    for evaluator in (COCOEvaluator(upright, ["bbox"]), RotatedCOCOEvaluator(rotated, ["bbox"])):
        evaluator.reset()
        for image_id, found in detections_of.items():
            instances = make_instances(*found)
            if model_is_rotated and isinstance(evaluator, RotatedCOCOEvaluator):
                boxes = as_rotated(instances.pred_boxes.tensor)
                instances.pred_boxes = RotatedBoxes(boxes)
            evaluator.process([{"image_id": image_id}], [{"instances": instances}])
        results.append(evaluator.evaluate()["bbox"])
    assert results[1] == pytest.approx(results[0], rel=1e-3, nan_ok=True)


def rotated_output(box, score=0.9):
    return Instances(
        (100, 100),
        pred_boxes=RotatedBoxes([box]),
        scores=torch.tensor([score]),
        pred_classes=torch.tensor([0]),
    )


@pytest.mark.parametrize(
    ("box", "ap"),
    [
        pytest.param([50, 50, 40, 10, 30], 100.0, id="the same"),
        pytest.param([50, 50, 40, 10, 210], 100.0, id="facing the other way"),
        pytest.param([50, 50, 10, 40, -60], 100.0, id="sides exchanged"),
        # A cross: 100 of 700 shared.
        pytest.param([50, 50, 40, 10, 120], 0.0, id="across"),
        # Moved by 12 along its width: 280 of 520 shared, above one of the ten thresholds.
        pytest.param([50 + 12 * 0.8660254, 50 - 6, 40, 10, 30], 10.0, id="aside"),
    ],
)
def test_rotated_boxes_score_by_their_own_overlap(box, ap, register, make_record, tmp_path):
    record = make_record(1, (BOX, 0))
    record["annotations"][0].update(bbox=[50, 50, 40, 10, 30], bbox_mode=BoxMode.XYWHA_ABS)
    name = register([record])
    evaluator = RotatedCOCOEvaluator(name, output_dir=str(tmp_path))
    evaluator.reset()
    output = rotated_output(box)
    evaluator.process([{"image_id": 1}], [{"instances": output}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(ap)
    (written,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert written["bbox"] == pytest.approx(box, rel=1e-6)
    assert instances_to_coco_json(output, 1)[0]["bbox"] == pytest.approx(box, rel=1e-6)


def test_only_the_images_asked_for_count(register, make_record, make_instances):
    evaluator = COCOEvaluator(register([make_record(i, (BOX, 0)) for i in range(2)]))
    evaluator.reset()
    evaluator.process([{"image_id": 0}], [{"instances": make_instances((BOX, 0, 0.9))}])
    assert evaluator.evaluate(img_ids=[0])["bbox"]["AP"] == pytest.approx(100)
    assert evaluator.evaluate(img_ids=[1])["bbox"]["AP"] == 0
    assert 0 < evaluator.evaluate()["bbox"]["AP"] < 60


def test_upright_evaluators_take_the_boxes_around_rotated_ones(register, make_record):
    # The hull of a square of side 20 turned by 45 degrees has sides of 28.28.
    half = 200**0.5
    hull = [50 - half, 50 - half, 50 + half, 50 + half]
    name = register([make_record(1, (hull, 0))])
    for evaluator in (COCOEvaluator(name), PascalVOCDetectionEvaluator(name)):
        evaluator.reset()
        output = rotated_output([50, 50, 20, 20, 45])
        evaluator.process([{"image_id": 1}], [{"instances": output}])
        assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_recall_of_rotated_proposals(register, make_record):
    record = make_record(1, (BOX, 0))
    record["annotations"][0].update(bbox=[50, 50, 40, 10, 30], bbox_mode=BoxMode.XYWHA_ABS)
    evaluator = RotatedCOCOEvaluator(register([record]))
    for angle, recall in ((30, 100.0), (120, 0.0)):
        evaluator.reset()
        proposals = Instances(
            (100, 100),
            proposal_boxes=RotatedBoxes([[50, 50, 40, 10, angle]]),
            objectness_logits=torch.zeros(1),
        )
        evaluator.process([{"image_id": 1}], [{"proposals": proposals}])
        assert evaluator.evaluate()["box_proposals"]["AR@100"] == recall


def test_memory_of_masks_is_returned_to_the_system_now_and_then(
    register, make_record, make_instances, monkeypatch
):
    returned = []
    monkeypatch.setattr("detkit.evaluation.coco.evaluator._PIXELS_UNTIL_RETURN", 25_000)
    monkeypatch.setattr(
        "detkit.evaluation.coco.evaluator.return_freed_memory", lambda: returned.append(True)
    )
    polygon = {"segmentation": [[10.0, 10, 50, 10, 50, 50]]}
    name = register([make_record(i, (BOX, 0, polygon)) for i in range(5)])
    evaluator = COCOEvaluator(name, ["bbox", "segm"])
    evaluator.reset()
    for i in range(5):
        instances = make_instances((BOX, 0, 0.9))
        instances.pred_masks = torch.ones(1, *instances.image_size, dtype=torch.bool)
        evaluator.process([{"image_id": i}], [{"instances": instances}])
    assert len(returned) == 1  # behind the third image of 10,000 pixels
