import math

import numpy as np
import pytest

from detkit.evaluation.coco_results import (
    CocoScores,
    coco_metrics,
    coco_recalls,
    coco_result_dicts,
    instances_to_coco_json,
    metrics_table,
    per_class_table,
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


def test_table_of_metrics_has_a_column_each():
    header, _, row = metrics_table({"AP": 12.34567, "APs": math.nan}).splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["AP", "APs"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["12.346", "nan"]


def test_table_of_classes_has_every_class_and_keeps_names_that_look_like_numbers():
    metrics = {"AP": 1.0, **{f"AP-{name}": 50.0 for name in ("cat", "007", "1e5", "t-shirt")}}
    header, _, *rows = per_class_table(metrics).splitlines()
    cells = [cell.strip() for row in rows for cell in row.strip("|").split("|")]
    assert header.count("class") == 3
    assert [cell for cell in cells if cell] == [
        "cat",
        "50.000",
        "007",
        "50.000",
        "1e5",
        "50.000",
        "t-shirt",
        "50.000",
    ]


def test_table_of_no_classes_is_empty():
    assert per_class_table({"AP": 1.0}) == ""
