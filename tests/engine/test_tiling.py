import json

import numpy as np
import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.data import DatasetCatalog, DatasetMapper, register_declared_datasets
from detkit.data import transforms as T
from detkit.engine import DefaultTrainer, Predictor
from detkit.engine.tiling import TiledModel, tile_grid
from detkit.structures import Boxes, Instances, rle_to_bitmask
from detkit.utils.errors import ConfigError


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        pytest.param(60, [0], id="smaller than a tile"),
        pytest.param(100, [0], id="one tile"),
        pytest.param(101, [0, 1], id="one pixel more"),
        pytest.param(180, [0, 80], id="two tiles"),
        pytest.param(250, [0, 80, 150], id="the last one is moved inwards"),
    ],
)
def test_tiles_cover_the_image(length: int, starts: list[int]) -> None:
    tiles = tile_grid((length, 70), 100, 0.2)
    assert [tile.y0 for tile in tiles] == starts
    assert {(tile.x0, tile.x1) for tile in tiles} == {(0, 70)}
    assert tiles[-1].y1 == length
    assert all(tile.y1 - tile.y0 == min(length, 100) for tile in tiles)


class Oracle(nn.Module):
    """Finds what is visible of each object: a region of one value.

    Objects of odd values are of class 1. A score falls with what lies outside of the tile, and
    boxes are moved by noise, another one in each tile.
    """

    def __init__(self, noise: float = 0.0, masks: bool = True) -> None:
        super().__init__()
        self.rng, self.noise, self.masks = np.random.default_rng(0), noise, masks
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, batch):
        return [{"instances": self.find(x)} for x in batch]

    def find(self, x):
        image = x["image"]
        self.shapes.append(tuple(image.shape))
        height, width = x["height"], x["width"]
        scale = torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
        value = image[0].int() + 256 * image[1].int()
        ids = [i for i in value.unique().tolist() if i]
        masks = torch.stack([value == i for i in ids]) if ids else torch.zeros(0, height, width)
        boxes = torch.zeros(len(ids), 4)
        for k, mask in enumerate(masks):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            box = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            boxes[k] = box + torch.from_numpy(self.rng.normal(0, self.noise, 4)).float()
            boxes[k, 2:] = torch.maximum(boxes[k, 2:], boxes[k, :2] + 0.5)
        found = Instances(
            (height, width),
            pred_boxes=Boxes(boxes * scale),
            scores=0.5 + 0.001 * torch.tensor([float(mask.sum()) for mask in masks]).clamp(max=400),
            pred_classes=torch.tensor([i % 2 for i in ids], dtype=torch.int64),
        )
        if self.masks:
            found.pred_masks = masks.bool()
        found.pred_boxes.clip((height, width))
        return found[found.pred_boxes.nonempty()]


def _scene(boxes, size=(400, 500)):
    """An image in which the object k + 1 fills the box k: its value is in two channels."""
    image = np.zeros((*size, 3), dtype=np.uint8)
    for k, (x0, y0, x1, y1) in enumerate(boxes):
        image[y0:y1, x0:x1, :2] = divmod(k + 1, 256)[::-1]
    return image


def _detect(image, model=None, **settings) -> Instances:
    arguments = {"size": 100, "overlap": 0.3, **settings}
    tiled = TiledModel(model=model or Oracle(), resize=T.ResizeShortestEdge(0), **arguments).eval()
    height, width = image.shape[:2]
    return tiled([{"image": image, "height": height, "width": width}])[0]["instances"]


def _separate_boxes(count, smallest, largest, seed=0, size=(400, 500)):
    """Boxes that leave five pixels between them."""
    rng, boxes = np.random.default_rng(seed), []
    taken = np.zeros(size, dtype=bool)
    while len(boxes) < count:
        w, h = rng.integers(smallest, largest, 2)
        x, y = rng.integers(0, size[1] - w), rng.integers(0, size[0] - h)
        if not taken[max(y - 5, 0) : y + h + 5, max(x - 5, 0) : x + w + 5].any():
            taken[y : y + h, x : x + w] = True
            boxes.append((int(x), int(y), int(x + w), int(y + h)))
    return boxes


@pytest.mark.parametrize("merge", ["nms", "wbf"])
@pytest.mark.parametrize(
    ("count", "smallest", "largest"),
    [
        pytest.param(120, 6, 20, id="smaller than the overlap"),
        pytest.param(6, 40, 160, id="larger than the overlap"),
    ],
)
def test_each_object_is_found_once(count: int, smallest: int, largest: int, merge: str) -> None:
    boxes = _separate_boxes(count, smallest, largest)
    image = _scene(boxes)
    found = _detect(image, merge=merge)
    assert sorted(map(tuple, found.pred_boxes.tensor.round().int().tolist())) == sorted(boxes)
    for box, k, rle in zip(
        found.pred_boxes.tensor.round().int().tolist(),
        found.pred_classes,
        found.pred_masks,
        strict=True,
    ):
        index = boxes.index(tuple(box))
        assert k == (index + 1) % 2
        assert np.array_equal(rle_to_bitmask(rle), image[:, :, 0] == index + 1)
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


@pytest.mark.parametrize("merge", ["nms", "wbf"])
def test_each_object_is_found_once_where_boxes_are_inexact(merge: str) -> None:
    boxes = _separate_boxes(120, 8, 26, seed=1)
    found = _detect(_scene(boxes), Oracle(noise=0.7, masks=False), merge=merge)
    assert len(found) == 120
    off = found.pred_boxes.tensor[:, None] - torch.tensor(boxes)[None]
    assert float(off.abs().amax(dim=2).min(dim=1).values.max()) < 4


def test_wbf_is_the_mean_weighted_by_scores() -> None:
    class Two(nn.Module):
        def forward(self, batch):
            left = float(batch[0]["image"][0, 0, 0]) == 0
            box, score = ([80.0, 20, 90, 30], 0.6) if left else ([12.0, 20, 22, 30], 0.3)
            return [{"instances": Instances(
                (100, 100), pred_boxes=Boxes(torch.tensor([box])),
                scores=torch.tensor([score]), pred_classes=torch.tensor([0]),
            )}]  # fmt: skip

    image = np.zeros((100, 170, 3), dtype=np.uint8)
    image[:, 70:, 0] = 1
    found = _detect(image, Two(), merge="wbf")
    # The second tile begins at 70: 80 and 82, weighted by 2 to 1.
    assert found.pred_boxes.tensor[0].tolist() == pytest.approx([80 + 2 / 3, 20, 90 + 2 / 3, 30])
    assert found.scores.tolist() == pytest.approx([0.45])
    assert _detect(image, Two()).pred_boxes.tensor.tolist() == [[80, 20, 90, 30]]
    assert _detect(image, Two()).scores.tolist() == pytest.approx([0.6])


def test_neighbours_of_one_class_on_a_border_stay_two() -> None:
    # Both lie within the overlap of the first two tiles, one of them is cut by the second.
    boxes = [(66, 10, 76, 20), (77, 10, 97, 20)]
    image = _scene(boxes, (100, 170))
    image[:, :, 0][image[:, :, 0] == 2] = 3  # of the class of the first
    assert sorted(map(tuple, _detect(image).pred_boxes.tensor.int().tolist())) == boxes


def test_objects_that_a_tile_keeps_apart_are_not_merged() -> None:
    class Dense(nn.Module):
        """Two boxes of an IoU of 0.6, which the NMS of the model has left."""

        def forward(self, batch):
            x = 10.0 if float(batch[0]["image"][0, 0, 0]) else 80.0
            boxes = torch.tensor([[x, 20, x + 8, 28], [x + 2, 20, x + 10, 28]])
            return [{"instances": Instances(
                (100, 100), pred_boxes=Boxes(boxes),
                scores=torch.tensor([0.9, 0.8]), pred_classes=torch.tensor([0, 0]),
            )}]  # fmt: skip

    image = np.zeros((100, 170, 3), dtype=np.uint8)
    image[:, 70:, 0] = 1
    assert len(_detect(image, Dense())) == 2


def test_image_smaller_than_a_tile_is_one() -> None:
    model = Oracle()
    assert len(_detect(_scene([(5, 5, 20, 20)], (40, 50)), model)) == 1
    assert model.shapes == [(3, 40, 50)]


def test_nothing_found_is_empty_with_all_fields() -> None:
    found = _detect(np.zeros((150, 150, 3), dtype=np.uint8))
    assert len(found) == 0
    assert (found.image_size, found.pred_masks) == ((150, 150), [])
    assert found.pred_boxes.tensor.shape == (0, 4)


def test_tiles_are_resized_and_batched_and_tensors_are_images() -> None:
    boxes = _separate_boxes(20, 10, 20)
    image = _scene(boxes)
    model, sizes = Oracle(masks=False), []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    resize = T.ResizeShortestEdge(200, 200, interp=0)
    tiled = TiledModel(model=model, resize=resize, size=100, overlap=0.3, batch_size=4).eval()
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    found = tiled([{"image": tensor, "height": 400, "width": 500}])[0]["instances"]
    assert set(model.shapes) == {(3, 200, 200)}
    assert sizes == [4] * 10 + [2]
    assert sorted(map(tuple, found.pred_boxes.tensor.int().tolist())) == sorted(boxes)
    with pytest.raises(ConfigError, match="takes images of their original size"):
        tiled([{"image": tensor, "height": 800, "width": 1000}])


def test_keypoints_are_moved_with_their_tile() -> None:
    class Points(nn.Module):
        def forward(self, batch):
            return [{"instances": Instances(
                (100, 100), pred_boxes=Boxes(torch.tensor([[40.0, 40, 60, 60]])),
                scores=torch.tensor([0.9]), pred_classes=torch.tensor([0]),
                pred_keypoints=torch.tensor([[[50.0, 55, 0.7]]]),
            )}]  # fmt: skip

    found = _detect(np.zeros((100, 170, 3), dtype=np.uint8), Points())
    assert found.pred_keypoints.tolist() == [
        [[50, 55, pytest.approx(0.7)]],
        [[120, 55, pytest.approx(0.7)]],
    ]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="merge must be nms or wbf, got 'x'"):
        _detect(np.zeros((9, 9, 3), np.uint8), merge="x")
    with pytest.raises(ValueError, match=r"overlap must lie in \[0, 1\), got 1"):
        _detect(np.zeros((9, 9, 3), np.uint8), overlap=1)
    cfg = get_cfg()
    cfg.TEST.TILES.SIZE, cfg.MODEL.ROTATED_BOXES = 100, True
    with pytest.raises(ConfigError, match="TEST.TILES is for upright boxes"):
        TiledModel(cfg, Oracle())


def test_model_without_instances_is_refused() -> None:
    class Segmentor(nn.Module):
        def forward(self, batch):
            return [{"sem_seg": torch.zeros(2, 9, 9)}]

    with pytest.raises(ConfigError, match="needs a model that finds instances; this one gives sem"):
        _detect(np.zeros((9, 9, 3), np.uint8), Segmentor())


def test_evaluation_pictures_and_predictor_detect_in_tiles(tiny_cfg, tmp_path) -> None:
    tiny_cfg.TEST.TILES.SIZE, tiny_cfg.TEST.TILES.OVERLAP = 24, 0.25
    tiny_cfg.INPUT.MIN_SIZE_TEST, tiny_cfg.INPUT.MAX_SIZE_TEST = 30, 60
    sizes = []

    class Spy(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg):
            model = super().build_model(cfg)
            model.register_forward_pre_hook(
                lambda module, args: (
                    None if module.training else sizes.append(tuple(args[0][0]["image"].shape))
                )
            )
            return model

    results = Spy(tiny_cfg).train()
    assert "AP" in results["bbox"]
    assert sizes == [(3, 30, 30)] * 6 * 6  # six images of six tiles
    found = json.loads((tmp_path / "output/inference/coco_instances_results.json").read_text())
    # The parts that the model sees in each tile are joined: one box in each image.
    assert [entry["bbox"] for entry in found] == [[1, 1, 46, 38]] * 6
    predictor = Predictor(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth")
    image = np.zeros((40, 48, 3), dtype=np.uint8)
    assert predictor(image, input="rgb").instances.pred_boxes.tensor.tolist() == [[1, 1, 47, 39]]
    whole = Predictor(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth", tile=0)
    assert not isinstance(whole.model, TiledModel)


def test_predictor_reads_windows_of_a_tiff(tiny_cfg, tmp_path, monkeypatch) -> None:
    tifffile = pytest.importorskip("tifffile", reason="tifffile is not installed")
    tiny_cfg.TEST.TILES.SIZE = 24
    DefaultTrainer(tiny_cfg).train()
    pixels = np.random.default_rng(0).integers(0, 255, (60, 70, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", tile=(16, 16))
    predictor = Predictor(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth")
    expected = predictor(pixels, input="rgb")
    monkeypatch.setattr("detkit.engine.predictor._pixels", None)  # the whole is not decoded
    found = predictor(tmp_path / "a.tif")
    assert found.image_size == (60, 70)
    assert torch.equal(found.instances.pred_boxes.tensor, expected.instances.pred_boxes.tensor)
    assert torch.equal(found.instances.scores, expected.instances.scores)
    assert np.array_equal(found.image, pixels)


def test_training_on_tiles_cuts_them_around_objects(tiny_cfg) -> None:
    tiny_cfg.INPUT.TILES.SIZE, tiny_cfg.INPUT.TILES.EMPTY = 16, 0.0
    tiny_cfg.INPUT.TILES.MIN_VISIBLE = 0.0
    tiny_cfg.INPUT.MIN_SIZE_TRAIN, tiny_cfg.INPUT.RANDOM_FLIP = (32,), "none"
    register_declared_datasets(tiny_cfg.DATASETS.REGISTER)
    mapper = DatasetMapper(tiny_cfg, is_train=True)
    records = DatasetCatalog.get("tiny_train")
    samples = [mapper(record) for record in records * 5]
    assert {tuple(x["image"].shape) for x in samples} == {(3, 32, 32)}
    assert all(len(x["instances"]) == 1 for x in samples)
    # An object of 20 x 25 pixels, of which 16 x 16 are visible at most.
    tiny_cfg.INPUT.TILES.MIN_VISIBLE = 0.6
    mapper = DatasetMapper(tiny_cfg, is_train=True)
    assert all(len(mapper(record)["instances"]) == 0 for record in records)
    tiny_cfg.INPUT.TILES.EMPTY, tiny_cfg.INPUT.TILES.MIN_VISIBLE = 1.0, 0.0
    mapper = DatasetMapper(tiny_cfg, is_train=True)
    counts = [len(mapper(record)["instances"]) for record in records * 10]
    assert 0 < sum(counts) < len(counts)


def test_adapter_of_sahi_finds_what_the_tiles_find(tiny_cfg, tmp_path) -> None:
    pytest.importorskip("sahi", reason="SAHI is not installed")
    from sahi import AutoDetectionModel
    from sahi.predict import get_sliced_prediction

    import detkit.as_detectron2  # noqa: F401 - SAHI imports detectron2

    DefaultTrainer(tiny_cfg).train()
    weights = f"{tiny_cfg.OUTPUT_DIR}/model_final.pth"
    (tmp_path / "config.yaml").write_text(tiny_cfg.dump())
    model = AutoDetectionModel.from_pretrained(
        model_type="detectron2",
        model_path=weights,
        config_path=str(tmp_path / "config.yaml"),
        confidence_threshold=0.3,
        device="cpu",
    )
    image = np.zeros((40, 48, 3), dtype=np.uint8)
    theirs = get_sliced_prediction(
        image,
        model,
        slice_height=40,
        slice_width=48,
        perform_standard_pred=False,
        verbose=0,
    )
    (found,) = theirs.object_prediction_list
    ours = Predictor(weights, tile=48)(image, input="rgb").instances
    assert found.bbox.to_xyxy() == ours.pred_boxes.tensor[0].tolist()
    assert found.score.value == pytest.approx(float(ours.scores[0]))
    assert found.category.name == "red"


@pytest.mark.slow
def test_two_thousand_objects_of_a_large_image_are_found_once() -> None:
    boxes = _separate_boxes(2000, 12, 60, size=(4000, 4000))
    image = _scene(boxes, (4000, 4000))
    found = _detect(image, Oracle(noise=0.5, masks=False), size=512, overlap=0.2)
    assert len(found) == 2000
    off = found.pred_boxes.tensor[:, None] - torch.tensor(boxes)[None]
    assert int((off.abs().amax(dim=2).min(dim=0).values < 6).sum()) == 2000
