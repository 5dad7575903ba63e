"""Data sets in COCO's annotation format: one JSON file with images, categories and annotations.

Format: https://cocodataset.org/#format-data. What a file lacks although nothing here needs it (`info`, `licenses`, an
annotation's `area` or `iscrowd`) is not asked for.

Legend: K classes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from detkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detkit.data.datasets.builtin_meta import Color, left_right_pairs
from detkit.data.datasets.coco_annotations import AnnotationReader
from detkit.data.datasets.data_folder import DataFolder
from detkit.structures import AnnotationRecord, ImageRecord
from detkit.utils.colormap import class_colors
from detkit.utils.file_io import PathManager
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

# Taken over where an annotation has them; `bbox` and `category_id` are required.
_ANNOTATION_KEYS = ("id", "iscrowd", "area", "segmentation", "keypoints")


def register_coco_instances(
    name: str, metadata: dict[str, Any], json_file: str, image_root: str, *, classes: Sequence[str] | None = None
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


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Build millions of lists and dicts without Python looking through all of them, again and again, for garbage.

    There is none, and the search takes 40 % of the time that COCO's training set takes to load.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


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
        image_root: The folder that its file names are relative to. A name that leads out of it is refused; "/" allows
            absolute paths.
        dataset_name: Where given, class names and ids are noted in the `MetadataCatalog` under this name.
        extra_annotation_keys: Further keys of annotations to keep.
        classes: Names of the classes to use, in the order of their ids; annotations of other classes are left out, and
            their number is logged. None takes all categories in the order of their ids in the file.
        drop_bad_polygons: Leave polygons of fewer than three points out, with a count, instead of refusing them.

    Returns:
        The images in the order of their ids, each with all of its annotations in the order of the file, or without the
        key where the file has no annotations at all (COCO's test sets). `category_id` is contiguous, in [0, K).
        Keypoints lie half a pixel to the right and below of what the file says: it numbers pixels.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no JSON, lacks a part, contradicts itself, or does not have `classes`; or an annotation
            has no usable box, a polygon of fewer than three points, a mask of another size than its image, or another
            number of keypoints than its category.
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
    """Give the records of an annotation file that was read; see `load_coco_json`. `image_keys` are taken over as well.

    Raises:
        ValueError: As there.
    """
    images = _by_id(section(content, "images", json_file), "image", json_file)
    entries = _by_id(section(content, "categories", json_file), "category", json_file)
    categories = _category_names(entries, json_file)
    used = _used_categories(categories, classes, json_file)
    to_contiguous = {category_id: index for index, category_id in enumerate(used)}
    annotations = content.get("annotations")
    if annotations is None:
        logger.info("%s has no annotations: its images can be predicted on only", json_file)
    per_image = _annotations_per_image(annotations or [], images, categories, json_file)
    keys = (*_ANNOTATION_KEYS, *extra_annotation_keys)
    folder = DataFolder(image_root, json_file)
    reader = AnnotationReader(json_file, entries, to_contiguous, keys, drop_bad_polygons=drop_bad_polygons)
    records = [
        _image_record(images[image_id], folder, reader.records(images[image_id], per_image[image_id]), image_keys)
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
        _note_classes(metadata, [categories[c] for c in used], to_contiguous, json_file)
        _note_keypoints(metadata, [entries[c] for c in used], json_file)
    return records


def read_json(json_file: str) -> dict[str, Any]:
    """Give the content of an annotation file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or no object.
    """
    path = PathManager.get_local_path(json_file)
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - a path of iopath's, local by now
            content = json.load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"annotation file {json_file} does not exist") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits are a bare ValueError
        raise ValueError(f"annotation file {json_file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"annotation file {json_file} must hold an object with images, annotations and categories; it holds a "
            f"{type(content).__name__}. A list is COCO's format for results, not for ground truth."
        )
    return content


def section(content: dict[str, Any], key: str, json_file: str) -> list[dict[str, Any]]:
    """Give one of the lists of an annotation file.

    Raises:
        ValueError: The file does not have it, or it is no list of objects.
    """
    entries = content.get(key)
    if entries is None:
        raise ValueError(
            f"annotation file {json_file} has no {key!r}, only {sorted(content)}.{did_you_mean(key, content)}"
        )
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{key!r} of annotation file {json_file} must be a list of objects")
    return entries


def _by_id(entries: list[dict[str, Any]], kind: str, json_file: str) -> dict[Any, dict[str, Any]]:
    _require_unique_ids(entries, kind, json_file)
    return {entry["id"]: entry for entry in entries}


def _require_unique_ids(entries: list[dict[str, Any]], kind: str, json_file: str) -> None:
    missing = next((number for number, entry in enumerate(entries) if "id" not in entry), None)
    if missing is not None:
        raise ValueError(f"{kind} number {missing} (from 0) of {json_file} has no id: {_shortened(entries[missing])}")
    kinds = set(map(type, (entry["id"] for entry in entries)))
    if len(kinds) > 1 or not kinds <= {int, str}:
        strange = next(entry for entry in entries if type(entry["id"]) is not int)
        raise ValueError(f"{json_file} needs {kind} ids that are all integers, or all text: {_shortened(strange)}")
    repeated = [key for key, count in Counter(entry["id"] for entry in entries).items() if count > 1]
    if repeated:
        raise ValueError(f"{json_file} uses {kind} ids more than once: {_listed(repeated)}")


def _category_names(categories: dict[Any, dict[str, Any]], json_file: str) -> dict[Any, str]:
    """Category id -> name, in the order of the ids."""
    for category in categories.values():
        if not isinstance(category.get("name"), str):
            raise ValueError(f"category {category['id']} of {json_file} needs a name: {_shortened(category)}")
    return {key: categories[key]["name"] for key in sorted(categories)}


def _used_categories(categories: dict[Any, str], classes: Sequence[str] | None, json_file: str) -> list[Any]:
    """Give the category ids to use, in the order of the contiguous ids."""
    if classes is None:
        return list(categories)
    ids = {name: key for key, name in categories.items()}
    unknown = [name for name in classes if name not in ids]
    if unknown:
        raise ValueError(
            f"{json_file} has no category {', '.join(map(repr, unknown))}.{did_you_mean(unknown[0], ids)} Expected "
            f"classes: {', '.join(classes)}. Found in the file: {', '.join(ids) or 'none'}."
        )
    return [ids[name] for name in classes]


def _annotations_per_image(
    annotations: Any, images: dict[Any, Any], categories: dict[Any, str], json_file: str
) -> defaultdict[Any, list[dict[str, Any]]]:
    annotations = section({"annotations": annotations}, "annotations", json_file)
    _require_unique_ids(annotations, "annotation", json_file)
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
        stray = [annotation for annotation in annotations if not isinstance(annotation.get(key), int | str)]
    if stray:
        values = list(dict.fromkeys(_hashable(annotation.get(key)) for annotation in stray))
        raise ValueError(
            f"{len(stray)} annotations of {json_file} name {kind} that the file does not list: {key} "
            f"{_listed(values)} in annotations {_listed([annotation['id'] for annotation in stray])}"
        )


def _hashable(value: Any) -> Any:
    return value if isinstance(value, int | str | None) else repr(value)


def _image_record(
    image: dict[str, Any], folder: DataFolder, annotations: list[AnnotationRecord], keys: Sequence[str]
) -> ImageRecord:
    if not isinstance(image.get("file_name"), str) or not image["file_name"]:
        raise ValueError(f"image {image['id']} of {folder.named_in} has no file_name: {_shortened(image)}")
    record: dict[str, Any] = {"file_name": folder.path_of(image["file_name"]), "image_id": image["id"]}
    for side in ("height", "width"):
        if side in image:
            record[side] = _require_side(image[side], side, image, folder.named_in)
    record.update((key, image[key]) for key in keys if key in image)
    record["annotations"] = annotations
    return cast(ImageRecord, record)


def _require_side(value: Any, side: str, image: dict[str, Any], json_file: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value < 2**31 or value != int(value):
        raise ValueError(f"image {image['id']} ({image['file_name']}) of {json_file} has {side} {value!r}, need pixels")
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
        logger.warning("left out annotations of %s whose class is not among `classes`: %s", json_file, counts)


def _note_classes(metadata: Metadata, names: list[str], to_contiguous: dict[Any, int], json_file: str) -> None:
    expected = list(metadata.get("thing_classes", names))
    if expected != names:
        raise ValueError(
            f"the classes of {json_file} are not those noted for data set {metadata.name!r}. Expected: "
            f"{', '.join(expected)}. Found: {', '.join(names)}."
        )
    metadata.set(thing_classes=names, thing_dataset_id_to_contiguous_id=to_contiguous)
    if metadata.get("thing_colors") is None:
        metadata.set(thing_colors=class_colors(len(names)))


def _note_keypoints(metadata: Metadata, categories: Sequence[Mapping[str, Any]], json_file: str) -> None:
    """Note names of keypoints, which of them a mirror exchanges, and the lines between them."""
    with_names = [category for category in categories if category.get("keypoints")]
    if not with_names or any(category["keypoints"] != with_names[0]["keypoints"] for category in with_names):
        return  # none, or several kinds of them: which one a model is to learn cannot be said here
    names = list(with_names[0]["keypoints"])
    expected = list(metadata.get("keypoint_names", names))
    if expected != names:
        raise ValueError(
            f"the keypoints of {json_file} are not those noted for data set {metadata.name!r}. Expected: "
            f"{', '.join(expected)}. Found: {', '.join(names)}."
        )
    metadata.set(keypoint_names=names)
    if metadata.get("keypoint_flip_map") is None:
        metadata.set(keypoint_flip_map=left_right_pairs(names))
    skeleton = with_names[0].get("skeleton")
    if metadata.get("keypoint_connection_rules") is None and skeleton:
        metadata.set(keypoint_connection_rules=_connection_rules(names, skeleton, json_file))


def _connection_rules(names: Sequence[str], skeleton: Any, json_file: str) -> list[tuple[str, str, Color]]:
    """Give the lines of a skeleton, which counts keypoints from 1, as `(name, name, color)`."""
    try:
        ends = [(int(a), int(b)) for a, b in skeleton]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the skeleton in {json_file} must be pairs of numbers, got {skeleton!r}") from error
    stray = [end for pair in ends for end in pair if not 1 <= end <= len(names)]
    if stray:
        raise ValueError(f"the skeleton in {json_file} names keypoints {_listed(stray)}, of 1 to {len(names)}")
    return [(names[a - 1], names[b - 1], color) for (a, b), color in zip(ends, class_colors(len(ends)), strict=True)]


def _listed(values: Sequence[Any], limit: int = 10) -> str:
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def _shortened(entry: dict[str, Any]) -> str:
    text = repr(entry)
    return text if len(text) <= 200 else text[:197] + "..."
