"""A small data set without faults, into which a test plants one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.config import CfgNode, get_cfg
from detkit.data import register_declared_datasets
from detkit.data.doctor import AnchorLevel, Report, check_datasets

HEIGHT, WIDTH = 48, 64
NAMES = ["cat", "dog"]


class Toy:
    """Four training and two test images with two objects each, without faults until one is planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = {"MODEL.MASK_ON": True}
        self.checkpoint_classes: list[str] = []
        # Around the objects, on a fine grid.
        cells = np.array([[-10, -8, 10, 8], [-11, -8, 11, 8]], dtype=float)
        self.anchors = [AnchorLevel(4, 0.5, cells)]
        self.entries: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        for number, (split, count) in enumerate({"train": 4, "test": 2}.items()):
            entry = {"name": f"toy_{split}", "format": "coco", "images": str(folder)}
            self.entries[split] = entry | {"annotations": str(folder / f"{split}.json")}
            self.files[split] = self._content(split, count, first=10 * number)

    def _content(self, split: str, count: int, first: int) -> dict[str, Any]:
        images, annotations = [], []
        for k in range(count):
            name = f"{split}_{k}.jpg"
            pixels = np.random.default_rng(first + k).integers(0, 256, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((WIDTH, HEIGHT), 0).save(self.folder / name)
            images.append({"id": k, "file_name": name, "height": HEIGHT, "width": WIDTH})
            for j in range(2):
                x, y, w, h = 4 + 25 * j + k, 6 + 4 * k, 20 + k, 14 + 3 * j
                annotations.append(
                    {
                        "id": 2 * k + j + 1,
                        "image_id": k,
                        "category_id": j + 1,
                        "iscrowd": 0,
                        "bbox": [x, y, w, h],
                        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                        "keypoints": [x + 1, y + 1, 2, x + 5, y + 5, 2, 0, 0, 0],
                    }
                )
        names = ["a", "b", "c"]
        categories = [{"id": k + 1, "name": n, "keypoints": names} for k, n in enumerate(NAMES)]
        return {"images": images, "annotations": annotations, "categories": categories}

    def cfg(self) -> CfgNode:
        for split, content in self.files.items():
            path = self.folder / f"{split}.json"
            if not path.exists():  # a fault may have written one
                path.write_text(json.dumps(content))
        cfg = get_cfg()
        cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = HEIGHT, 2 * WIDTH
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(NAMES)
        cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 3
        cfg.DATASETS.REGISTER = list(self.entries.values())
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_train",), ("toy_test",)
        cfg.merge_from_list([item for pair in self.settings.items() for item in pair])
        register_declared_datasets(cfg.DATASETS.REGISTER)
        return cfg

    def check(self) -> Report:
        return check_datasets(
            self.cfg(), checkpoint_classes=self.checkpoint_classes, anchors=self.anchors
        )

    # What faults are made of.
    def image(self, split: str = "train", k: int = 0) -> Path:
        return self.folder / f"{split}_{k}.jpg"

    def first(self, **changes: Any) -> dict[str, Any]:
        self.files["train"]["annotations"][0].update(changes)
        return self.files["train"]["annotations"][0]

    def all(self, change: Callable[[dict[str, Any]], Any], split: str = "train") -> None:
        for annotation in self.files[split]["annotations"]:
            annotation.update(change(annotation))

    def add(self, **changes: Any) -> None:
        annotations = self.files["train"]["annotations"]
        annotations.append({**annotations[0], "id": 100 + len(annotations), **changes})

    def write(self, name: str, pixels: np.ndarray, **options: Any) -> None:
        """Write an image of the training set in the place of the first, under a name."""
        Image.fromarray(pixels).save(self.folder / name, **options)
        self.files["train"]["images"][0].update(
            file_name=name, height=pixels.shape[0], width=pixels.shape[1]
        )

    def pixels(self, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
        small = np.random.default_rng(5).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize((width, height), 0))


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)
