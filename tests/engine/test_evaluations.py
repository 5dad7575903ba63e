"""Test-time augmentation, in trainer and predictor, and validation losses."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.engine import DefaultPredictor, DefaultTrainer
from detkit.engine.evaluations import (
    build_validation_loader,
    named_as_augmented,
    validation_losses,
    with_test_time_augmentation,
)
from detkit.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    DenseDetector,
    GeneralizedRCNNWithTTA,
    build_model,
)
from detkit.structures import Boxes, Instances


class Identity(Backbone):
    """The image is its only feature."""

    def forward(self, x):
        return {"image": x}


@META_ARCH_REGISTRY.register()
class OneBoxForTests(DenseDetector):
    """Finds the left half of every image, and counts the images it has seen."""

    def __init__(self, cfg):
        super().__init__(
            backbone=Identity(),
            head=nn.Conv2d(3, 1, 1),
            head_in_features=["image"],
            pixel_mean=[0.0] * 3,
            pixel_std=[255.0] * 3,
        )
        self.num_seen = 0

    def _head_features(self, images):
        return images.tensor

    def forward_training(self, images, features, predictions, gt_instances):
        return {"loss_cls": predictions.square().mean()}

    def forward_inference(self, images, features, predictions):
        self.num_seen += len(images)
        return [
            Instances(
                size,
                pred_boxes=Boxes([[0.0, 0.0, size[1] / 2, size[0]]]),
                scores=torch.tensor([0.5]),
                pred_classes=torch.tensor([0]),
            )
            for size in images.image_sizes
        ]


@pytest.fixture
def cfg(tiny_cfg):
    tiny_cfg.MODEL.META_ARCHITECTURE = "OneBoxForTests"
    tiny_cfg.TEST.AUG.ENABLED = True
    tiny_cfg.TEST.AUG.MIN_SIZES = (20, 30)
    return tiny_cfg


def test_results_have_names_of_their_own():
    assert named_as_augmented({"bbox": {"AP": 1.0}}) == {"bbox_TTA": {"AP": 1.0}}


def test_evaluation_scores_the_model_plain_and_augmented(cfg):
    model = DefaultTrainer.build_model(cfg).eval()
    results = DefaultTrainer.test(cfg, model)
    assert list(results) == ["bbox", "bbox_TTA"]
    assert set(results["bbox_TTA"]) == set(results["bbox"])
    assert model.num_seen == 6 * (1 + 4)
    for folder in ("inference", "TTA/inference"):
        assert (Path(cfg.OUTPUT_DIR) / folder / "coco_instances_results.json").exists()


def test_evaluation_of_several_data_sets_names_the_tasks_of_each(cfg):
    cfg.DATASETS.TEST = ("tiny_train", "tiny_val")
    results = DefaultTrainer.test(cfg, DefaultTrainer.build_model(cfg))
    assert list(results) == ["tiny_train", "tiny_val"]
    assert [list(result) for result in results.values()] == [["bbox", "bbox_TTA"]] * 2


def test_training_augments_at_the_end_only(cfg):
    cfg.TEST.EVAL_PERIOD = 2
    trainer = DefaultTrainer(cfg)
    assert list(trainer.train()) == ["bbox", "bbox_TTA"]
    assert trainer.model.num_seen == 6 * (3 + 4)


def test_predictor_augments(cfg):
    trainer = DefaultTrainer(cfg)
    trainer.checkpointer.save("model")
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model.pth"
    predictor = DefaultPredictor(cfg)
    assert isinstance(predictor.model, GeneralizedRCNNWithTTA)
    found = predictor(np.zeros((80, 100, 3), dtype=np.uint8))["instances"]
    # The left half of the plain views, and the right half of the mirrored ones.
    assert found.image_size == (80, 100)
    expected = torch.tensor([[0.0, 0, 50, 80], [50, 0, 100, 80]])
    torch.testing.assert_close(found.pred_boxes.tensor.sort(dim=0).values, expected)


def test_keypoints_of_a_mirror_come_from_the_metadata(cfg):
    cfg.MODEL.KEYPOINT_ON = True
    DatasetCatalog.register("tiny_val", lambda: [])
    names = ["nose", "left_eye", "right_eye"]
    MetadataCatalog.get("tiny_val").set(
        keypoint_names=names, keypoint_flip_map=[("left_eye", "right_eye")]
    )
    assert with_test_time_augmentation(cfg, build_model(cfg)).keypoint_flip_indices == [0, 2, 1]
    cfg.TEST.AUG.FLIP = False
    assert with_test_time_augmentation(cfg, build_model(cfg)).keypoint_flip_indices is None


class Net(nn.Module):
    """Draws, drops out, keeps statistics and a normaliser that appears with the first batch."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(2))
        self.register_buffer("normalizer", None)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, batch):
        assert self.training
        assert not any(m.training for m in (*self.backbone.modules(), *self.head))
        self.normalizer = torch.ones(1)
        self.steps += 1
        random.random(), np.random.rand(), torch.rand(1)
        x = self.head(self.backbone(torch.stack(batch)))
        return {"loss_a": x.pow(2).mean(), "loss_b": torch.rand(()) * 0 + 2.0}


IMAGES = list(torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(1)))


def test_losses_are_means_over_images_however_they_are_batched():
    one = validation_losses(Net().eval(), [[image] for image in IMAGES])
    torch.manual_seed(0)
    model = Net()
    singles = validation_losses(model, [[image] for image in IMAGES])
    batches = validation_losses(model, [IMAGES[:3], IMAGES[3:]])
    assert singles == pytest.approx(batches)
    assert singles["total_loss"] == pytest.approx(singles["loss_a"] + 2.0)
    assert set(one) == {"loss_a", "loss_b", "total_loss"}


def test_modes_buffers_and_random_numbers_are_as_before():
    model = Net().train()
    model.head[1].eval()  # held in eval mode on purpose
    modes = {name: module.training for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = [random.random(), np.random.rand(), torch.rand(1).item()]
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    validation_losses(model, [IMAGES])
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == expected
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.normalizer is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_everything_is_restored_when_a_batch_fails():
    model = Net().eval()
    with pytest.raises(TypeError):
        validation_losses(model, [[None]])
    assert not any(module.training for module in model.modules())


def test_no_images_are_an_error():
    with pytest.raises(ValueError, match=r"TEST\.COMPUTE_LOSS: there are no images"):
        validation_losses(Net(), [])


def losses_of_run(cfg):
    trainer = DefaultTrainer(cfg)
    trainer.train()
    return trainer, [value for value, _ in trainer.storage.history("total_loss").values()]


def test_key_puts_the_losses_beside_the_scores_and_changes_nothing_in_training(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD = 2
    plain, expected = losses_of_run(tiny_cfg)
    tiny_cfg.TEST.COMPUTE_LOSS = True
    trainer, found = losses_of_run(tiny_cfg)
    assert found == expected
    for name, value in plain.model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], value), name
    latest = trainer.storage.latest()
    assert latest["val/total_loss"][0] == pytest.approx(
        latest["val/loss_cls"][0] + latest["val/loss_box_reg"][0]
    )
    assert [iteration for _, iteration in trainer.storage.history("val/loss_cls").values()] == [
        1,
        3,
        6,
    ]
    assert "val/total_loss" not in plain.storage.latest()


def test_several_data_sets_are_told_apart(tiny_cfg):
    tiny_cfg.TEST.COMPUTE_LOSS, tiny_cfg.DATASETS.TEST = True, ("tiny_val", "tiny_train")
    latest = losses_of_run(tiny_cfg)[0].storage.latest()
    assert latest["val/tiny_val/loss_cls"][0] == pytest.approx(latest["val/tiny_train/loss_cls"][0])


def test_data_set_without_ground_truth_is_an_error(tiny_cfg):
    DatasetCatalog.register(
        "bare", lambda: [{"file_name": "a.png", "height": 4, "width": 4, "image_id": 0}]
    )
    try:
        with pytest.raises(
            ValueError,
            match=r"COMPUTE_LOSS needs ground truth: data set 'bare' has none for a\.png",
        ):
            build_validation_loader(tiny_cfg, "bare")
    finally:
        DatasetCatalog.remove("bare")
