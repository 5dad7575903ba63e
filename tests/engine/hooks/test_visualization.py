"""Pictures: what is drawn, and of which images."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detkit.config import get_cfg
from detkit.data import DatasetCatalog
from detkit.data.datasets.shapes import generate_shapes
from detkit.engine import hooks
from detkit.engine.hooks.visualization import draw_truth_and_prediction, write_pictures
from detkit.structures import Boxes, BoxMode, Instances
from detkit.utils.colormap import id2rgb
from detkit.utils.image_file import BadImageError
from detkit.visualization import ColorMode, Visualizer
from tests.engine.toy import IdleTrainer


class Model(nn.Module):
    """One box in each image; notes the mode it ran in."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.modes = []

    def forward(self, batch):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return [{"instances": instances([0.9])} for _ in batch]


def instances(scores):
    boxes = Boxes(torch.tensor([[2.0, 2.0, 20.0, 20.0]]).repeat(len(scores), 1))
    classes = torch.zeros(len(scores), dtype=torch.int64)
    return Instances((30, 40), pred_boxes=boxes, scores=torch.tensor(scores), pred_classes=classes)


@pytest.fixture
def records(tmp_path):
    made = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (40, 30), (10 * i, 0, 0)).save(path)
        box = {"bbox": [1, 1, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        made.append(
            {"file_name": str(path), "image_id": i, "height": 30, "width": 40, "annotations": [box]}
        )
    return made


def run(tmp_path, records, iterations=4, period=2, **kwargs):
    model, trainer = Model(), IdleTrainer()
    hook = hooks.VisualizationHook(
        period, model, lambda: records, dict, str(tmp_path / "out"), **kwargs
    )
    trainer.register_hooks([hook])
    trainer.train(0, iterations)
    return model, trainer, sorted(path.name for path in (tmp_path / "out").iterdir())


def test_draws_every_period_and_at_the_end(tmp_path, records):
    _, trainer, names = run(tmp_path, records, num_images=2)
    assert names == ["00_0000001.jpg", "00_0000004.jpg", "01_0000001.jpg", "01_0000004.jpg"]
    assert [(name, i) for name, _, i in trainer.storage.images()] == [
        ("predictions/00", 1),
        ("predictions/01", 1),
        ("predictions/00", 4),
        ("predictions/01", 4),
    ]
    assert all(
        image.dtype == np.uint8 and image.shape[0] == 3 for _, image, _ in trainer.storage.images()
    )


def test_model_runs_in_eval_mode_and_comes_back_as_it_was(tmp_path, records):
    model, _, _ = run(tmp_path, records, iterations=1)
    assert set(model.modes) == {(False, False)}
    assert model.training
    assert model.norm.training


@pytest.mark.parametrize(("num_images", "drawn"), [(1, 1), (3, 3), (9, 5)])
def test_fixed_number_of_images_is_spread_over_the_data_set(tmp_path, records, num_images, drawn):
    _, _, names = run(tmp_path, records, iterations=1, period=0, num_images=num_images)
    assert len(names) == drawn


def test_empty_data_set_draws_nothing(tmp_path):
    assert run(tmp_path, [], iterations=1)[2] == []


def difference(record, output, other):
    """Columns in which the pictures of two outputs differ, as shares of the width."""
    a, b = (draw_truth_and_prediction(record, o).get_image().astype(int) for o in (output, other))
    return np.flatnonzero(np.abs(a - b).max((0, 2)) > 20) / a.shape[1]


def test_picture_has_truth_on_the_left_and_prediction_on_the_right(records):
    assert (
        difference(records[0], {"instances": instances([0.9])}, {"instances": instances([])}).min()
        >= 0.5
    )


def test_scores_below_the_threshold_are_not_drawn(records):
    both, sure = {"instances": instances([0.9, 0.4])}, {"instances": instances([0.9])}
    assert difference(records[0], both, sure).size == 0


def proposals(count):
    return Instances(
        (30, 40),
        proposal_boxes=Boxes(torch.rand(count, 4) * 30),
        objectness_logits=torch.rand(count),
    )


def test_best_proposals_are_drawn_for_a_model_without_instances(records):
    many = proposals(50)
    assert difference(records[0], {"proposals": many}, {"proposals": many[:20]}).size == 0
    assert difference(records[0], {"proposals": many}, {"proposals": many[:0]}).min() >= 0.5


POLYGON = [[2.0, 2.0, 18.0, 2.0, 18.0, 18.0]]


@pytest.mark.parametrize(
    ("field", "value", "entry", "truth"),
    [
        pytest.param(
            "pred_masks",
            torch.zeros(1, 30, 40, dtype=torch.bool),
            "segmentation",
            POLYGON,
            id="masks",
        ),
        pytest.param(
            "pred_keypoints", torch.zeros(1, 1, 3), "keypoints", [12.0, 14.0, 2.0], id="keypoints"
        ),
    ],
)
def test_truth_shows_what_the_model_predicts(records, field, value, entry, truth):
    without, plain = {"instances": instances([0.9])}, instances([0.9])
    plain.set(field, value)
    records[0]["annotations"][0][entry] = truth
    changed = difference(records[0], {"instances": plain}, without)
    assert changed.size > 0
    assert changed.max() <= 0.5


def assert_both_sides_are_alike(picture):
    image, gap = picture.get_image().astype(int), 6
    width = (image.shape[1] - gap) // 2
    below_titles = slice(image.shape[0] // 4, None)
    left, right = image[below_titles, :width], image[below_titles, -width:]
    assert len(np.unique(left.reshape(-1, 3), axis=0)) > 2  # not two pictures of nothing
    assert (left == right).all(axis=2).mean() > 0.95  # but for the scores behind the names


def test_semantic_result_is_drawn_beside_the_label_map(records, tmp_path):
    labels = np.zeros((30, 40), np.uint8)
    labels[:, 20:] = 1
    Image.fromarray(labels).save(tmp_path / "labels.png")
    records[0]["sem_seg_file_name"] = str(tmp_path / "labels.png")
    scores = torch.nn.functional.one_hot(torch.as_tensor(labels).long()).permute(2, 0, 1)
    assert_both_sides_are_alike(draw_truth_and_prediction(records[0], {"sem_seg": scores}))


def test_panoptic_result_is_drawn_beside_the_panoptic_png(records, tmp_path):
    ids = np.full((30, 40), 7)
    ids[:, 20:] = 300
    Image.fromarray(id2rgb(ids)).save(tmp_path / "panoptic.png")
    infos = [
        {"id": 7, "category_id": 1, "isthing": False},
        {"id": 300, "category_id": 2, "isthing": True},
    ]
    records[0].update(pan_seg_file_name=str(tmp_path / "panoptic.png"), segments_info=infos)
    output = {
        "instances": instances([0.9]),
        "sem_seg": torch.zeros(3, 30, 40),
        "panoptic_seg": (torch.tensor(ids), infos),
    }
    assert_both_sides_are_alike(draw_truth_and_prediction(records[0], output))


def test_limit_of_pixels_holds_for_label_maps_too(tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "image.png")
    Image.new("L", (20, 20)).save(tmp_path / "labels.png")
    record = {
        "file_name": str(tmp_path / "image.png"),
        "sem_seg_file_name": str(tmp_path / "labels.png"),
    }
    with pytest.raises(
        BadImageError, match=r"labels\.png .* 399 pixels that INPUT.MAX_IMAGE_PIXELS"
    ):
        draw_truth_and_prediction(record, {"sem_seg": torch.zeros(1, 10, 10)}, max_image_pixels=399)


class OneBox(nn.Module):
    """Finds one object of class 0 in every image, and remembers in which mode it ran."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.score = score
        self.modes: list[bool] = []

    def forward(self, batch):
        self.modes.append(self.training)
        size = (batch[0]["height"], batch[0]["width"])
        boxes = Boxes(torch.tensor([[5.0, 5, 90, 90]]))
        found = Instances(
            size,
            pred_boxes=boxes,
            scores=torch.tensor([self.score]),
            pred_classes=torch.tensor([0]),
        )
        return [{"instances": found}]


@pytest.fixture
def cfg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    generate_shapes(tmp_path / "data" / "shapes", num_train=1, num_val=5)
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path / "data"))
    cfg = get_cfg()
    cfg.merge_from_list(["DATASETS.TEST", "('shapes_val',)", "INPUT.MIN_SIZE_TEST", 64])
    return cfg


def test_pictures_are_spread_over_the_data_set_up_to_the_limit(cfg, tmp_path: Path) -> None:
    written = write_pictures(cfg, OneBox(0.9), tmp_path / "pictures", limit=2)
    assert [path.name for path in written] == [
        "shapes_val_val_000000.jpg",
        "shapes_val_val_000002.jpg",
    ]
    assert all(path.is_file() for path in written)


def test_name_of_a_data_set_does_not_lead_out_of_the_folder(cfg, tmp_path: Path) -> None:
    records = DatasetCatalog.get("shapes_val")
    DatasetCatalog.register("../../outside", lambda: records)
    try:
        cfg.DATASETS.TEST = ("../../outside",)
        (path,) = write_pictures(cfg, OneBox(0.9), tmp_path / "a" / "pictures", limit=1)
    finally:
        DatasetCatalog.remove("../../outside")
    assert path.parent == tmp_path / "a" / "pictures"


def test_small_data_set_gives_a_picture_of_every_image(cfg, tmp_path: Path) -> None:
    assert len(write_pictures(cfg, OneBox(0.9), tmp_path / "pictures", limit=12)) == 5


def test_images_of_one_stem_have_pictures_of_their_own(cfg, tmp_path: Path) -> None:
    files = []
    for file in ("a/001.png", "b/001.png", "b/001.jpg"):
        files.append(tmp_path / file)
        files[-1].parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(files[-1])
    DatasetCatalog.register(
        "stems",
        lambda: [
            {"file_name": str(file), "image_id": i, "height": 64, "width": 64, "annotations": []}
            for i, file in enumerate(files)
        ],
    )
    cfg.merge_from_list(["DATASETS.TEST", "('stems',)"])
    written = write_pictures(cfg, OneBox(0.9), tmp_path / "pictures")
    assert [path.name for path in written] == [
        "stems_001.jpg",
        "stems_001_2.jpg",
        "stems_001_3.jpg",
    ]


def test_model_runs_in_eval_mode_and_comes_back_in_its_own(cfg, tmp_path: Path) -> None:
    model = OneBox(0.9).train()
    write_pictures(cfg, model, tmp_path / "pictures", limit=1)
    assert model.modes == [False]
    assert model.training


def test_unsure_predictions_are_not_drawn(cfg, tmp_path: Path) -> None:
    (sure,) = write_pictures(cfg, OneBox(0.9), tmp_path / "sure", limit=1)
    (unsure,) = write_pictures(cfg, OneBox(0.1), tmp_path / "unsure", limit=1)
    (all_shown,) = write_pictures(cfg, OneBox(0.1), tmp_path / "all", limit=1, min_score=0)
    assert unsure.read_bytes() != sure.read_bytes()
    assert unsure.read_bytes() != all_shown.read_bytes()


def test_nothing_to_test_on_gives_no_pictures(cfg, tmp_path: Path) -> None:
    cfg.merge_from_list(["DATASETS.TEST", "()"])
    assert write_pictures(cfg, OneBox(0.9), tmp_path / "pictures") == []


def test_pictures_of_a_model_on_given_proposals(cfg, tmp_path: Path) -> None:
    records = DatasetCatalog.get("shapes_val")
    count = len(records)
    proposals = {
        "ids": [record["image_id"] for record in records],
        "boxes": [np.array([[1.0, 2, 30, 40]], dtype=np.float32)] * count,
        "objectness_logits": [np.zeros(1, dtype=np.float32)] * count,
        "bbox_mode": 0,
    }
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(proposals))
    cfg.merge_from_list(
        [
            "MODEL.LOAD_PROPOSALS",
            True,
            "DATASETS.PROPOSAL_FILES_TEST",
            [str(tmp_path / "proposals.pkl")],
        ]
    )
    assert len(write_pictures(cfg, OneBox(0.9), tmp_path / "pictures", limit=2)) == 2
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    with pytest.raises(ValueError, match="there is none for 'shapes_val'"):
        write_pictures(cfg, OneBox(0.9), tmp_path / "pictures")


def test_names_and_scores_may_be_left_out(cfg, tmp_path: Path) -> None:
    drawn = {}
    for shown in (True, False):
        cfg.VIS_LABELS = shown
        (path,) = write_pictures(cfg, OneBox(0.9), tmp_path / str(shown), limit=1)
        drawn[shown] = np.asarray(Image.open(path))
    assert (drawn[True] != drawn[False]).any()


def test_colours_stand_for_classes_or_for_instances(cfg, tmp_path: Path, monkeypatch) -> None:
    modes = []
    monkeypatch.setattr(
        "detkit.engine.hooks.visualization.Visualizer",
        lambda rgb, metadata, scale, mode, **kwargs: (
            modes.append(mode) or Visualizer(rgb, metadata, scale, mode, **kwargs)
        ),
    )
    for colors in ("class", "instance"):
        cfg.VIS_COLORS = colors
        write_pictures(cfg, OneBox(0.9), tmp_path / colors, limit=1)
    assert modes == [ColorMode.SEGMENTATION] * 2 + [ColorMode.IMAGE] * 2
