import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.data.datasets.builtin_meta import CITYSCAPES_LABELS
from detkit.evaluation import CityscapesInstanceEvaluator, CityscapesSemSegEvaluator
from detkit.evaluation.cityscapes.sem_seg import CATEGORIES
from detkit.structures import Boxes, Instances
from detkit.utils.image_file import BadImageError

LABELS = [label.id for label in CITYSCAPES_LABELS]
NAMES = [label.name for label in CITYSCAPES_LABELS]
THINGS = [label for label in CITYSCAPES_LABELS if label.id >= 24]
THING_NAMES = [label.name for label in THINGS]
SIZE = (40, 60)


@pytest.fixture
def write_truth(tmp_path):
    """A function that writes maps of instances as a data set's ground truth, and gives its folder."""

    def write(*maps):
        for number, ids in enumerate(maps):
            folder = tmp_path / "gt" / f"city{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            stem = str(folder / frame_of(number))
            Image.fromarray(ids.astype(np.uint16)).save(f"{stem}_gtFine_instanceIds.png")
            labels = np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)
            Image.fromarray(labels).save(f"{stem}_gtFine_labelIds.png")
        return str(tmp_path / "gt")

    return write


def frame_of(number):
    return f"city{number % 2}_{number:06d}_000019"


def random_map(rng):
    """Stuff, void, groups, caravans, and objects of all sizes, some of them below 100 pixels."""
    ids = np.full(SIZE, 7)
    for number in range(rng.integers(3, 14)):
        top, left = rng.integers(0, SIZE[0]), rng.integers(0, SIZE[1])
        height, width = rng.integers(3, 25, 2)
        label = int(rng.choice([24, 24, 26, 26, 33, 29]))
        choices = [
            int(rng.choice([0, 4, 8, 21, 23])),
            label,
            1000 * label + number,
            1000 * label + number,
        ]
        ids[top : top + height, left : left + width] = rng.choice(choices)
    return ids


def random_instances(rng, ids):
    masks, classes = [], []
    for instance_id in np.unique(ids):
        label = instance_id if instance_id < 1000 else instance_id // 1000
        for _ in range(rng.integers(0, 3)):
            if label not in [thing.id for thing in THINGS]:
                label = 24
            mask = np.roll(ids == instance_id, rng.integers(-2, 3, 2), axis=(0, 1))
            masks.append(mask & (rng.random(SIZE) < rng.choice([0.6, 0.9, 1])))
            classes.append([thing.id for thing in THINGS].index(label))
    for _ in range(rng.integers(0, 3)):
        masks.append(rng.random(SIZE) < rng.choice([0, 0.1]))
        classes.append(int(rng.choice([0, 2])))
    return make_instances(masks, classes, rng.random(len(masks)).round(1))


def make_instances(masks, classes, scores):
    return Instances(
        SIZE,
        pred_boxes=Boxes(torch.zeros(len(masks), 4)),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float64),
        pred_masks=torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *SIZE)),
    )


def run(evaluator, key, outputs):
    evaluator.reset()
    for number, output in outputs.items():
        evaluator.process([{"file_name": f"x/{frame_of(number)}_leftImg8bit.png"}], [{key: output}])
    return evaluator.evaluate()


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The evaluation scripts, with what NumPy has dropped since; they write into the current folder."""
    pytest.importorskip(
        "cityscapesscripts", reason="needs cityscapesscripts: pip install cityscapesscripts"
    )
    from cityscapesscripts.evaluation import evalInstanceLevelSemanticLabeling as instance
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as pixel

    monkeypatch.setattr(np, "in1d", np.isin, raising=False)
    # It writes what it matched, and cannot write the integers of today's NumPy.
    monkeypatch.setattr(instance, "writeDict2JSON", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    for args in (instance.args, pixel.args):
        for name, value in {"JSONOutput": False, "quiet": True, "predictionWalk": None}.items():
            monkeypatch.setattr(args, name, value)
    return SimpleNamespace(instance=instance, pixel=pixel)


@pytest.mark.parametrize(
    ("evaluator", "key", "names"),
    [
        (CityscapesInstanceEvaluator, "instances", {"class_names": THING_NAMES}),
        (CityscapesSemSegEvaluator, "sem_seg", {"stuff_classes": NAMES}),
    ],
)
def test_pngs_with_too_many_pixels_are_refused(evaluator, key, names, write_truth, register):
    folder = write_truth(np.full(SIZE, 7))
    output = (
        make_instances([], [], np.zeros(0))
        if key == "instances"
        else torch.zeros(len(NAMES), *SIZE)
    )
    scored = evaluator(register([], gt_dir=folder, **names), max_image_pixels=2399)
    with pytest.raises(
        BadImageError, match=r"_gtFine_\w+Ids.png .* 2399 pixels that INPUT.MAX_IMAGE_PIXELS"
    ):
        run(scored, key, {0: output})


# The scripts fail where all predictions of a class are ignored, as with seed 8.
@pytest.mark.parametrize("seed", range(8))
def test_instance_numbers_are_those_of_the_scripts(
    seed, scripts, write_truth, register, tmp_path, monkeypatch
):
    rng = np.random.default_rng(seed)
    maps = [random_map(rng) for _ in range(4)]
    folder = write_truth(*maps)
    outputs = {number: random_instances(rng, ids) for number, ids in enumerate(maps)}
    metrics = run(
        CityscapesInstanceEvaluator(register([], THING_NAMES, gt_dir=folder)), "instances", outputs
    )["segm"]

    (tmp_path / "predictions").mkdir()
    truth_files, prediction_files = [], []
    for number, instances in outputs.items():
        lines = []
        for i in range(len(instances)):
            Image.fromarray(instances.pred_masks[i].numpy().astype(np.uint8) * 255).save(
                tmp_path / f"predictions/{frame_of(number)}_{i}.png"
            )
            label = THINGS[instances.pred_classes[i]].id
            lines.append(
                f"{frame_of(number)}_{i}.png {label} {float(instances.scores[i].float())}\n"
            )
        prediction_files.append(str(tmp_path / f"predictions/{frame_of(number)}_pred.txt"))
        truth_files.append(f"{folder}/city{number % 2}/{frame_of(number)}_gtFine_instanceIds.png")
        (tmp_path / f"predictions/{frame_of(number)}_pred.txt").write_text("".join(lines))
    args = scripts.instance.args
    monkeypatch.setattr(args, "predictionPath", str(tmp_path / "predictions"))
    monkeypatch.setattr(args, "gtInstancesFile", str(tmp_path / "instances.json"))
    monkeypatch.setattr(args, "instLabels", [])
    averages = scripts.instance.evaluateImgLists(prediction_files, truth_files, args)["averages"]
    expected = [
        averages["allAp"],
        averages["allAp50%"],
        *(averages["classes"][name]["ap"] for name in THING_NAMES),
    ]
    np.testing.assert_allclose(list(metrics.values()), 100 * np.array(expected), atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_pixel_numbers_are_those_of_the_scripts(seed, scripts, write_truth, register, tmp_path):
    rng = np.random.default_rng(seed)
    maps = [random_map(rng) for _ in range(3)]
    folder = write_truth(*maps)
    outputs, truth_files, prediction_files = {}, [], []
    for number, ids in enumerate(maps):
        labels = np.where(ids < 1000, ids, ids // 1000)
        labels = np.where(
            np.isin(labels, LABELS) & (rng.random(SIZE) < 0.8), labels, rng.choice(LABELS, SIZE)
        )
        outputs[number] = scores_of(labels)
        prediction_files.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(labels.astype(np.uint8)).save(prediction_files[-1])
        truth_files.append(f"{folder}/city{number % 2}/{frame_of(number)}_gtFine_labelIds.png")
    name = register([], gt_dir=folder, stuff_classes=NAMES)
    metrics = run(CityscapesSemSegEvaluator(name), "sem_seg", outputs)["sem_seg"]
    expected = scripts.pixel.evaluateImgLists(prediction_files, truth_files, scripts.pixel.args)
    averages = [
        "averageScoreClasses",
        "averageScoreInstClasses",
        "averageScoreCategories",
        "averageScoreInstCategories",
    ]
    assert list(metrics)[:4] == ["IoU", "iIoU", "IoU_sup", "iIoU_sup"]
    np.testing.assert_allclose(
        list(metrics.values())[:4], [100 * expected[key] for key in averages]
    )
    np.testing.assert_allclose(
        [metrics[f"IoU-{n}"] for n in NAMES], [100 * expected["classScores"][n] for n in NAMES]
    )


def scores_of(labels):
    return torch.from_numpy((labels == np.array(LABELS)[:, None, None]).astype(np.float32))


def simple_map():
    """Two cars, a small one, a group of cars, a person, void, and road."""
    ids = np.full(SIZE, 7)
    ids[:10, :20], ids[:10, 30:50] = 26001, 26002
    ids[15:20, :5] = 26003
    ids[15:30, 10:30] = 26
    ids[15:30, 40:60] = 24001
    ids[35:] = 4
    return ids


def truth_as_instances(ids):
    found = [i for i in np.unique(ids) if i >= 1000]
    classes = [[thing.id for thing in THINGS].index(i // 1000) for i in found]
    return make_instances([ids == i for i in found], classes, np.ones(len(found)))


def test_ground_truth_as_predictions_scores_100(write_truth, register):
    maps = [simple_map(), simple_map()[:, ::-1]]
    name = register([], THING_NAMES, gt_dir=write_truth(*maps), stuff_classes=NAMES)
    outputs = {number: truth_as_instances(ids) for number, ids in enumerate(maps)}
    metrics = run(CityscapesInstanceEvaluator(name), "instances", outputs)["segm"]
    assert list(metrics) == ["AP", "AP50", *(f"AP-{n}" for n in THING_NAMES)]
    known = ["AP", "AP50", "AP-car", "AP-person"]
    assert all(
        value == pytest.approx(100) if key in known else math.isnan(value)
        for key, value in metrics.items()
    )

    outputs = {
        number: scores_of(np.where(ids < 1000, ids, ids // 1000)) for number, ids in enumerate(maps)
    }
    metrics = run(CityscapesSemSegEvaluator(name), "sem_seg", outputs)["sem_seg"]
    known = ["IoU", "iIoU", "IoU_sup", "iIoU_sup", "IoU-road", "IoU-car", "IoU-person"]
    assert all(
        value == pytest.approx(100) if key in known else math.isnan(value)
        for key, value in metrics.items()
    )


def test_what_lies_in_groups_void_and_small_objects_is_not_wrong(write_truth, register):
    ids = simple_map()
    name = register([], THING_NAMES, gt_dir=write_truth(ids))
    masks = [ids == i for i in (26001, 26002, 24001, 26003, 26, 4)]
    instances = make_instances(masks, [2, 2, 0, 2, 2, 2], [0.1, 0.2, 0.3, 0.9, 0.9, 0.9])
    metrics = run(CityscapesInstanceEvaluator(name), "instances", {0: instances})["segm"]
    assert metrics["AP-car"] == pytest.approx(100)


def test_second_prediction_of_an_object_is_wrong(write_truth, register):
    ids = simple_map()
    name = register([], THING_NAMES, gt_dir=write_truth(ids))
    masks = [ids == 24001, ids == 24001, ids == 26001, ids == 26002]
    better, worse = (
        run(
            CityscapesInstanceEvaluator(name),
            "instances",
            {0: make_instances(masks, [0, 0, 2, 2], scores)},
        )["segm"]
        for scores in ([0.9, 0.1, 0.5, 0.5], [0.9, 0.9, 0.5, 0.5])
    )
    # Precision 1 at recall 1 for the better score, then 1/2 at the same recall.
    assert better["AP-person"] == pytest.approx(100 * (0.5 * 1.0 + 0.5 * 1.0))
    assert worse["AP-person"] == pytest.approx(100 * (0.5 * 0.5 + 0.5 * 1.0))


def test_images_that_were_not_predicted_are_missed(write_truth, register, caplog):
    ids = simple_map()
    name = register([], THING_NAMES, gt_dir=write_truth(ids, ids), stuff_classes=NAMES)
    with caplog.at_level(logging.WARNING):
        metrics = run(CityscapesInstanceEvaluator(name), "instances", {1: truth_as_instances(ids)})[
            "segm"
        ]
    # One point at precision 1 and recall 1/2, and the artificial one at recall 0.
    assert metrics["AP50"] == pytest.approx(50)
    assert "only 1 of the 2 images" in caplog.text
    with caplog.at_level(logging.WARNING):
        assert (
            run(CityscapesInstanceEvaluator(name), "instances", {1: make_instances([], [], [])})[
                "segm"
            ]["AP"]
            == 0
        )
    assert "AP is 0" in caplog.text
    assert math.isnan(run(CityscapesSemSegEvaluator(name), "sem_seg", {})["sem_seg"]["IoU"])


def test_image_in_which_a_panoptic_model_saw_no_instance_is_empty(write_truth, register, caplog):
    ids = simple_map()
    name = register([], THING_NAMES, gt_dir=write_truth(ids, ids))
    evaluator = CityscapesInstanceEvaluator(name)
    evaluator.process(
        [{"file_name": f"x/{frame_of(number)}_leftImg8bit.png"} for number in range(2)],
        [{"panoptic_seg": (torch.zeros(SIZE), None)}, {"instances": truth_as_instances(ids)}],
    )
    with caplog.at_level(logging.WARNING):
        assert 0 < evaluator.evaluate()["segm"]["AP50"] < 100
    assert not caplog.records  # both images count as predicted


def test_every_evaluated_label_has_one_category():
    assert sorted(label for labels in CATEGORIES.values() for label in labels) == LABELS


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        pytest.param({}, "need the folder of the ground truth .*gt_dir", id="no folder"),
        pytest.param({"gt_dir": "/nowhere"}, "/nowhere has no CITY/", id="no files"),
    ],
)
def test_data_set_without_ground_truth_is_an_error(metadata, message, register):
    with pytest.raises(ValueError, match=message):
        CityscapesInstanceEvaluator(register([], THING_NAMES, **metadata))


def test_class_that_cityscapes_does_not_have_is_an_error(write_truth, register):
    folder = write_truth(simple_map())
    with pytest.raises(
        ValueError, match="'cart', which is no evaluated class of Cityscapes. Did you mean 'car'"
    ):
        CityscapesInstanceEvaluator(register([], ["cart"], gt_dir=folder))
    with pytest.raises(ValueError, match="has no stuff_classes"):
        CityscapesSemSegEvaluator(register([], ["car"], gt_dir=folder))


@pytest.mark.parametrize(
    ("inputs", "output", "message"),
    [
        pytest.param({"image_id": 1}, {}, "need 'file_name' in every input", id="no name"),
        pytest.param(
            {"file_name": "x_leftImg8bit.png"},
            {},
            "image 'x' was predicted, but is not",
            id="other image",
        ),
        pytest.param(
            {"file_name": f"{frame_of(0)}.png"},
            {},
            "needs 'instances' in the model's outputs",
            id="no output",
        ),
        pytest.param(
            {"file_name": f"{frame_of(0)}.png"},
            {"instances": make_instances([np.ones(SIZE)], [8], [1.0])},
            r"class ids \[8\] in city0_000000_000019, but .* has 8 classes",
            id="class",
        ),
        pytest.param(
            {"file_name": f"{frame_of(0)}.png"},
            {
                "instances": Instances(
                    (9, 9), scores=torch.ones(1), pred_classes=torch.zeros(1).long()
                )
            },
            "needs 'pred_masks' .* MODEL.MASK_ON",
            id="no masks",
        ),
        pytest.param(
            {"file_name": f"{frame_of(0)}.png"},
            {
                "instances": Instances(
                    (9, 9),
                    scores=torch.ones(1),
                    pred_classes=torch.zeros(1).long(),
                    pred_masks=torch.ones(1, 9, 9) > 0,
                )
            },
            r"must have the size of the ground truth, \(40, 60\) .* got \(9, 9\)",
            id="size",
        ),
    ],
)
def test_bad_predictions_of_instances_are_errors(inputs, output, message, write_truth, register):
    evaluator = CityscapesInstanceEvaluator(
        register([], THING_NAMES, gt_dir=write_truth(simple_map()))
    )
    with pytest.raises(ValueError, match=message):
        evaluator.process([inputs], [output])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param({}, "needs 'sem_seg' in the model's outputs", id="no output"),
        pytest.param(
            {"sem_seg": torch.zeros(19, 9, 9)},
            r"must be \(19, 40, 60\) .* got \(19, 9, 9\)",
            id="size",
        ),
    ],
)
def test_bad_predictions_of_pixels_are_errors(output, message, write_truth, register):
    name = register([], stuff_classes=NAMES, gt_dir=write_truth(simple_map()))
    with pytest.raises(ValueError, match=message):
        CityscapesSemSegEvaluator(name).process(
            [{"file_name": f"{frame_of(0)}_leftImg8bit.png"}], [output]
        )
