"""Small data sets on disk, and catalogs that forget them after the test."""

import json

import numpy as np
import pytest
from PIL import Image

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


@pytest.fixture(autouse=True)
def _catalogs_as_before(catalogs_as_before: None) -> None:
    """Forget what a test registers."""


@pytest.fixture
def write_image(tmp_path):
    """Write a small picture and give its path."""

    def write(name="images/a.jpg", height=24, width=32, seed=0):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        return str(path)

    return write


@pytest.fixture
def write_coco(tmp_path, write_image):
    """Write COCO json with `num_images` pictures of 32x24 and one object each; keyword arguments replace sections."""

    def write(num_images=3, name="train.json", **sections):
        images = [
            {"id": i, "file_name": f"{i}.jpg", "height": 24, "width": 32} for i in range(num_images)
        ]
        for image in images:
            write_image(f"images/{image['file_name']}", seed=image["id"])
        annotations = [
            {
                "id": 100 + i,
                "image_id": i,
                "category_id": CATEGORIES[i % 2]["id"],
                "bbox": [1 + i, 2, 10, 8],
            }
            for i in range(num_images)
        ]
        content = {
            "images": images,
            "annotations": annotations,
            "categories": CATEGORIES,
            **sections,
        }
        path = tmp_path / name
        path.write_text(
            json.dumps({key: value for key, value in content.items() if value is not None})
        )
        return str(path), str(tmp_path / "images")

    return write


def voc_xml(objects=(), size=(24, 32)):
    """Return the text of a VOC annotation: objects are (name, (xmin, ymin, xmax, ymax)), size is (height, width)."""
    parts = (
        [] if size is None else [f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"]
    )
    for name, (xmin, ymin, xmax, ymax) in objects:
        box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
        parts.append(f"<object><name>{name}</name><bndbox>{box}</bndbox></object>")
    return f"<annotation>{''.join(parts)}</annotation>"


@pytest.fixture
def write_voc(tmp_path, write_image):
    """Write a VOC tree: image name -> text of its xml, and one split file; give the root."""

    def write(annotations, split="train", suffix=".jpg", root="voc"):
        for name, text in annotations.items():
            write_image(f"{root}/JPEGImages/{name}{suffix}")
            path = tmp_path / root / "Annotations" / f"{name}.xml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        split_file = tmp_path / root / "ImageSets" / "Main" / f"{split}.txt"
        split_file.parent.mkdir(parents=True, exist_ok=True)
        split_file.write_text("".join(f"{name}\n" for name in annotations))
        return tmp_path / root

    return write


@pytest.fixture
def make_voc_xml():
    """Return `voc_xml`, which a test module cannot import from here."""
    return voc_xml
