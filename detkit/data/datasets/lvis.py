"""LVIS: COCO's images with 1,203 classes (v1; 1,230 in v0.5), annotated class by class.

Which classes an image was searched for in vain, and of which it does not have all objects
annotated, is part of the ground truth. Names of classes and numbers of their images come from the
file.

Source: Gupta et al. 2019, arXiv 1908.03195; format: https://www.lvisdataset.org/dataset.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.coco import records_of_content
from detkit.data.datasets.json_file import garbage_collection_off, read_json, section
from detkit.structures import ImageRecord
from detkit.utils.file_io import PathManager

_IMAGE_KEYS = ("not_exhaustive_category_ids", "neg_category_ids")


@garbage_collection_off()
def load_lvis_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: list[str] | None = None,
    *,
    drop_bad_polygons: bool = False,
) -> list[ImageRecord]:
    """Read an annotation file of LVIS v0.5 or v1.

    Args:
        json_file: Path of the file.
        image_root: The folder that holds COCO's `train2017`, `val2017` and `test2017`.
        dataset_name: Where given, class names and ids are noted in the `MetadataCatalog` under this
            name.
        extra_annotation_keys: Further keys of annotations to keep.
        drop_bad_polygons: As in `load_coco_json`.

    Returns:
        Records as `load_coco_json` gives them, with `not_exhaustive_category_ids` and
        `neg_category_ids`, which are ids of the file.

    Raises:
        FileNotFoundError, ValueError: As there; or an image has neither `coco_url` nor `file_name`.
    """
    content = read_json(json_file)
    for image in section(content, "images", json_file):
        image["file_name"] = _file_name(image, json_file)
    for category in section(content, "categories", json_file):
        # The first synonym is the readable one: Detectron2 shows it too.
        category["name"] = next(iter(category.get("synonyms") or ()), category.get("name"))
    return records_of_content(
        content,
        json_file,
        image_root,
        dataset_name,
        extra_annotation_keys or (),
        drop_bad_polygons=drop_bad_polygons,
        image_keys=_IMAGE_KEYS,
    )


def _file_name(image: dict[str, Any], json_file: str) -> str:
    """Return the path below the folder of images: the last two parts of the address,
    `train2017/000000155379.jpg`.
    """
    url = image.get("coco_url")
    if isinstance(url, str) and url.count("/") >= 1:
        return "/".join(url.split("/")[-2:])
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"image {image.get('id')} of {json_file} has neither coco_url nor file_name"
        )
    return name


def register_lvis_instances(
    name: str, metadata: dict[str, Any], json_file: str, image_root: str
) -> None:
    """Register a data set in LVIS's format. Registering the same one again does nothing.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        metadata: What else to note about it in `MetadataCatalog`; may be empty.
            `class_image_count`, which the federated loss wants, is read from the file when it is
            asked for.
        json_file: The annotation file, read when the data set is first used.
        image_root: As in `load_lvis_json`.
    """
    DatasetCatalog.register(name, functools.partial(load_lvis_json, json_file, image_root, name))
    known = MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root)
    known.set(**{"evaluator_type": "lvis", **metadata})
    if "class_image_count" not in metadata:
        known.set_lazy(class_image_count=functools.partial(class_image_count, json_file))


@functools.cache
def lvis_categories(json_file: str) -> list[dict[str, Any]]:
    """Return the categories of a file as they stand there; none where the file does not exist.

    Only the part with the categories is parsed: all of v1's training file takes ten seconds and
    several gigabytes.
    """
    path = Path(PathManager.get_local_path(json_file))
    if not path.is_file():
        return []
    try:
        return _categories(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return section(read_json(json_file), "categories", json_file)


def class_image_count(json_file: str) -> list[dict[str, int]] | None:
    """Return `{id, image_count}` of each category of a file; None where the file does not exist or
    does not count.
    """
    categories = lvis_categories(json_file)
    if not categories or not all("image_count" in category for category in categories):
        return None
    return [
        {"id": category["id"], "image_count": category["image_count"]} for category in categories
    ]


def _categories(text: str) -> list[dict[str, Any]]:
    """Return the categories of a file whose text has them where they are expected.

    Raises:
        ValueError: It has not.
    """
    key = '"categories":'
    start = text.index(key) + len(key)
    found, _ = json.JSONDecoder().raw_decode(text[start:].lstrip())
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{key} is no list of objects")
    return found
