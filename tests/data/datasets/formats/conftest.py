"""One toy set, as records, and a way to compare the records of a data set with it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data import DatasetCatalog, MetadataCatalog, register_declared_datasets
from detkit.structures import BoxMode

_counter = itertools.count()
# Height, width, and class and box (XYXY) of each object; the third image has none.
TOY = {
    "a": (24, 33, [("dog", (2, 3, 12, 15)), ("cat", (0, 0, 33, 24))]),
    "b": (17, 40, [("cat", (5, 1, 9, 16))]),
    "c": (20, 20, []),
}
NAMES = ["cat", "dog"]


@pytest.fixture
def toy(tmp_path):
    """The images of the toy set below `tmp_path / "images"`, and its contents."""
    (tmp_path / "images").mkdir()
    for name, (height, width, _) in TOY.items():
        Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(
            tmp_path / "images" / f"{name}.png"
        )
    return TOY


@pytest.fixture
def toy_records(toy, tmp_path):
    return [
        {
            "file_name": str(tmp_path / "images" / f"{name}.png"),
            "image_id": name,
            "height": height,
            "width": width,
            "annotations": [
                {
                    "bbox": list(box),
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": NAMES.index(label),
                    "iscrowd": 0,
                }
                for label, box in objects
            ],
        }
        for name, (height, width, objects) in toy.items()
    ]


@pytest.fixture
def declare():
    """Declare a data set, load it, and give its name."""

    def load(entry):
        name = f"declared_{next(_counter)}"
        register_declared_datasets([{**entry, "name": name}])
        DatasetCatalog.get(name)
        return name

    return load


@pytest.fixture
def register():
    """Register records under class names, and give the name of the data set."""

    def add(records, names=NAMES, **metadata):
        name = f"registered_{next(_counter)}"
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=list(names), **metadata)
        return name

    return add


@pytest.fixture
def contents():
    """Name of the image -> height, width, and the objects with their boxes and masks in pixels."""

    def read(name, digits=4):
        names = MetadataCatalog.get(name).thing_classes
        found = {}
        for record in DatasetCatalog.get(name):
            objects = []
            for annotation in record["annotations"]:
                box = BoxMode.convert(
                    list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
                )
                box = tuple(round(v, digits) for v in box)
                objects.append((names[annotation["category_id"]], box))
            stem = Path(record["file_name"]).stem
            found[stem] = (record["height"], record["width"], objects)
        return found

    return read
