"""Hand-worked IoU of Cityscapes; as a whole it is held against the scripts in test_evaluator.py."""

import math

import numpy as np
import pytest

from detkit.evaluation.cityscapes.sem_seg import count_pixels, semantic_metrics

ROAD, CAR, TRUCK = 7, 26, 27
LABELS = [ROAD, CAR, TRUCK]
# Average sizes of cars and trucks, in pixels of the training set.
CARS, TRUCKS = 12794.0202738185, 27855.1264367816


def metrics_of(instance_ids, predicted):
    instance_ids = np.array([instance_ids])
    truth = np.where(instance_ids < 1000, instance_ids, instance_ids // 1000)
    counts = count_pixels(truth, instance_ids, np.array([predicted]), LABELS)
    return semantic_metrics(counts, LABELS, ["road", "car", "truck"])


def test_hand_worked_scores():
    # Two cars of 4 and 2 pixels, a truck of 2, a road of 4; predicted as 0 road, 1 car, 2 truck.
    ids = [26001] * 4 + [26002] * 2 + [27001] * 2 + [ROAD] * 4
    metrics = metrics_of(ids, [1, 1, 1, 2, 1, 0, 1, 1, 0, 0, 0, 1])
    per_class = [3 / 5, 4 / 9, 0]
    found = CARS * (3 / 4 + 1 / 2)
    vehicles_found = CARS * (4 / 4 + 1 / 2) + TRUCKS
    expected = {
        "IoU": sum(per_class) / 3,
        "iIoU": found / (2 * CARS + 3) / 2,
        "IoU_sup": (3 / 5 + 7 / 9) / 2,
        "iIoU_sup": vehicles_found / (2 * CARS + TRUCKS + 1),
        **dict(zip(["IoU-road", "IoU-car", "IoU-truck"], per_class, strict=True)),
    }
    assert metrics == pytest.approx({name: 100 * value for name, value in expected.items()})


def test_void_and_classes_without_pixels_do_not_count():
    metrics = metrics_of([0, 0, ROAD, ROAD], [1, 2, 0, 0])
    assert metrics["IoU"] == metrics["IoU-road"] == 100
    assert math.isnan(metrics["IoU-car"])
    assert math.isnan(metrics["iIoU"])


def test_groups_do_not_count_in_the_weighted_scores():
    metrics = metrics_of([CAR] * 4 + [26001] * 2, [0] * 4 + [1] * 2)
    assert metrics["iIoU"] == pytest.approx(100)
    assert metrics["IoU-car"] == pytest.approx(100 * 2 / 6)
