"""Tests of detkit.engine.augmented_model, and of what TEST.AUG does in the trainer and the predictor."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.engine import DefaultPredictor, DefaultTrainer
from detkit.engine.augmented_model import named_as_augmented, with_test_time_augmentation
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
