"""Data sets in COCO's annotation format: one JSON file with images, categories and annotations.

Format: https://cocodataset.org/#format-data. Parts that are not needed here (`info`, `licenses`,
an annotation's `area` or `iscrowd`) may be missing.

Legend: K classes.
"""

import functools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

from detkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detkit.data.datasets.builtin_meta import left_right_pairs
from detkit.data.datasets.coco_annotations import AnnotationReader
from detkit.data.datasets.faults import collect
from detkit.data.datasets.json_file import (
    DataFolder,
    as_number,
    by_id,
    known_id,
    read_json,
    require_unique_ids,
    section,
)
from detkit.structures import ImageRecord
from detkit.utils.colormap import class_colors, skeleton_colors
from detkit.utils.env import garbage_collection_off
from detkit.utils.errors import DataError
from detkit.utils.logger import FILE_ONLY
from detkit.utils.text import did_you_mean, listed, shortened

logger = logging.getLogger(__name__)

# Copied if an annotation has them; `bbox` and `category_id` are required.
_ANNOTATION_KEYS = ("id", "iscrowd", "area", "segmentation", "keypoints", "difficult")


def register_coco_instances(
    name: str,
    metadata: dict[str, Any],
    json_file: str,
    image_root: str,
    *,
    classes: Sequence[str] | None = None,
) -> None:
    """Register a data set in COCO's format. Registering the same one again has no effect.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        metadata: Further metadata for `MetadataCatalog`; may be empty.
        json_file: The annotation file, read when the data set is first used.
        image_root: The folder that the file names in it are relative to.
        classes: See `load_coco_json`.

    Raises:
        ConfigError: The name is taken by another data set.

    Example:
        >>> register_coco_instances("my_cells_train", {}, "cells/train.json", "cells/images")
        >>> from detkit.data import DatasetCatalog
        >>> "my_cells_train" in DatasetCatalog
        True
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
    """Load an annotation file.

    Args:
        json_file: Path of the file.
        image_root: The folder that its file names are relative to. A name that leads out of it is
            refused; "/" allows absolute paths.
        dataset_name: If given, class names and ids become metadata of this data set.
        extra_annotation_keys: Further keys of annotations to keep.
        classes: Names of the classes to use, in the order of their ids; annotations of other
            classes are left out, and their number is logged. The file may lack some. None takes
            the `model_classes` in the data set's metadata, which a test set has: then objects of
            other classes are an error. Without these, all categories in the order of their ids in
            the file.
        drop_bad_polygons: Drop polygons of fewer than three points, with a count, instead of
            raising an error.

    Returns:
        The images in the order of their ids, each with its annotations in the order of the file, or
        without the key `annotations` if the file has none at all (COCO's test sets). `category_id`
        is contiguous, in [0, K). Keypoints lie half a pixel to the right of and below the numbers
        of the file, which count pixels.

    Raises:
        MissingFileError: The file does not exist.
        DataError: The file is not valid JSON, lacks a part, contradicts itself, or lacks one of
            `classes`.
        DataError: An annotation has no usable box, a polygon of fewer than three points, a mask of
            another size than its image, or another number of keypoints than its category.
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
    """Return the records of the content of an annotation file; see `load_coco_json`.

    `image_keys` are keys of images to keep.
    """
    images = by_id(section(content, "images", json_file), "image", json_file)
    entries = by_id(section(content, "categories", json_file), "category", json_file)
    names = category_names(entries, json_file)
    if classes is None:
        _drop_unused_root(entries, names, content.get("annotations"), json_file)
    matched = None
    if classes is None and dataset_name is not None:
        classes = matched = MetadataCatalog.get(dataset_name).get("model_classes")
    used = used_categories(names, classes, json_file, must_match=matched is not None)
    class_names = list(names.values()) if classes is None else list(classes)
    to_contiguous = {key: k for k, key in enumerate(used) if key is not None}
    annotations = content.get("annotations")
    if annotations is None:
        logger.warning(
            "%s has no 'annotations': it can only be used for prediction, and scores on it are nan",
            json_file,
        )
    per_image = _annotations_per_image(annotations or [], images, names, json_file)
    folder = DataFolder(image_root, json_file)
    keys = (*_ANNOTATION_KEYS, *extra_annotation_keys)
    reader = AnnotationReader(
        json_file, entries, to_contiguous, keys, drop_bad_polygons=drop_bad_polygons
    )
    records = []
    # In the order of ids, as COCO's own tools: the order of a file is arbitrary.
    for image_id in sorted(images):
        try:
            record = _image_record(images[image_id], folder, image_keys)
        except DataError as error:
            collect(error, "broken-image-entry", annotation=f"image {image_id}")
            continue
        if annotations is not None:
            record["annotations"] = reader.records(record, per_image[image_id])
        records.append(record)
    reader.log_dropped()
    _warn_of_repeated_files(records, json_file)
    if len(to_contiguous) < len(names):
        _tell_left_out(
            annotations or [], names, to_contiguous, json_file, dataset_name, model_classes=matched
        )
    logger.info("loaded %d images in COCO format from %s", len(records), json_file, extra=FILE_ONLY)
    if dataset_name is not None:
        metadata = MetadataCatalog.get(dataset_name)
        note_classes(metadata, class_names, to_contiguous, json_file)
        note_keypoints(metadata, [entries[key] for key in to_contiguous], json_file)
    return records


def _warn_of_repeated_files(records: Sequence[ImageRecord], json_file: str) -> None:
    counts = Counter(record["file_name"] for record in records)
    repeated = [file for file, count in counts.items() if count > 1]
    if repeated:
        logger.warning(
            "%s lists %d files as several images each: their objects are learned and scored apart,"
            " so that those of the others count as background. Give all annotations of a file one"
            " image_id: %s",
            json_file,
            len(repeated),
            listed(repeated, 3),
            extra={"code": "listed-twice"},
        )


def category_names(categories: dict[Any, dict[str, Any]], json_file: str) -> dict[Any, str]:
    """Return category id -> name, in the order of the ids; equal names get their ids added."""
    for category in categories.values():
        if not isinstance(category.get("name"), str):
            raise DataError(
                f"category {category['id']} of {json_file} needs a name: {shortened(category)}"
            )
    names = {key: categories[key]["name"] for key in sorted(categories)}
    counts = Counter(names.values())
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        logger.warning(
            "%s has several categories of one name, which get their ids added: %s",
            json_file,
            listed(repeated),
        )
    return {key: f"{name} (id {key})" if counts[name] > 1 else name for key, name in names.items()}


def _drop_unused_root(
    entries: dict[Any, dict[str, Any]], names: dict[Any, str], annotations: Any, json_file: str
) -> None:
    """Take out the category 0 of Roboflow's exports, which is the root of the others, and unused.

    A model would have a class of which it never sees an object.
    """
    others = [category for key, category in entries.items() if key != 0]
    root = entries.get(0, {})
    is_root = root.get("supercategory") == "none" and all(
        category.get("supercategory") == root["name"] for category in others
    )
    if not others or not is_root or not isinstance(annotations, list):
        return
    if any(isinstance(a, dict) and known_id(a.get("category_id"), (0,)) == 0 for a in annotations):
        return
    logger.info("%s: left out the unused class 0, %r, of Roboflow", json_file, root["name"])
    del entries[0], names[0]


def used_categories(
    names: dict[Any, str], classes: Sequence[str] | None, json_file: str, *, must_match: bool
) -> list[Any]:
    """Return the category id of each class in the order of the contiguous ids.

    It is None for a class that the file lacks. That may be: many tools write the categories only of
    which there are objects. But a name that resembles one of the file's other categories is a
    mistake, as are names of which the file has none.

    Args:
        names: Category id -> name.
        classes: The names to use; None uses all.
        json_file: The file, for messages.
        must_match: The classes are those of a model, and not the user's choice.
    """
    if classes is None:
        return list(names)
    ids = {name: key for key, name in names.items()}
    left_out = [name for name in ids if name not in classes]
    lacking = [name for name in classes if name not in ids]
    ambiguous = [n for n in lacking if any(other.startswith(f"{n} (id ") for other in left_out)]
    hint = next((h for name in lacking if (h := did_you_mean(name, left_out))), "")
    if ambiguous or hint or (len(lacking) == len(classes) and (ids or not must_match)):
        several = f" Several categories are called {', '.join(ambiguous)}." if ambiguous else ""
        error = DataError(
            f"{json_file} has no category"
            f" {', '.join(map(repr, lacking))}.{hint}{several} Expected classes:"
            f" {', '.join(classes)}. Found in the file: {', '.join(ids) or 'none'}."
        )
        collect(error, "class-names-differ")
    elif lacking:
        logger.warning("%s lists no category %s: it has no object", json_file, listed(lacking))
    return [ids.get(name) for name in classes]


def _annotations_per_image(
    annotations: Any, images: dict[Any, Any], categories: dict[Any, str], json_file: str
) -> defaultdict[Any, list[dict[str, Any]]]:
    annotations = section({"annotations": annotations}, "annotations", json_file)
    try:
        require_unique_ids(annotations, "annotation", json_file)
    except DataError as error:
        collect(error, "repeated-annotation-id")
        for number, annotation in enumerate(annotations):
            annotation.setdefault("id", f"number {number}")
    annotations = _require_known(annotations, "image_id", images, "an image", json_file)
    annotations = _require_known(annotations, "category_id", categories, "a category", json_file)
    per_image: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        per_image[annotation["image_id"]].append(annotation)
    return per_image


def _require_known(
    annotations: list[dict[str, Any]], key: str, known: dict[Any, Any], kind: str, json_file: str
) -> list[dict[str, Any]]:
    """Return the annotations, all of whose `key` is in `known`, and written as it is there."""
    values = [annotation.get(key) for annotation in annotations]
    # As a rule, and ten times as fast; COCO's training set has 860,000.
    if set(map(type, values)) <= {int, str} and all(map(known.__contains__, values)):
        return annotations
    kept, stray = [], []
    for annotation, value in zip(annotations, values, strict=True):
        is_known = type(value) in (int, str) and value in known
        meant = value if is_known else known_id(value, known)
        if meant is None:
            stray.append(annotation)
        else:
            annotation[key] = meant
            kept.append(annotation)
    if stray:
        # With quotes, where there are any: "1" is not 1.
        found = [shortened(annotation.get(key), 40) for annotation in stray]
        error = DataError(
            f"{len(stray)} annotations of {json_file} name {kind} that the file does not list:"
            f" {key} {listed(list(dict.fromkeys(found)))} in annotations"
            f" {listed([annotation['id'] for annotation in stray])}"
        )
        for annotation in stray:
            collect(error, f"unknown-{key.replace('_', '-')}", annotation=annotation["id"])
    return kept


def _image_record(image: dict[str, Any], folder: DataFolder, keys: Sequence[str]) -> ImageRecord:
    """Return the record of an image, without annotations."""
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        raise DataError(
            f"image {image['id']} of {folder.named_in} has no file_name: {shortened(image)}"
        )
    record: dict[str, Any] = {
        "file_name": folder.path_of(image["file_name"]),
        "image_id": image["id"],
    }
    for side in ("height", "width"):
        if image.get(side) is None:
            continue
        value = as_number(image[side])
        if value is None or not 1 <= value < 2**31 or value != int(value):
            raise DataError(
                f"image {image['id']} ({image['file_name']}) of {folder.named_in} has {side}"
                f" {image[side]!r}, need pixels"
            )
        record[side] = int(value)
    record.update((key, image[key]) for key in keys if key in image)
    return cast(ImageRecord, record)


def _tell_left_out(
    annotations: list[dict[str, Any]],
    names: dict[Any, str],
    to_contiguous: dict[Any, int],
    json_file: str,
    dataset_name: str | None,
    model_classes: Sequence[str] | None,
) -> None:
    """Say how many annotations have other classes; with those of a model, this is a fault."""
    categories = (annotation["category_id"] for annotation in annotations)
    left_out = Counter(names[key] for key in categories if key not in to_contiguous)
    counts = ", ".join(f"{name}: {count}" for name, count in left_out.most_common())
    if counts and model_classes is not None:
        listed_classes = ", ".join(model_classes)
        error = DataError(
            f"{json_file} has objects of classes that the model does not have: {counts}. The"
            f" model has {listed_classes}. Correct the names, or leave these objects"
            f" out by `classes: [{listed_classes}]` in the entry of {dataset_name!r} under"
            " DATASETS.REGISTER"
        )
        collect(error, "unknown-class")
    elif counts:
        logger.warning(
            "left out annotations of %s whose class is not among `classes`: %s", json_file, counts
        )


def note_classes(
    metadata: Metadata, names: list[str], to_contiguous: dict[Any, int], json_file: str
) -> None:
    """Set names, colors and ids of the classes as metadata.

    Args:
        metadata: Of the data set. Changed.
        names: K, in the order of the contiguous ids.
        to_contiguous: Category id -> contiguous id in [0, K).
        json_file: The file that says so, for messages.

    Raises:
        DataError: The metadata has other classes.
    """
    expected = list(metadata.get("thing_classes", names))
    if expected != names:
        raise DataError(
            f"the classes of {json_file} are not those noted for data set {metadata.name!r}."
            f" Expected: {', '.join(expected)}. Found: {', '.join(names)}."
        )
    metadata.set(thing_classes=names, thing_dataset_id_to_contiguous_id=to_contiguous)
    if metadata.get("thing_colors") is None:
        metadata.set(thing_colors=class_colors(len(names)))


def note_keypoints(
    metadata: Metadata, categories: Sequence[Mapping[str, Any]], json_file: str
) -> None:
    """Set names of keypoints, the pairs that a mirror exchanges, and the skeleton as metadata.

    Args:
        metadata: Of the data set. Changed.
        categories: Those of the classes in use, as the file has them.
        json_file: The file, for messages.

    Raises:
        DataError: The metadata has other keypoints.
    """
    kinds = [category for category in categories if category.get("keypoints")]
    # With several kinds of keypoints, nothing says which one a model is to learn.
    if not kinds or any(kind["keypoints"] != kinds[0]["keypoints"] for kind in kinds):
        return
    names, skeleton = list(kinds[0]["keypoints"]), kinds[0].get("skeleton")
    expected = list(metadata.get("keypoint_names", names))
    if expected != names:
        raise DataError(
            f"the keypoints of {json_file} are not those noted for data set {metadata.name!r}."
            f" Expected: {', '.join(expected)}. Found: {', '.join(names)}."
        )
    metadata.set(keypoint_names=names)
    if metadata.get("keypoint_flip_map") is None:
        metadata.set(keypoint_flip_map=left_right_pairs(names))
    if metadata.get("keypoint_connection_rules") is not None or not skeleton:
        return
    try:
        ends = [(int(a), int(b)) for a, b in skeleton]
    except (TypeError, ValueError, OverflowError):
        ends = []
    # No error: the lines are for pictures alone.
    if not ends or not all(1 <= end <= len(names) for pair in ends for end in pair):
        logger.warning(
            "%s: the skeleton must be pairs of keypoints, which count from 1 to %d; it is not"
            " drawn: %s",
            json_file,
            len(names),
            shortened(skeleton, 80),
        )
        return
    # A skeleton counts keypoints from 1.
    rules = [
        (names[a - 1], names[b - 1], color)
        for (a, b), color in zip(ends, skeleton_colors(len(ends)), strict=True)
    ]
    metadata.set(keypoint_connection_rules=rules)
