"""A data set of six pictures, a model of one convolution, and a config that puts them together."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from detkit.config import get_cfg
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.modeling import META_ARCH_REGISTRY
from detkit.structures import Boxes, Instances

CLASSES = ["red", "green"]


@META_ARCH_REGISTRY.register()
class TinyDetectorForTests(nn.Module):
    """Losses in training; in testing, one box of class 0 in every image."""

    def __init__(self, cfg):
        super().__init__()
        torch.manual_seed(cfg.SEED if cfg.SEED >= 0 else 0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, cfg.MODEL.ROI_HEADS.NUM_CLASSES)

    def forward(self, batch):
        images = torch.stack([item["image"] for item in batch]).float() / 255
        scores = self.head(self.norm(self.conv(images)).mean((2, 3)))
        if self.training:
            return {"loss_cls": (scores - 1).pow(2).mean(), "loss_box_reg": scores.abs().mean()}
        return [{"instances": self.one_box(item, s)} for item, s in zip(batch, scores, strict=True)]

    def one_box(self, item, scores):
        height, width = item["height"], item["width"]
        return Instances(
            (height, width),
            pred_boxes=Boxes(torch.tensor([[1.0, 1.0, width - 1.0, height - 1.0]])),
            scores=scores[:1].sigmoid(),
            pred_classes=torch.zeros(1, dtype=torch.int64),
        )


def write_dataset(folder, num_images=6):
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(num_images):
        Image.new("RGB", (48, 40), (40 * i, 100, 50)).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": 40, "width": 48})
        box = [2 + i, 3, 20, 25]
        annotations.append(
            {
                "id": i + 1,
                "image_id": i,
                "category_id": 1 + i % 2,
                "bbox": box,
                "area": 500,
                "iscrowd": 0,
            }
        )
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "all.json").write_text(json.dumps(content))


@pytest.fixture
def tiny_cfg(tmp_path):
    """Settings of a run of six iterations over two images each; `OUTPUT_DIR` is `tmp_path/output`."""
    write_dataset(tmp_path / "data")
    cfg = get_cfg()
    names = ["tiny_train", "tiny_val"]
    cfg.DATASETS.REGISTER = [
        {
            "name": name,
            "format": "coco",
            "images": str(tmp_path / "data" / "images"),
            "annotations": str(tmp_path / "data" / "all.json"),
        }
        for name in names
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny_train",), ("tiny_val",)
    cfg.MODEL.META_ARCHITECTURE = "TinyDetectorForTests"
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (40,), 40
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 6, ()
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.BASE_LR, cfg.SOLVER.CHECKPOINT_PERIOD = 0, 0.01, 3
    cfg.SEED = 3
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    yield cfg
    for name in names:
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
