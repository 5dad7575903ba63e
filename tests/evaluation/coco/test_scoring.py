"""Masks and keypoints against pycocotools; boxes are in test_evaluator.py."""

import contextlib
import copy
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detkit.config import get_cfg
from detkit.data.datasets.coco_export import convert_to_coco_dict, convert_to_coco_json
from detkit.evaluation import COCOEvaluator
from detkit.evaluation.coco import class_scores
from detkit.evaluation.coco.evaluator import evaluate_predictions_on_coco
from detkit.evaluation.coco.results import CocoProtocol, coco_recalls
from detkit.evaluation.coco.scoring import mask_areas, score_detections
from detkit.structures import Boxes, BoxMode, Instances, bitmask_to_rle

SIZE = (90, 120)
CLASSES = ["a", "b", "c"]
NUM_KEYPOINTS = 5
SIGMAS = [0.03, 0.05, 0.08, 0.1, 0.07]


def random_mask(rng, whole):
    """An ellipse or a rectangle with a hole, sometimes nothing; (H, W) bool."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    center, radius = rng.uniform(0, SIZE, 2), rng.uniform(2, rng.choice([10, 40, 70]), 2)
    distance = np.stack([(rows - center[0]) / radius[0], (columns - center[1]) / radius[1]])
    mask = (np.abs(distance).max(axis=0) if whole else np.linalg.norm(distance, axis=0)) < 1
    mask[int(center[0]) :: 7] &= rng.random() < 0.5
    return mask & (rng.random() > 0.05)


def segmentation_of(rng, mask, whole):
    """The mask, or another one, in one of the formats that a file may hold."""
    kind = rng.integers(3)
    if kind == 0:
        polygons = [rng.uniform(0, 90, 2 * rng.integers(3, 8)) for _ in range(rng.integers(1, 3))]
        return [(polygon.round() if whole else polygon).tolist() for polygon in polygons]
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    if kind == 1:
        return {"size": list(SIZE), "counts": rle["counts"].decode()}
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int), [1 - int(mask[-1, -1])]])
    changes = np.flatnonzero(np.diff(flat))
    return {"size": list(SIZE), "counts": np.diff(changes, prepend=0).tolist()}


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return [0.0, 0.0, 1.0, 1.0]
    return [float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)]


def random_problem(seed):
    """Records and outputs with masks and keypoints, by image id; some images have no objects, or no detections."""
    rng = np.random.default_rng(seed)
    whole, tied = rng.random() < 0.5, rng.random() < 0.5
    most = int(rng.choice([3, 12, 110]))
    records, outputs = [], {}
    for image_id in rng.permutation(4).tolist():
        objects = [random_object(rng, whole) for _ in range(rng.integers(0, 7))]
        record = {
            "file_name": f"{image_id}.jpg",
            "image_id": image_id,
            "height": SIZE[0],
            "width": SIZE[1],
        }
        records.append({**record, "annotations": [annotation for annotation, _ in objects]})
        if rng.random() < 0.9:
            outputs[image_id] = random_output(
                rng, objects, whole, tied, int(rng.integers(0, most + 1))
            )
    return records, outputs


def random_object(rng, whole):
    mask = random_mask(rng, whole)
    keypoints = np.concatenate(
        [rng.uniform(0, 90, (NUM_KEYPOINTS, 2)), rng.integers(0, 3, (NUM_KEYPOINTS, 1))], axis=1
    )
    keypoints[:, 2] *= rng.random() < 0.8
    annotation = {
        "bbox": box_of(mask),
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": int(rng.integers(2)),
    }
    annotation |= {
        "iscrowd": int(rng.random() < 0.2),
        "segmentation": segmentation_of(rng, mask, whole),
    }
    if rng.random() < 0.5:
        annotation["area"] = float(rng.choice([mask.sum() * 1.1, 32.0**2, 96.0**2]))
    return annotation | {
        "keypoints": (keypoints.round() if whole else keypoints).reshape(-1).tolist()
    }, mask


def random_output(rng, objects, whole, tied, count):
    masks, keypoints, classes = (
        np.zeros((count, *SIZE), dtype=bool),
        np.zeros((count, NUM_KEYPOINTS, 3)),
        [],
    )
    for i in range(count):
        masks[i] = random_mask(rng, whole)
        keypoints[i] = rng.uniform(0, 90, (NUM_KEYPOINTS, 3))
        classes.append(int(rng.integers(3)))
        if objects and rng.random() < 0.7:
            annotation, mask = objects[rng.integers(len(objects))]
            shift = rng.integers(0, 4, 2)
            masks[i] = np.roll(mask, shift, axis=(0, 1))
            keypoints[i] = np.array(annotation["keypoints"]).reshape(-1, 3) + rng.normal(
                0, rng.choice([0, 1, 5])
            )
            classes[-1] = annotation["category_id"]
    scores = rng.random(count)
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.tensor([box_of(mask) for mask in masks]).reshape(-1, 4)),
        scores=torch.tensor(scores.round(1) if tied else scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        pred_masks=torch.from_numpy(masks),
        pred_keypoints=torch.from_numpy(keypoints).float(),
    )


def pycocotools_precision_and_recall(truth_file, results, task, limits):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(truth_file)
        results = copy.deepcopy(results)
        if task == "segm":  # otherwise it takes the area of the box
            results = [
                {key: value for key, value in result.items() if key != "bbox"} for result in results
            ]
        found = coco.loadRes(results) if results else COCO()
        evaluation = COCOeval(coco, found, task)
        evaluation.params.maxDets = limits
        evaluation.params.kpt_oks_sigmas = np.array(SIGMAS)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"], evaluation.eval["recall"]


def run(evaluator, outputs):
    """The scores of outputs (instances by image id)."""
    evaluator.reset()
    for image_id, instances in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(25))
def test_all_numbers_of_masks_and_keypoints_are_those_of_pycocotools(seed, register, tmp_path):
    records, outputs = random_problem(seed)
    name = register(records, CLASSES, thing_dataset_id_to_contiguous_id={5: 0, 2: 1, 9: 2})
    max_dets = [100, 11, 1, 400][seed % 4]
    evaluator = COCOEvaluator(
        name,
        ["bbox", "segm", "keypoints"],
        output_dir=str(tmp_path),
        max_dets_per_image=max_dets,
        kpt_oks_sigmas=SIGMAS,
    )
    results = run(evaluator, outputs)
    convert_to_coco_json(name, tmp_path / "truth.json")
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert list(results) == ["bbox", "segm", "keypoints"]
    for task in ("segm", "keypoints"):
        detections = evaluator._detections.gather(False)
        scores = score_detections(evaluator._ground_truth, detections, evaluator._protocol, task)
        expected = pycocotools_precision_and_recall(
            str(tmp_path / "truth.json"), written, task, scores.limits
        )
        # Categories are sorted by their ids there: 2, 5, 9.
        order = [1, 0, 2]
        np.testing.assert_allclose(scores.precision, expected[0][:, :, order], atol=1e-9)
        np.testing.assert_allclose(scores.recall, expected[1][:, order], atol=1e-9)
        valid = expected[0][:, :, :, 0, -1]
        mean = 100 * valid[valid > -1].mean() if (valid > -1).any() else math.nan
        np.testing.assert_allclose(results[task]["AP"], mean, atol=1e-9)


@pytest.mark.parametrize("pairs_at_a_time", [1, 5])
def test_boxes_score_alike_however_many_pairs_at_a_time(pairs_at_a_time, register, monkeypatch):
    records, outputs = random_problem(0)
    name = register(records, CLASSES)
    whole = run(COCOEvaluator(name, ["bbox"]), outputs)["bbox"]
    monkeypatch.setattr(class_scores, "_PAIRS_AT_A_TIME", pairs_at_a_time)
    assert run(COCOEvaluator(name, ["bbox"]), outputs)["bbox"] == pytest.approx(whole, nan_ok=True)
    assert 0 < whole["AP"] < 100


def test_boxes_of_many_images_are_matched_by_as_many_operations_as_those_of_few(monkeypatch):
    calls = []
    lexsort, nonzero = np.lexsort, np.nonzero
    monkeypatch.setattr(np, "lexsort", lambda keys: calls.append("sort") or lexsort(keys))
    monkeypatch.setattr(np, "nonzero", lambda array: calls.append("turn") or nonzero(array))

    def calls_of(num_images):
        calls.clear()
        box, images = {"bbox": [0.0, 0.0, 8.0, 8.0], "area": 64.0, "iscrowd": 0}, range(num_images)
        objects = [{**box, "image_id": image} for image in images]
        # Two overlap the object of each image, the third does not.
        detections = [
            {**box, "bbox": [x, 0.0, 8.0, 8.0], "score": 0.9 - x / 100, "image_id": image}
            for image in images
            for x in (0.0, 1.0, 20.0)
        ]
        precision, recall = class_scores.score_class(objects, detections, CocoProtocol(), "bbox")
        assert (recall[:, 0] == 1).all()
        assert precision[:, :, 0, -1].mean() == pytest.approx(1.0)
        return calls.copy()

    assert calls_of(1000) == calls_of(2)
    assert calls.count("sort") == 6  # objects, detections, four area ranges


def test_names_of_the_metrics_of_each_task(register):
    records, outputs = random_problem(3)
    results = run(COCOEvaluator(register(records, CLASSES), kpt_oks_sigmas=SIGMAS), outputs)
    per_class = [f"AP-{name}" for name in CLASSES]
    assert list(results["segm"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl", *per_class]
    assert list(results["keypoints"]) == ["AP", "AP50", "AP75", "APm", "APl", *per_class]


def test_config_as_second_argument_gives_the_spreads_of_keypoints(register):
    records, outputs = random_problem(3)
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
    name = register(records, CLASSES)
    results = run(COCOEvaluator(name, cfg, True, None), outputs)
    expected = run(COCOEvaluator(name, kpt_oks_sigmas=SIGMAS), outputs)
    assert repr(results) == repr(expected)  # some are nan


def usable_truth(seed):
    """Records whose objects all have a mask that is not empty and a labelled keypoint: others overlap nothing."""
    records = random_problem(seed)[0]
    for record in records:
        record["annotations"] = [
            a for a in record["annotations"] if mask_util.area(rle_of(a["segmentation"])) > 0
        ]
        for annotation in record["annotations"]:
            annotation["keypoints"][2] = 1
    return records


def truth_as_outputs(name):
    coco = convert_to_coco_dict(name)
    of_image = {image["id"]: [] for image in coco["images"]}
    for annotation in coco["annotations"]:
        if not annotation["iscrowd"]:
            of_image[annotation["image_id"]].append(annotation)
    return {image_id: truth_as_output(annotations) for image_id, annotations in of_image.items()}


def truth_as_output(annotations):
    boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4)
    masks = [mask_util.decode(rle_of(a["segmentation"])) for a in annotations]
    keypoints = np.array([a["keypoints"] for a in annotations]).reshape(-1, NUM_KEYPOINTS, 3)
    return Instances(
        SIZE,
        pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
        scores=torch.ones(len(annotations)),
        pred_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        pred_masks=torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *SIZE)),
        # COCO's files number pixels: the middle of pixel 0 lies at 0.5.
        pred_keypoints=torch.from_numpy(keypoints + np.array([0.5, 0.5, 0])),
    )


def rle_of(segmentation):
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, *SIZE))
    return (
        mask_util.frPyObjects(segmentation, *SIZE)
        if isinstance(segmentation["counts"], list)
        else segmentation
    )


def test_ground_truth_as_predictions_scores_100(register):
    records = [record for seed in range(6) for record in usable_truth(seed)]
    for number, record in enumerate(records):
        record["image_id"] = number
    name = register(records, CLASSES)
    results = run(COCOEvaluator(name, kpt_oks_sigmas=SIGMAS), truth_as_outputs(name))
    assert list(results) == ["bbox", "segm", "keypoints"]
    for task, metrics in results.items():
        for metric, value in metrics.items():
            assert math.isnan(value) if metric == "AP-c" else value == pytest.approx(100), (
                task,
                metric,
            )


def test_tasks_are_scored_in_the_order_of_coco(register):
    records, outputs = random_problem(3)
    evaluator = COCOEvaluator(register(records, CLASSES), ["segm", "bbox"])
    assert list(run(evaluator, outputs)) == ["bbox", "segm"]


def test_thresholds_and_areas_of_ones_own(register, make_record, make_instances):
    # Overlap 0.4 with an object of 100 square pixels, and exactly with one of 400.
    name = register([make_record(1, ([0, 0, 10, 10], 0), ([50, 50, 70, 70], 0))])
    found = {1: make_instances(([0, 0, 10, 4], 0, 0.9), ([50, 50, 70, 70], 0, 0.8))}
    areas = [["tiny", 0, 100], ["bigger", 101, 1e10]]
    metrics = run(COCOEvaluator(name, iou_thresholds=[0.3, 0.625], area_ranges=areas), found)[
        "bbox"
    ]
    assert list(metrics) == ["AP", "AP30", "AP62.5", "AP_tiny", "AP_bigger", "AP-cat", "AP-dog"]
    assert metrics["AP30"] == pytest.approx(100)
    # Rank 1 is wrong, rank 2 right: precision 1/2 up to recall 1/2.
    assert metrics["AP62.5"] == pytest.approx(100 * 51 / 101 / 2)
    assert metrics["AP_tiny"] == pytest.approx(50)
    assert metrics["AP_bigger"] == pytest.approx(100)


def test_recall_has_a_row_for_every_area(register):
    records, outputs = random_problem(3)
    evaluator = COCOEvaluator(register(records, CLASSES), kpt_oks_sigmas=SIGMAS)
    run(evaluator, outputs)
    detections = evaluator._detections.gather(False)
    recalls = coco_recalls(
        score_detections(evaluator._ground_truth, detections, evaluator._protocol, "keypoints")
    )
    assert list(recalls) == ["AR@20", "ARm", "ARl"]


def test_objects_without_masks_do_not_count_in_the_score_of_masks(register, caplog):
    records = [record for record in usable_truth(3) if record["annotations"]]
    name = register(records, CLASSES)
    outputs = truth_as_outputs(name)
    del records[0]["annotations"][0]["segmentation"]
    with caplog.at_level(logging.WARNING):
        metrics = run(COCOEvaluator(name, ["segm"]), outputs)["segm"]
    assert metrics["AP"] == pytest.approx(100)
    assert "1 of " in caplog.text
    assert "have no mask" in caplog.text


def test_objects_without_keypoints_need_not_be_found(register):
    records = [record for record in usable_truth(3) if record["annotations"]]
    name = register(records, CLASSES)
    outputs = truth_as_outputs(name)
    template = records[0]["annotations"][0]
    records[0]["annotations"].append({**template, "iscrowd": 0})
    del records[0]["annotations"][-1]["keypoints"]
    evaluator = COCOEvaluator(name, ["keypoints"], kpt_oks_sigmas=SIGMAS)
    assert run(evaluator, outputs)["keypoints"]["AP"] == pytest.approx(100)


def test_keypoints_beyond_twenty_objects_are_reported(register, caplog):
    records, outputs = random_problem(3)
    annotation = next(
        a
        for r in records
        for a in r["annotations"]
        if sum(a["keypoints"][2::3]) and not a["iscrowd"]
    )
    records[0]["annotations"] = [annotation] * 21
    evaluator = COCOEvaluator(register(records, CLASSES), kpt_oks_sigmas=SIGMAS)
    with caplog.at_level(logging.WARNING):
        run(evaluator, outputs)
    assert "more than 20 objects (up to 21)" in caplog.text
    assert "TEST.KEYPOINT_DETECTIONS_PER_IMAGE" in caplog.text


def test_objects_without_labelled_keypoints_are_not_reported(register, caplog):
    records, outputs = random_problem(3)
    annotation = next(a for r in records for a in r["annotations"] if not a["iscrowd"])
    unlabelled = {**annotation, "keypoints": [0.0] * (3 * NUM_KEYPOINTS)}
    records[0]["annotations"] = [unlabelled] * 21
    evaluator = COCOEvaluator(register(records, CLASSES), ["keypoints"], kpt_oks_sigmas=SIGMAS)
    with caplog.at_level(logging.WARNING):
        run(evaluator, outputs)
    assert "more than 20 objects" not in caplog.text


def test_masks_are_held_encoded(register):
    records, outputs = random_problem(5)
    evaluator = COCOEvaluator(register(records, CLASSES), kpt_oks_sigmas=SIGMAS)
    run(evaluator, outputs)
    for detections in evaluator._detections.gather(False):
        expected = outputs[detections.image_id].pred_masks.numpy()
        assert all(isinstance(rle["counts"], bytes) for rle in detections.masks)
        decoded = [mask_util.decode(rle) for rle in detections.masks]
        np.testing.assert_array_equal(np.array(decoded).reshape(-1, *SIZE), expected)


def one_detection(**fields):
    boxes = Boxes(torch.tensor([[0.0, 0.0, 10.0, 10.0]]))
    return Instances(
        SIZE, pred_boxes=boxes, scores=torch.ones(1), pred_classes=torch.zeros(1).long(), **fields
    )


@pytest.mark.parametrize(
    ("fields", "tasks", "message"),
    [
        pytest.param(
            {},
            ["segm"],
            "task 'segm' needs 'pred_masks' in .* image 0, .* MODEL.MASK_ON",
            id="no masks",
        ),
        pytest.param(
            {},
            ["keypoints"],
            "task 'keypoints' needs 'pred_keypoints'.*MODEL.KEYPOINT_ON",
            id="no keypoints",
        ),
        pytest.param(
            {"pred_masks": torch.zeros(1, 1, 28, 28)},
            None,
            r"masks in image 0 must be .* \(1, 1, 28, 28\)",
            id="not pasted",
        ),
        pytest.param(
            {"pred_keypoints": torch.zeros(1, 4, 3)},
            None,
            "instances in image 0 have 4 keypoints, but there are 5 .* TEST.KEYPOINT_OKS_SIGMAS",
            id="other keypoints",
        ),
        pytest.param(
            {"pred_keypoints": torch.full((1, 5, 3), math.nan)}, None, "not finite", id="nan"
        ),
    ],
)
def test_bad_predictions_are_errors(fields, tasks, message, register):
    evaluator = COCOEvaluator(register(random_problem(3)[0], CLASSES), tasks, kpt_oks_sigmas=SIGMAS)
    with pytest.raises(ValueError, match=message):
        run(evaluator, {0: one_detection(**fields)})


def test_masks_of_zeros_and_ones_in_any_dtype_are_scored_and_probabilities_are_not(register):
    name = register(random_problem(3)[0], CLASSES)
    masks = torch.rand(1, *one_detection().image_size) > 0.5
    scores = []
    for dtype in (torch.bool, torch.uint8, torch.float32):
        evaluator = COCOEvaluator(name)
        scores.append(run(evaluator, {0: one_detection(pred_masks=masks.to(dtype))})["segm"])
    np.testing.assert_equal(scores, [scores[0]] * 3)
    with pytest.raises(ValueError, match="masks in image 0 must be"):
        run(COCOEvaluator(name), {0: one_detection(pred_masks=masks * 0.6)})


def test_evaluator_that_scores_and_writes_in_its_own_way_as_in_detectron2(register, tmp_path):
    class Own(COCOEvaluator):
        def _eval_predictions(self, predictions, img_ids=None):
            found = [x for p in predictions for x in p["instances"]]
            (Path(self._output_dir) / "own.json").write_text(json.dumps(found))
            for task in sorted(self._tasks or self._tasks_from_predictions(predictions)):
                scored = evaluate_predictions_on_coco(
                    self._coco_api,
                    [{**x, "category_id": x["category_id"] + 1} for x in found],
                    task,
                    kpt_oks_sigmas=self._kpt_oks_sigmas,
                    use_fast_impl=self._use_fast_impl,
                    img_ids=img_ids,
                    max_dets_per_image=self._max_dets_per_image,
                )
                self._results[task] = self._derive_coco_results(scored, task)

    name = register(random_problem(3)[0], CLASSES)
    evaluator = Own(name, output_dir=str(tmp_path / "new"))
    assert set(run(evaluator, {0: one_detection()})["bbox"]) >= {"AP", "AP50"}
    assert json.loads((tmp_path / "new" / "own.json").read_text())


@pytest.mark.parametrize("kind", [str, Path])
def test_folder_of_an_evaluator_is_a_text_that_a_subclass_adds_to(register, tmp_path, kind):
    evaluator = COCOEvaluator(
        register(random_problem(3)[0], CLASSES), output_dir=kind(tmp_path / "new")
    )
    evaluator._output_dir = evaluator._output_dir + "-night"
    run(evaluator, {0: one_detection()})
    assert [path.name for path in tmp_path.glob("*/*")] == [COCOEvaluator.results_file]
    assert (tmp_path / "new-night" / COCOEvaluator.results_file).exists()


@pytest.mark.parametrize("size", [(50, 60), (90, 60), (50, 120)])
def test_masks_of_another_size_than_the_image_are_an_error(size, register):
    instances = Instances(
        size, **one_detection().get_fields(), pred_masks=torch.zeros(1, *size).bool()
    )
    evaluator = COCOEvaluator(register(random_problem(3)[0], CLASSES), kpt_oks_sigmas=SIGMAS)
    message = f"for image 0 are {size[0]}x{size[1]}, but the image is 90x120"
    with pytest.raises(ValueError, match=message):
        run(evaluator, {0: instances})


def test_objects_with_another_number_of_keypoints_are_an_error(register):
    with pytest.raises(
        ValueError,
        match=r"object 1 in image \d .* has 5 keypoints, but there are 17 .*KEYPOINT_OKS_SIGMAS",
    ):
        COCOEvaluator(register(random_problem(3)[0], CLASSES), ["keypoints"])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        pytest.param(
            {"size": [9, 9], "counts": [81]},
            r"has the size \(9, 9\), the image \(90, 120\)",
            id="size",
        ),
        pytest.param([["a"] * 6], "cannot be read", id="no numbers"),
    ],
)
def test_bad_masks_of_objects_are_errors(segmentation, message, register):
    records = random_problem(3)[0]
    annotation = {
        "bbox": [0, 0, 9, 9],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": 0,
        "area": 9.0,
    }
    records[0]["annotations"] = [{**annotation, "segmentation": segmentation}]
    with pytest.raises(
        ValueError, match=f"the mask of object 1 in image {records[0]['image_id']} .*{message}"
    ):
        run(COCOEvaluator(register(records, CLASSES), ["segm"]), {})


@pytest.mark.parametrize("count", [0, 1, 255, 256, 700])
def test_areas_of_any_number_of_masks(count):
    bitmaps = np.random.RandomState(0).rand(count, 5, 6) > 0.5
    masks = [bitmask_to_rle(bitmap) for bitmap in bitmaps]
    assert mask_areas(masks).tolist() == bitmaps.sum((1, 2)).tolist()
