import json
import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util

from detkit.evaluation import SemSegEvaluator
from detkit.evaluation.sem_seg_evaluation import sem_seg_metrics

CLASSES = ["sky", "t-shirt", "road", "unseen"]
IGNORE = 255


@pytest.fixture
def make_truth(tmp_path):
    """A function that gives the records of label maps, written as pngs."""

    def make(*maps):
        records = []
        for number, labels in enumerate(maps):
            file_name = str(tmp_path / f"{number}.png")
            Image.fromarray(np.array(labels, dtype=np.uint8)).save(file_name)
            records.append(
                {"file_name": f"{number}.jpg", "image_id": number, "sem_seg_file_name": file_name}
            )
        return records

    return make


def scores_of(labels):
    labels = torch.tensor(np.array(labels)).long()
    return torch.nn.functional.one_hot(labels, len(CLASSES)).permute(2, 0, 1).float()


def run(evaluator, predictions):
    evaluator.reset()
    for number, labels in predictions.items():
        evaluator.process([{"file_name": f"{number}.jpg"}], [{"sem_seg": scores_of(labels)}])
    return evaluator.evaluate()


def slow_metrics(truths, predictions):
    pairs = [
        (t, p)
        for a, b in zip(truths, predictions, strict=True)
        for t, p in zip(a.flat, b.flat, strict=True)
        if t != IGNORE
    ]
    iou, accuracy, count = {}, {}, {}
    for k in range(len(CLASSES)):
        count[k] = sum(t == k for t, _ in pairs)
        if count[k]:
            right = sum(t == p == k for t, p in pairs)
            iou[k] = right / sum(k in (t, p) for t, p in pairs)
            accuracy[k] = right / count[k]
    values = {
        "mIoU": np.mean(list(iou.values())),
        "fwIoU": sum(iou[k] * count[k] for k in iou) / len(pairs),
    }
    values |= {f"IoU-{name}": iou.get(k, math.nan) for k, name in enumerate(CLASSES)}
    values |= {
        "mACC": np.mean(list(accuracy.values())),
        "pACC": sum(t == p for t, p in pairs) / len(pairs),
    }
    values |= {f"ACC-{name}": accuracy.get(k, math.nan) for k, name in enumerate(CLASSES)}
    return {name: 100 * value for name, value in values.items()}


@pytest.mark.parametrize("seed", range(5))
def test_numbers_are_those_of_the_slow_reference(seed, register, make_truth):
    rng = np.random.default_rng(seed)
    truths = [rng.choice([0, 1, 2, IGNORE], (rng.integers(1, 9), 7)) for _ in range(3)]
    predictions = [
        np.where(rng.random(t.shape) < 0.5, rng.integers(0, 4, t.shape), t % IGNORE) for t in truths
    ]
    name = register(make_truth(*truths), stuff_classes=CLASSES, ignore_label=IGNORE)
    metrics = run(SemSegEvaluator(name), dict(enumerate(predictions)))["sem_seg"]
    expected = slow_metrics(truths, predictions)
    assert list(metrics) == list(expected)
    np.testing.assert_allclose(list(metrics.values()), list(expected.values()))


def test_ground_truth_as_predictions_scores_100(register, make_truth):
    labels = [[0, 1], [2, 2]]
    metrics = run(
        SemSegEvaluator(register(make_truth(labels), stuff_classes=CLASSES)), {0: labels}
    )["sem_seg"]
    for metric, value in metrics.items():
        assert math.isnan(value) if metric.endswith("-unseen") else value == 100


def test_ignored_pixels_of_a_data_set_with_256_classes(register, make_truth):
    # The ignored pixels get the number 256, which the file's uint8 does not hold.
    name = register(
        make_truth([[0, 1, 9]]), stuff_classes=list(map(str, range(256))), ignore_label=9
    )
    scores = torch.nn.functional.one_hot(torch.tensor([[0, 1, 0]]), 256).permute(2, 0, 1)
    evaluator = SemSegEvaluator(name, sem_seg_loading_fn=read_as_uint8)
    evaluator.process([{"file_name": "0.jpg"}], [{"sem_seg": scores}])
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == 100


def test_old_arguments_hold(register, make_truth):
    name = register(make_truth([[0, 1, 2]]), stuff_classes=CLASSES)
    evaluator = SemSegEvaluator(name, distributed=False, num_classes=4, ignore_label=2)
    assert run(evaluator, {0: [[0, 1, 0]]})["sem_seg"]["mIoU"] == 100
    with pytest.raises(ValueError, match="num_classes is 3, but data set .* has 4 semantic"):
        SemSegEvaluator(name, num_classes=3)


def read_as_uint8(file_name):
    return np.array(Image.open(file_name)).astype(np.uint8)


def test_class_without_pixels_does_not_count_though_it_is_predicted(register, make_truth):
    name = register(make_truth([[0, 0, 2, 2]]), stuff_classes=CLASSES)
    metrics = run(SemSegEvaluator(name), {0: [[0, 3, 2, 2]]})["sem_seg"]
    assert metrics["mIoU"] == pytest.approx((50 + 100) / 2)
    assert math.isnan(metrics["IoU-unseen"])


def test_without_any_pixel_everything_is_nan(register, make_truth, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = run(SemSegEvaluator(register(make_truth([[0]]), stuff_classes=CLASSES)), {})[
            "sem_seg"
        ]
    assert all(math.isnan(value) for value in metrics.values())
    assert "only 0 of the 1 images" in caplog.text


def test_large_counts_do_not_overflow():
    confusion = np.diag([2**40, 2**40, 0]).astype(np.int64)
    assert sem_seg_metrics(confusion, ["a", "b"])["pACC"] == 100


def test_file_of_predictions_has_a_mask_per_class_with_the_ids_of_the_data_set(
    register, make_truth, tmp_path
):
    ids = {100 + index: index for index in range(4)}
    name = register(
        make_truth([[0, 0, 1]]), stuff_classes=CLASSES, stuff_dataset_id_to_contiguous_id=ids
    )
    run(SemSegEvaluator(name, output_dir=str(tmp_path / "out")), {0: [[2, 0, 2]]})
    written = json.loads((tmp_path / "out/sem_seg_predictions.json").read_text())
    assert [(w["file_name"], w["category_id"]) for w in written] == [("0.jpg", 100), ("0.jpg", 102)]
    assert mask_util.decode([written[1]["segmentation"]])[..., 0].tolist() == [[1, 0, 1]]


def test_subclass_writes_its_own_entries(register, make_truth, tmp_path):
    class Own(SemSegEvaluator):
        def encode_json_sem_seg(self, sem_seg, input_file_name):
            entries = super().encode_json_sem_seg(sem_seg, input_file_name)
            return [{**entry, "pixels": int((sem_seg >= 0).sum())} for entry in entries]

    name = register(make_truth([[0, 0, 1]], [[1, 1, 1]]), stuff_classes=CLASSES)
    own = Own(name, output_dir=str(tmp_path / "own"))
    usual = SemSegEvaluator(name, output_dir=str(tmp_path / "usual"))
    predictions = {0: [[2, 0, 2]], 1: [[1, 1, 1]]}
    scores, usual_scores = (run(evaluator, predictions)["sem_seg"] for evaluator in (own, usual))
    assert scores == pytest.approx(usual_scores, nan_ok=True)
    written, expected = (
        json.loads((tmp_path / folder / "sem_seg_predictions.json").read_text())
        for folder in ("own", "usual")
    )
    assert written == [{**entry, "pixels": 3} for entry in expected]
    run(own, {0: [[2, 0, 2]]})
    assert len(json.loads((tmp_path / "own/sem_seg_predictions.json").read_text())) == 2


def test_reset_forgets_predictions(register, make_truth):
    evaluator = SemSegEvaluator(register(make_truth([[0, 0]]), stuff_classes=CLASSES))
    assert run(evaluator, {0: [[1, 0]]})["sem_seg"]["pACC"] == 50
    assert run(evaluator, {0: [[0, 0]]})["sem_seg"]["pACC"] == 100


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        pytest.param(
            {"image_id": 0},
            {},
            r"need 'file_name' in every input, got the keys \['image_id'\]",
            id="no name",
        ),
        pytest.param(
            {"file_name": "0.jpg"},
            {},
            r"needs 'sem_seg' in the model's outputs, got the keys \[\]",
            id="no output",
        ),
        pytest.param(
            {"file_name": "0.jpg"},
            {"sem_seg": torch.zeros(3, 1, 2)},
            r"\(3, 1, 2\) .* has 4 .*NUM_CLASSES",
            id="classes",
        ),
        pytest.param(
            {"file_name": "0.jpg"},
            {"sem_seg": torch.zeros(4, 2, 2)},
            r"0.jpg is \(2, 2\), its .* \(1, 2\)",
            id="size",
        ),
        pytest.param(
            {"file_name": "9.jpg"},
            {"sem_seg": torch.zeros(4, 2, 2)},
            "'9.jpg' was predicted, but is not",
            id="image",
        ),
    ],
)
def test_bad_predictions_are_errors(inputs, outputs, message, register, make_truth):
    evaluator = SemSegEvaluator(register(make_truth([[0, 0]]), stuff_classes=CLASSES))
    with pytest.raises(ValueError, match=message):
        evaluator.process([inputs], [outputs])


def test_class_that_the_metadata_does_not_have_is_an_error(register, make_truth):
    evaluator = SemSegEvaluator(register(make_truth([[0, 7, 255]]), stuff_classes=CLASSES))
    with pytest.raises(
        ValueError, match=r"0.png has the values \[7\], .* \(0 to 3\) nor its ignore_label 255"
    ):
        run(evaluator, {0: [[0, 0, 0]]})


@pytest.mark.parametrize(
    ("records", "metadata", "message"),
    [
        pytest.param(
            [{"file_name": "a.jpg"}],
            {"stuff_classes": CLASSES},
            "no semantic ground truth for a.jpg",
            id="truth",
        ),
        pytest.param([], {}, "has no names of semantic classes: .*stuff_classes", id="names"),
        pytest.param(
            [{"file_name": "a.jpg", "sem_seg_file_name": "a.png"}] * 2,
            {"stuff_classes": CLASSES},
            "a.jpg twice",
            id="twice",
        ),
    ],
)
def test_data_set_that_cannot_be_scored_is_an_error(records, metadata, message, register):
    with pytest.raises(ValueError, match=message):
        SemSegEvaluator(register(records, **metadata))
