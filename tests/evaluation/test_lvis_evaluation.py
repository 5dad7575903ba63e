import json
import logging
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from detkit.evaluation import LVISEvaluator
from detkit.evaluation.detections import detections_from_instances
from detkit.evaluation.lvis_evaluation import best_detections
from detkit.structures import Boxes, BoxMode, Instances
from tests.evaluation.coco.test_scoring import run

CLASSES = ["a", "b", "c", "d"]
CATEGORY_IDS = {11: 0, 12: 1, 14: 2, 17: 3}
COUNTS = [
    {"id": 11, "image_count": 10},
    {"id": 12, "image_count": 11},
    {"id": 14, "image_count": 100},
]
COUNTS = [*COUNTS, {"id": 17, "image_count": 101}]
SIZE = (60, 80)
FAR, BOX = [40, 40, 50, 50], [0, 0, 10, 10]


def add(register, records):
    return register(
        records, CLASSES, thing_dataset_id_to_contiguous_id=CATEGORY_IDS, class_image_count=COUNTS
    )


def rectangle(box):
    mask = np.zeros(SIZE, dtype=np.uint8)
    x1, y1, x2, y2 = (round(v) for v in box)
    mask[y1:y2, x1:x2] = 1
    return mask


def random_box(rng):
    corner = rng.integers(0, 40, 2)
    return (
        np.concatenate([corner, corner + rng.integers(1, rng.choice([10, 40]), 2)])
        .clip(max=[80, 60, 80, 60])
        .tolist()
    )


def random_problem(seed, max_dets):
    rng = np.random.default_rng(seed)
    tied = rng.random() < 0.5
    records, outputs = [], {}
    for image_id in rng.permutation(7).tolist():
        boxes = [random_box(rng) for _ in range(rng.integers(0, 5))]
        objects = [
            {
                "bbox": box,
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": int(rng.integers(3)),
                "area": float(rng.choice([rectangle(box).sum(), 32.0**2])),
                "segmentation": {
                    "size": list(SIZE),
                    "counts": mask_util.encode(np.asfortranarray(rectangle(box)))["counts"],
                },
            }
            for box in boxes
        ]
        positive = {list(CATEGORY_IDS)[o["category_id"]] for o in objects}
        negative = [c for c in CATEGORY_IDS if c not in positive and rng.random() < 0.4]
        records.append(
            {
                "file_name": f"{image_id}.jpg",
                "image_id": image_id,
                "height": SIZE[0],
                "width": SIZE[1],
                "annotations": objects,
                "neg_category_ids": negative,
                "not_exhaustive_category_ids": [c for c in sorted(positive) if rng.random() < 0.4],
            }
        )
        count = int(rng.integers(0, 2 * max_dets))
        found = [
            boxes[rng.integers(len(boxes))] if boxes and rng.random() < 0.6 else random_box(rng)
            for _ in range(count)
        ]
        scores = rng.random(count)
        outputs[image_id] = Instances(
            SIZE,
            pred_boxes=Boxes(torch.tensor(found).float().reshape(-1, 4)),
            scores=torch.tensor(scores.round(1) if tied else scores),
            pred_classes=torch.tensor(rng.integers(0, 4, count)),
            pred_masks=torch.from_numpy(
                np.array([rectangle(b) for b in found]).reshape(-1, *SIZE).astype(bool)
            ),
        )
    return records, outputs


@pytest.fixture
def lvis(monkeypatch):
    """The package, with what NumPy has dropped since."""
    package = pytest.importorskip("lvis", reason="needs the lvis package: pip install lvis")
    monkeypatch.setattr(np, "float", float, raising=False)
    return package


def lvis_json(records):
    annotations = [
        {
            **a,
            "id": i,
            "image_id": r["image_id"],
            "category_id": list(CATEGORY_IDS)[a["category_id"]],
        }
        for i, (r, a) in enumerate(((r, a) for r in records for a in r["annotations"]), start=1)
    ]
    for a in annotations:
        del a["bbox_mode"]
        a["bbox"] = BoxMode.convert(a["bbox"], BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        a["segmentation"] = {**a["segmentation"], "counts": a["segmentation"]["counts"].decode()}
    keys = ("neg_category_ids", "not_exhaustive_category_ids", "height", "width")
    images = [{"id": r["image_id"], **{key: r[key] for key in keys}} for r in records]
    categories = [{"id": i, "frequency": f} for i, f in zip(CATEGORY_IDS, "rccf", strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("seed", range(15))
def test_numbers_are_those_of_the_lvis_package(seed, lvis, register, tmp_path):
    max_dets = [300, 5][seed % 2]
    records, outputs = random_problem(seed, min(max_dets, 20))
    (tmp_path / "truth.json").write_text(json.dumps(lvis_json(records)))
    evaluator = LVISEvaluator(
        add(register, records), output_dir=str(tmp_path), max_dets_per_image=max_dets
    )
    results = run(evaluator, outputs)
    written = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert list(results) == ["bbox", "segm"]
    for task, metrics in results.items():
        found = [{k: v for k, v in w.items() if task == "bbox" or k != "bbox"} for w in written]
        truth = lvis.LVIS(str(tmp_path / "truth.json"))
        evaluation = lvis.LVISEval(truth, lvis.LVISResults(truth, found, max_dets=max_dets), task)
        evaluation.run()
        assert list(metrics) == [name for name in evaluation.get_results() if name.startswith("AP")]
        expected = [
            100 * v if v > -1 else math.nan
            for n, v in evaluation.get_results().items()
            if n.startswith("AP")
        ]
        np.testing.assert_allclose(list(metrics.values()), expected, atol=1e-9)


def test_ground_truth_as_predictions_scores_100(register):
    records, _ = random_problem(4, 1)
    for record in records:
        for index, annotation in enumerate(record["annotations"]):
            annotation["category_id"] = index % 4
    outputs = {}
    for record in records:
        annotations = record["annotations"]
        masks = [rectangle(a["bbox"]) for a in annotations]
        outputs[record["image_id"]] = Instances(
            SIZE,
            pred_boxes=Boxes(torch.tensor([a["bbox"] for a in annotations]).float().reshape(-1, 4)),
            scores=torch.ones(len(annotations)),
            pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
            pred_masks=torch.from_numpy(np.array(masks).reshape(-1, *SIZE).astype(bool)),
        )
    results = run(LVISEvaluator(add(register, records)), outputs)
    assert list(results) == ["bbox", "segm"]
    for metrics in results.values():
        assert list(metrics) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf"]
        # A 60x80 image has no object of 96x96.
        assert all(value == pytest.approx(100) or name == "APl" for name, value in metrics.items())


# One image with an object of class a; a better detection of class a lies elsewhere, in an image of each kind.
@pytest.mark.parametrize(
    ("other_image", "expected"),
    [
        pytest.param({}, 100, id="not annotated for the class"),
        pytest.param({"neg_category_ids": [11]}, 50, id="known to have none"),
        pytest.param({"neg_category_ids": [12]}, 100, id="known to have none of another class"),
        pytest.param(
            {"neg_category_ids": [11], "not_exhaustive_category_ids": [11]},
            100,
            id="not all annotated",
        ),
    ],
)
def test_federated_rules(other_image, expected, register, make_record, make_instances):
    name = add(register, [make_record(1, (BOX, 0)), {**make_record(2), **other_image}])
    found = {1: make_instances((BOX, 0, 0.5)), 2: make_instances((FAR, 0, 0.9))}
    metrics = run(LVISEvaluator(name), found)["bbox"]
    assert metrics["AP"] == metrics["APr"] == pytest.approx(expected)
    assert math.isnan(metrics["APc"])


@pytest.mark.parametrize("negative", [[], None])
def test_images_without_negatives_are_said(register, make_record, negative, caplog):
    name = add(register, [{**make_record(0, (BOX, 0)), "neg_category_ids": negative}])
    LVISEvaluator(name, ["bbox"])
    assert "has neg_category_ids: detections" in caplog.text


def test_no_object_is_a_crowd(register, make_record, make_instances):
    name = add(register, [make_record(1, (BOX, 0, {"iscrowd": 1}))])
    found = {1: make_instances((BOX, 0, 0.5), (BOX, 0, 0.4))}
    assert run(LVISEvaluator(name), found)["bbox"]["AP"] == pytest.approx(100)
    assert run(LVISEvaluator(name), {1: make_instances()})["bbox"]["AP"] == 0


def test_limit_is_over_all_classes(register, make_record, make_instances):
    name = add(register, [make_record(1, (BOX, 0))])
    found = {1: make_instances((FAR, 1, 0.9), (BOX, 0, 0.5))}
    assert run(LVISEvaluator(name, max_dets_per_image=1), found)["bbox"]["AP"] == 0
    assert run(LVISEvaluator(name, max_dets_per_image=2), found)["bbox"]["AP"] == pytest.approx(100)


def test_of_equal_scores_the_first_is_kept(make_instances):
    instances = make_instances((BOX, 0, 0.5), (FAR, 1, 0.5), (BOX, 2, 0.7))
    best = best_detections(detections_from_instances(1, instances, "data", CLASSES), 2)
    assert best.classes.tolist() == [2, 0]


def test_frequencies_may_come_from_the_file(register, make_record, make_instances, tmp_path):
    (tmp_path / "truth.json").write_text(
        json.dumps({"categories": [{"id": 0, "frequency": "f"}, {"id": 1, "frequency": "c"}]})
    )
    name = register([make_record(1, (BOX, 0))], json_file=str(tmp_path / "truth.json"))
    metrics = run(LVISEvaluator(name), {1: make_instances((BOX, 0, 0.5))})["bbox"]
    assert metrics["APf"] == pytest.approx(100)
    assert math.isnan(metrics["APr"])


def test_classes_of_ten_images_are_rare_and_of_a_hundred_common(
    register, make_record, make_instances
):
    counts = [10, 11, 100, 101]
    name = register(
        [make_record(1, *((BOX, k) for k in range(4)))],
        list("abcd"),
        class_image_count=[{"id": k, "image_count": count} for k, count in enumerate(counts)],
    )
    # Of the rare class and the first of the two common ones the object is found.
    found = {1: make_instances((BOX, 0, 0.5), (BOX, 1, 0.5))}
    metrics = run(LVISEvaluator(name), found)["bbox"]
    assert [metrics[key] for key in ("APr", "APc", "APf")] == pytest.approx([100, 50, 0])


@pytest.mark.parametrize(("num_better", "expected"), [(299, 100 / 300), (300, 0)])
def test_three_hundred_detections_of_an_image_count(
    num_better, expected, register, make_record, make_instances
):
    name = add(register, [make_record(1, (BOX, 0))])
    found = {1: make_instances(*[(FAR, 0, 0.9)] * num_better, (BOX, 0, 0.5))}
    assert run(LVISEvaluator(name), found)["bbox"]["AP"] == pytest.approx(expected)


def test_unknown_frequencies_are_reported(register, make_record, caplog):
    with caplog.at_level(logging.WARNING):
        LVISEvaluator(register([make_record(1)]))
    assert "how frequent 2 of 2 classes" in caplog.text


def test_no_predictions_score_zero_and_the_reason_is_logged(
    register, make_record, make_instances, caplog
):
    name = add(register, [make_record(1, (BOX, 0))])
    with caplog.at_level(logging.WARNING):
        assert run(LVISEvaluator(name), {1: make_instances()})["bbox"]["AP"] == 0
    assert "AP is 0" in caplog.text


def test_category_that_the_data_set_lacks_is_an_error(register, make_record):
    with pytest.raises(ValueError, match=r"neg_category_ids .* has the categories \[3\]"):
        LVISEvaluator(add(register, [{**make_record(1), "neg_category_ids": [3]}]))


def test_keypoints_cannot_be_scored(register, make_record):
    with pytest.raises(ValueError, match="tasks must be among bbox, segm, got 'keypoints'"):
        LVISEvaluator(add(register, [make_record(1)]), ["keypoints"])
