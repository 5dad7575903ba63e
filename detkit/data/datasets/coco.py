"""Data sets in COCO's annotation format: one JSON file with images, categories and annotations.

Format: https://cocodataset.org/#format-data. What a file lacks although nothing here needs it
(`info`, `licenses`, an annotation's `area` or `iscrowd`) is not asked for.

Legend: K classes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, cast

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.class_notes import note_classes, note_keypoints
from detkit.data.datasets.coco_annotations import AnnotationReader
from detkit.data.datasets.data_folder import DataFolder
from detkit.data.datasets.json_file import (
    by_id,
    garbage_collection_off,
    listed,
    read_json,
    require_unique_ids,
    section,
    shortened,
)
from detkit.structures import AnnotationRecord, ImageRecord
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

# Taken over where an annotation has them; `bbox` and `category_id` are required.
_ANNOTATION_KEYS = ("id", "iscrowd", "area", "segmentation", "keypoints")


def register_coco_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Register a data set in COCO's format. Registering the same one again does nothing.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        metadata: What else to note about it in `MetadataCatalog`; may be empty.
        json_file: The annotation file, read when the data set is first used.
        image_root: The folder that the file names in it are relative to.
        classes: As in `load_coco_json`.

    Raises:
        ValueError: The name already means another data set.
    """
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    classes = None if classes is None else tuple(classes)
    loader = functools.partial(load_coco_json, json_file, image_root, name, classes=classes)
    DatasetCatalog.register(name, loader)
    known = MetadataCatalog.get(name)
    known.set(json_file=json_file, image_root=image_root)
    known.set(**{"evaluator_type": "coco", **metadata})


@garbage_collection_off()
def load_coco_json(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] | None = None,
    *,
    classes: Sequence[str] | None = None,
    drop_bad_polygons: bool = False,
) -> list[ImageRecord]:
    """Read an annotation file.

    Args:
        json_file: Path of the file.
        image_root: The folder that its file names are relative to. A name that leads out of it is
            refused; "/" allows absolute paths.
        dataset_name: Where given, class names and ids are noted in the `MetadataCatalog` under this
            name.
        extra_annotation_keys: Further keys of annotations to keep.
        classes: Names of the classes to use, in the order of their ids; annotations of other
            classes are left out, and their number is logged. None takes all categories in the order
            of their ids in the file.
        drop_bad_polygons: Leave polygons of fewer than three points out, with a count, instead of
            refusing them.

    Returns:
        The images in the order of their ids, each with all of its annotations in the order of the
        file, or without the key where the file has no annotations at all (COCO's test sets).
        `category_id` is contiguous, in [0, K). Keypoints lie half a pixel to the right and below of
        what the file says: it numbers pixels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no JSON, lacks a part, contradicts itself, or does not have
            `classes`; or an annotation has no usable box, a polygon of fewer than three points, a
            mask of another size than its image, or another number of keypoints than its category.
    """
    return records_of_content(
        read_json(json_file),
        json_file,
        image_root,
        dataset_name,
        extra_annotation_keys or (),
        classes=classes,
        drop_bad_polygons=drop_bad_polygons,
    )


@garbage_collection_off()
def records_of_content(
    content: dict[str, Any],
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] = (),
    *,
    classes: Sequence[str] | None = None,
    drop_bad_polygons: bool = False,
    image_keys: Sequence[str] = (),
) -> list[ImageRecord]:
    """Return the records of an annotation file that was read; see `load_coco_json`. `image_keys` are taken over as well.

    Raises:
        ValueError: As there.
    """
    images = by_id(section(content, "images", json_file), "image", json_file)
    entries = by_id(section(content, "categories", json_file), "category", json_file)
    categories = _category_names(entries, json_file)
    used = _used_categories(categories, classes, json_file)
    to_contiguous = {category_id: index for index, category_id in enumerate(used)}
    annotations = content.get("annotations")
    if annotations is None:
        logger.info("%s has no annotations: its images can be predicted on only", json_file)
    per_image = _annotations_per_image(annotations or [], images, categories, json_file)
    keys = (*_ANNOTATION_KEYS, *extra_annotation_keys)
    folder = DataFolder(image_root, json_file)
    reader = AnnotationReader(
        json_file, entries, to_contiguous, keys, drop_bad_polygons=drop_bad_polygons
    )
    records = [
        _image_record(
            images[image_id],
            folder,
            reader.records(images[image_id], per_image[image_id]),
            image_keys,
        )
        for image_id in sorted(images)
    ]
    reader.log_dropped()
    if annotations is None:
        for record in records:
            record.pop("annotations", None)
    _log_left_out(per_image, categories, to_contiguous, json_file)
    logger.info("loaded %d images in COCO format from %s", len(records), json_file)
    if dataset_name is not None:
        metadata = MetadataCatalog.get(dataset_name)
        note_classes(metadata, [categories[c] for c in used], to_contiguous, json_file)
        note_keypoints(metadata, [entries[c] for c in used], json_file)
    return records


def _category_names(categories: dict[Any, dict[str, Any]], json_file: str) -> dict[Any, str]:
    """Category id -> name, in the order of the ids."""
    for category in categories.values():
        if not isinstance(category.get("name"), str):
            raise ValueError(
                f"category {category['id']} of {json_file} needs a name: {shortened(category)}"
            )
    return {key: categories[key]["name"] for key in sorted(categories)}


def _used_categories(
    categories: dict[Any, str], classes: Sequence[str] | None, json_file: str
) -> list[Any]:
    """Return the category ids to use, in the order of the contiguous ids."""
    if classes is None:
        return list(categories)
    ids = {name: key for key, name in categories.items()}
    unknown = [name for name in classes if name not in ids]
    if unknown:
        raise ValueError(
            f"{json_file} has no category"
            f" {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], ids)} Expected classes:"
            f" {', '.join(classes)}. Found in the file: {', '.join(ids) or 'none'}."
        )
    return [ids[name] for name in classes]


def _annotations_per_image(
    annotations: Any, images: dict[Any, Any], categories: dict[Any, str], json_file: str
) -> defaultdict[Any, list[dict[str, Any]]]:
    annotations = section({"annotations": annotations}, "annotations", json_file)
    require_unique_ids(annotations, "annotation", json_file)
    _require_known(annotations, "image_id", images, "an image", json_file)
    _require_known(annotations, "category_id", categories, "a category", json_file)
    per_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        per_image[annotation["image_id"]].append(annotation)
    return per_image


def _require_known(
    annotations: list[dict[str, Any]], key: str, known: dict[Any, Any], kind: str, json_file: str
) -> None:
    try:
        stray = [annotation for annotation in annotations if annotation.get(key) not in known]
    except TypeError:
        stray = [
            annotation
            for annotation in annotations
            if not isinstance(annotation.get(key), int | str)
        ]
    if stray:
        values = list(dict.fromkeys(_hashable(annotation.get(key)) for annotation in stray))
        raise ValueError(
            f"{len(stray)} annotations of {json_file} name {kind} that the file does not list:"
            f" {key} {listed(values)} in annotations"
            f" {listed([annotation['id'] for annotation in stray])}"
        )


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str | None) else repr(value)


def _image_record(
    image: dict[str, Any],
    folder: DataFolder,
    annotations: list[AnnotationRecord],
    keys: Sequence[str],
) -> ImageRecord:
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        raise ValueError(
            f"image {image['id']} of {folder.named_in} has no file_name: {shortened(image)}"
        )
    record: dict[str, Any] = {
        "file_name": folder.path_of(image["file_name"]),
        "image_id": image["id"],
    }
    for side in ("height", "width"):
        if side in image:
            record[side] = _require_side(image[side], side, image, folder.named_in)
    record.update((key, image[key]) for key in keys if key in image)
    record["annotations"] = annotations
    return cast(ImageRecord, record)


def _require_side(value: Any, side: str, image: dict[str, Any], json_file: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 1 <= value < 2**31
        or value != int(value)
    ):
        raise ValueError(
            f"image {image['id']} ({image['file_name']}) of {json_file} has {side} {value!r}, need"
            " pixels"
        )
    return int(value)


def _log_left_out(
    per_image: dict[Any, list[dict[str, Any]]],
    categories: dict[Any, str],
    to_contiguous: dict[Any, int],
    json_file: str,
) -> None:
    if len(to_contiguous) == len(categories):
        return
    left_out = Counter(
        categories[annotation["category_id"]]
        for annotations in per_image.values()
        for annotation in annotations
        if annotation["category_id"] not in to_contiguous
    )
    if left_out:
        counts = ", ".join(f"{name}: {count}" for name, count in left_out.most_common())
        logger.warning(
            "left out annotations of %s whose class is not among `classes`: %s", json_file, counts
        )
