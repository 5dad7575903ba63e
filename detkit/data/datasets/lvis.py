"""LVIS: COCO's images with 1,203 classes (v1; 1,230 in v0.5), annotated class by class.

The ground truth of an image includes the classes that it was searched for in vain, and those of
which not all objects are annotated. Class names and the number of images per class come from the
file.

Source: Gupta et al. 2019, arXiv 1908.03195; format: https://www.lvisdataset.org/dataset.
"""

import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import coco_metadata
from detkit.data.datasets.coco import records_of_content
from detkit.data.datasets.json_file import known_id, read_json, section
from detkit.structures import ImageRecord
from detkit.utils.env import garbage_collection_off
from detkit.utils.errors import DataError
from detkit.utils.file_io import PathManager
from detkit.utils.text import shortened

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
    """Load an annotation file of LVIS v0.5 or v1.

    Args:
        json_file: Path of the file.
        image_root: The folder that holds COCO's `train2017`, `val2017` and `test2017`.
        dataset_name: If given, class names and ids become metadata of this data set.
        extra_annotation_keys: Further keys of annotations to keep.
        drop_bad_polygons: See `load_coco_json`.

    Returns:
        Records as from `load_coco_json`, with `not_exhaustive_category_ids` and
        `neg_category_ids`, which are category ids of the file.

    Raises:
        MissingFileError: The file does not exist.
        DataError: See `load_coco_json`; or an image has neither `coco_url` nor `file_name`.
    """
    content = read_json(json_file)
    for image in section(content, "images", json_file):
        url, name = image.get("coco_url"), image.get("file_name")
        if isinstance(url, str) and "/" in url:
            # The path below the folder of images: `train2017/000000155379.jpg`.
            image["file_name"] = "/".join(url.split("/")[-2:])
        elif not isinstance(name, str) or not name:
            raise DataError(
                f"image {image.get('id')} of {json_file} has neither coco_url nor file_name"
            )
    categories = section(content, "categories", json_file)
    for category in categories:
        # The first synonym is the readable name, as in Detectron2.
        if isinstance(category.get("synonyms"), list) and category["synonyms"]:
            category["name"] = category["synonyms"][0]
    _check_category_lists(content["images"], {c.get("id") for c in categories}, json_file)
    return records_of_content(
        content,
        json_file,
        image_root,
        dataset_name,
        extra_annotation_keys or (),
        drop_bad_polygons=drop_bad_polygons,
        image_keys=_IMAGE_KEYS,
    )


def _check_category_lists(
    images: list[dict[str, Any]], known: Collection[Any], json_file: str
) -> None:
    """Check that the lists of categories of images hold ids of `known`, and write them as there."""
    for image in images:
        for key in _IMAGE_KEYS:
            values = image.get(key)
            ids = [known_id(v, known) for v in values] if isinstance(values, list) else None
            if values is not None and (ids is None or None in ids):
                raise DataError(
                    f"image {image.get('id')} of {json_file} needs {key} that is a list of category"
                    f" ids of the file, has {shortened(values, 80)}"
                )
            if ids is not None:
                image[key] = ids


def register_lvis_instances(
    name: str, metadata: dict[str, Any], json_file: str, image_root: str
) -> None:
    """Register a data set in LVIS's format. Registering the same one again has no effect.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        metadata: Further metadata for `MetadataCatalog`; may be empty. `class_image_count`, which
            the federated loss needs, is read from the file when it is asked for.
        json_file: The annotation file, read when the data set is first used.
        image_root: See `load_lvis_json`.

    Raises:
        ConfigError: The name is taken by another data set.
    """
    DatasetCatalog.register(name, functools.partial(load_lvis_json, json_file, image_root, name))
    known = MetadataCatalog.get(name).set(json_file=json_file, image_root=image_root)
    known.set(**{"evaluator_type": "lvis", **metadata})
    if "class_image_count" not in metadata:
        known.set_lazy(class_image_count=functools.partial(class_image_count, json_file))


def get_lvis_instances_meta(dataset_name: str) -> dict[str, Any]:
    """Return the metadata for `register_lvis_instances` that do not depend on the file.

    Args:
        dataset_name: As Detectron2 calls such a data set: `lvis_v1_train`, say. Of one with COCO's
            classes, whose name has `cocofied`, these are returned; LVIS's own come from its json,
            and nothing is returned.

    Raises:
        ValueError: The name is of no LVIS data set.
    """
    if "cocofied" in dataset_name:
        return coco_metadata()
    if not dataset_name.startswith(("lvis_v0.5", "lvis_v1")):
        raise ValueError(f"no LVIS data set is called {dataset_name!r}: lvis_v1... or lvis_v0.5...")
    return {}


@functools.cache
def lvis_categories(json_file: str) -> list[dict[str, Any]]:
    """Return the categories of a file; none if the file does not exist."""
    path = Path(PathManager.get_local_path(json_file))
    if not path.is_file():
        return []
    # Only the part with the categories is parsed: all of v1's training file takes ten seconds and
    # several gigabytes.
    key = '"categories":'
    try:
        text = path.read_text(encoding="utf-8")
        start = text.index(key) + len(key)
        found, _ = json.JSONDecoder().raw_decode(text[start:].lstrip())
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        return found
    return section(read_json(json_file), "categories", json_file)


def class_image_count(json_file: str) -> list[dict[str, int]] | None:
    """Return `{id, image_count}` of each category of a file, None if they are not known."""
    categories = lvis_categories(json_file)
    if not categories or not all("image_count" in category for category in categories):
        return None
    return [{"id": c["id"], "image_count": c["image_count"]} for c in categories]
