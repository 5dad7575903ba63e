"""The formats of declared data sets: their fields, what they load, and their metadata.

`declared` checks the entries first. Paths are resolved when a data set is used, so that
`$DETKIT_DATASETS` may be set after the config was read.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import (
    Category,
    joined_metadata,
    left_right_pairs,
    stuff_metadata,
)
from detkit.data.datasets.coco import category_names, load_coco_json
from detkit.data.datasets.coco_panoptic import (
    IGNORE_LABEL,
    LABEL_DIVISOR,
    load_coco_panoptic_json,
    load_separated,
)
from detkit.data.datasets.formats.collected import Collected
from detkit.data.datasets.formats.detect import detect_dataset
from detkit.data.datasets.formats.drawing_tools import read_cvat, read_labelme
from detkit.data.datasets.formats.hugging_face import read_hugging_face
from detkit.data.datasets.formats.oriented_text import load_dota, load_yolo_obb
from detkit.data.datasets.formats.table import read_csv, read_open_images
from detkit.data.datasets.formats.yolo import read_yolo, read_yolo_folders
from detkit.data.datasets.json_file import by_id, read_json, section
from detkit.data.datasets.lvis import class_image_count, load_lvis_json
from detkit.data.datasets.pascal_voc import load_voc_folders
from detkit.data.datasets.sem_seg import load_sem_seg
from detkit.structures import ImageRecord, as_flag
from detkit.utils.colormap import class_colors
from detkit.utils.errors import ConfigError, DataError, MissingFileError
from detkit.utils.file_io import dataset_root, has_own_handler
from detkit.utils.remote_files import is_address, relocated, require_address
from detkit.utils.text import did_you_mean, listed

logger = logging.getLogger(__name__)

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Registration:
    """A declared data set: its loader, its metadata, and metadata that depends on the folders."""

    loader: Callable[[], list[ImageRecord]]
    metadata: Mapping[str, Any]
    lazy: Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Format:
    """A format: the fields of its entries besides `name` and `format`, and what an entry means.

    In the entries that `describe` takes, `classes` is a tuple or None.
    """

    describe: Callable[[Entry], Registration]
    required: Sequence[str]
    optional: Sequence[str] = ()
    remote: Sequence[str] = ()
    """Fields that may be addresses."""


def register_declared(entry: Entry) -> None:
    """Register one entry of `DATASETS.REGISTER` that was checked."""
    name, declared = entry["name"], FORMATS[entry["format"]].describe(entry)
    DatasetCatalog.register(name, declared.loader)
    metadata = dict(declared.metadata)
    if "evaluator" in entry:
        metadata["evaluator_type"] = entry["evaluator"]
    MetadataCatalog.get(name).set_lazy(**declared.lazy).set(**metadata)


def _located(path: str) -> str:
    located = relocated(path, lambda local: str(dataset_root() / Path(local).expanduser()))
    if is_address(located) and not has_own_handler(located):
        require_address(located)
    return located


def _lazy_paths(**paths: str) -> dict[str, Callable[[], str]]:
    return {key: functools.partial(_located, path) for key, path in paths.items()}


def _loader(
    load: Callable[..., list[ImageRecord]], paths: Mapping[str, str], **options: Any
) -> functools.partial[list[ImageRecord]]:
    """Return a loader that calls `load` with located paths and with `options`."""
    return functools.partial(_load, load, paths, options)


def _load(
    load: Callable[..., list[ImageRecord]], paths: Mapping[str, str], options: Mapping[str, Any]
) -> list[ImageRecord]:
    return load(**{key: _existing(path, key) for key, path in paths.items()}, **options)


def _existing(path: str, key: str) -> str:
    """Return a located path: of a folder where `key` ends with `root`, of a file otherwise.

    Addresses are not looked for.

    Raises:
        MissingFileError: It is not there, or the folder is a file, or the file a folder.
    """
    if is_address(path):
        return _located(path)
    located, is_folder = Path(_located(path)), key.endswith("root")
    wanted, found = ("folder", "file") if is_folder else ("file", "folder")
    if not located.exists():
        # Misspelt beside the YAML file, it was not taken for a path relative to it.
        parents = [p for p in (located.parent, Path(path).parent) if p.is_dir()]
        names = [entry.name for parent in parents for entry in parent.iterdir()]
        raise MissingFileError(
            f"DATASETS.REGISTER names a {wanted} that does not exist: {path}, as"
            f" {located.absolute()}.{did_you_mean(located.name, names)} Paths are relative to the"
            " YAML file or to $DETKIT_DATASETS"
        )
    if located.exists() and located.is_dir() != is_folder:
        raise MissingFileError(f"DATASETS.REGISTER needs a {wanted}, {path} is a {found}")
    return str(located)


def _thing_classes(classes: Sequence[str] | None) -> dict[str, Any]:
    if classes is None:
        return {}
    return {"thing_classes": list(classes), "thing_colors": class_colors(len(classes))}


def _coco(entry: Entry) -> Registration:
    metadata = _thing_classes(entry["classes"])
    if "keypoints" in entry:
        metadata["keypoint_names"] = list(entry["keypoints"])
        metadata["keypoint_flip_map"] = left_right_pairs(entry["keypoints"])
        if "flip_pairs" in entry:
            metadata["keypoint_flip_map"] = [tuple(pair) for pair in entry["flip_pairs"]]
    paths = {"json_file": entry["annotations"], "image_root": entry["images"]}
    options = {
        "dataset_name": entry["name"],
        "classes": entry["classes"],
        "drop_bad_polygons": entry.get("drop_bad_polygons", False),
    }
    return Registration(_loader(load_coco_json, paths, **options), metadata, _lazy_paths(**paths))


def _voc(entry: Entry) -> Registration:
    paths = {field: entry.get(field) for field in ("root", "images", "annotations", "split")}
    loader = functools.partial(_load_voc, classes=entry["classes"], **paths)
    metadata = _thing_classes(entry["classes"])
    if "split" in entry:
        metadata["split"] = Path(entry["split"]).stem
    lazy = _lazy_paths(dirname=entry["root"]) if "root" in entry else {}
    return Registration(loader, metadata, lazy)


def _load_voc(
    *,
    root: str | None,
    images: str | None,
    annotations: str | None,
    split: str | None,
    classes: tuple[str, ...],
) -> list[ImageRecord]:
    base = Path(_existing(root, "root") if root else _located(""))
    images = _located(images) if images else str(base / "JPEGImages")
    annotations = _located(annotations) if annotations else str(base / "Annotations")
    if not root:
        base = Path(annotations).parent
    split_file = None
    # A split is a file by its ending, not by what exists: a folder `train` beside the YAML file
    # says nothing about the split `train`.
    if split is not None and split.endswith(".txt"):
        split_file = _located(split)
    elif split is not None:
        split_file = str(base / "ImageSets" / "Main" / f"{Path(split).name}.txt")
    return load_voc_folders(images, annotations, classes, split_file=split_file)


def _oriented(load: Callable[..., list[ImageRecord]], entry: Entry) -> Registration:
    paths = {"image_root": entry["images"], "annotation_root": entry["annotations"]}
    loader = _loader(load, paths, class_names=entry["classes"])
    return Registration(loader, _thing_classes(entry["classes"]), _lazy_paths(**paths))


def _collected(
    read: Callable[..., Collected], located: Sequence[str], given: Sequence[str] = ()
) -> Callable[[Entry], Registration]:
    """Return how to describe a format whose files `read` collects.

    Args:
        read: Takes the fields of an entry by their names.
        located: Fields that are paths.
        given: Other fields that it takes.
    """

    def describe(entry: Entry) -> Registration:
        paths = {field: entry[field] for field in located if field in entry}
        options = {field: entry[field] for field in given if field in entry}
        name, classes = entry["name"], entry["classes"]
        loader = functools.partial(_load_collected, read, paths, options, name, classes)
        return Registration(loader, _thing_classes(classes), {})

    return describe


def _load_collected(
    read: Callable[..., Collected],
    paths: Mapping[str, str],
    options: Mapping[str, Any],
    name: str,
    classes: tuple[str, ...] | None,
) -> list[ImageRecord]:
    located = {field: _located(path) for field, path in paths.items()}
    return read(**located, **options).records(name, classes)


def _yolo(entry: Entry) -> Registration:
    if "data" not in entry:
        # The order of `classes` is that of the numbers in the files.
        return _collected(read_yolo_folders, ("images", "annotations"), ("classes",))(entry)
    # A folder `train` beside the YAML file says nothing about the split `train`.
    split = Path(entry.get("split", "train")).name
    return _collected(read_yolo, ("data",), ("split",))({**entry, "split": split})


def _hugging_face(entry: Entry) -> Registration:
    split = {"split": Path(entry["split"]).name} if "split" in entry else {}
    return _collected(read_hugging_face, ("root",), ("split", "classes"))({**entry, **split})


def _auto(entry: Entry) -> Registration:
    metadata = _thing_classes(entry["classes"])
    return Registration(functools.partial(_load_auto, dict(entry)), metadata, {})


def _load_auto(entry: Entry) -> list[ImageRecord]:
    found = detect_dataset(_located(entry["root"]))
    split = Path(entry["split"]).name if "split" in entry else next(iter(found))
    if split not in found or ("split" not in entry and len(found) > 1):
        raise ConfigError(
            f"{entry['root']} has the splits {', '.join(found)}: name one in the entry of"
            f" {entry['name']!r} under DATASETS.REGISTER as `split`, got {entry.get('split')!r}"
        )
    chosen = {"classes": None, **found[split], "name": entry["name"]}
    if entry["classes"] is not None:
        chosen["classes"] = entry["classes"]
    described = FORMATS[chosen["format"]].describe(chosen)
    fields = {key: value for key, value in chosen.items() if value is not None and key != "name"}
    logger.info("data set %r is %s", entry["name"], fields)
    MetadataCatalog.get(entry["name"]).set_lazy(**described.lazy).set(**described.metadata)
    return described.loader()


def _lvis(entry: Entry) -> Registration:
    paths = {"json_file": entry["annotations"], "image_root": entry["images"]}
    count = functools.partial(_image_count, entry["annotations"])
    return Registration(
        _loader(load_lvis_json, paths, dataset_name=entry["name"]),
        {"evaluator_type": "lvis"},
        {**_lazy_paths(**paths), "class_image_count": count},
    )


def _image_count(annotations: str) -> list[dict[str, int]] | None:
    return class_image_count(_located(annotations))


def _sem_seg(entry: Entry) -> Registration:
    images, labels, classes = entry["images"], entry["labels"], list(entry["classes"])
    metadata = {
        "evaluator_type": "sem_seg",
        "stuff_classes": classes,
        "stuff_colors": class_colors(len(classes)),
        "ignore_label": entry.get("ignore_label", IGNORE_LABEL),
    }
    paths = {"gt_root": labels, "image_root": images}
    ending = entry.get("image_ending", "jpg").removeprefix(".")
    return Registration(
        _loader(load_sem_seg, paths, image_ext=ending),
        metadata,
        _lazy_paths(image_root=images, sem_seg_root=labels),
    )


def _panoptic(entry: Entry) -> Registration:
    paths = {
        "image_root": entry["images"],
        "panoptic_json": entry["annotations"],
        "panoptic_root": entry["segments"],
    }
    if "instances" in entry:
        paths |= {"json_file": entry["instances"], "sem_seg_root": entry["labels"]}
    metadata = {
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "label_divisor": LABEL_DIVISOR,
    }
    loader = _loader(_load_panoptic, paths, name=entry["name"])
    return Registration(loader, metadata, _lazy_paths(**paths))


def _load_panoptic(*, name: str, **located: str) -> list[ImageRecord]:
    json_file, images = located["panoptic_json"], located["image_root"]
    found = by_id(section(read_json(json_file), "categories", json_file), "category", json_file)
    names = category_names(found, json_file)
    categories = [{**found[key], "name": name} for key, name in names.items()]
    without_kind = [category["name"] for category in categories if category.get("isthing") is None]
    if without_kind:
        raise DataError(
            f"{len(without_kind)} of {len(categories)} categories of {json_file} lack isthing: 1"
            f" for things, which are counted, 0 for stuff: {listed(without_kind)}"
        )
    try:
        is_thing = [as_flag(category["isthing"]) for category in categories]
    except DataError as error:
        raise DataError(f"a category of {json_file} has a wrong isthing: {error}") from error
    things = [category for category, flag in zip(categories, is_thing, strict=True) if flag]
    stuff = [category for category, flag in zip(categories, is_thing, strict=True) if not flag]
    known = MetadataCatalog.get(name)
    if "json_file" in located:
        first, *colors = class_colors(len(stuff) + 1)
        # The things are those of the instances, whose loader notes them.
        known.set(**stuff_metadata(_categories(stuff, colors), first))
        return load_separated(located["json_file"], images, located["sem_seg_root"], name)
    colors = class_colors(len(categories))
    joined = joined_metadata(
        _categories(things, colors[: len(things)]), _categories(stuff, colors[len(things) :])
    )
    known.set(**joined)
    return load_coco_panoptic_json(json_file, images, located["panoptic_root"], known.as_dict())


def _categories(entries: Sequence[Entry], colors: Sequence[tuple[int, int, int]]) -> list[Category]:
    pairs = zip(entries, colors, strict=True)
    return [Category(entry["id"], entry["name"], color) for entry, color in pairs]


FORMATS = {
    "coco": Format(
        _coco,
        required=("images", "annotations"),
        optional=("classes", "keypoints", "flip_pairs", "drop_bad_polygons", "evaluator"),
        remote=("images", "annotations"),
    ),
    "voc": Format(
        _voc,
        required=("classes",),
        optional=("root", "images", "annotations", "split", "evaluator"),
    ),
    "dota": Format(
        functools.partial(_oriented, load_dota),
        required=("images", "annotations", "classes"),
        optional=("evaluator",),
    ),
    "yolo_obb": Format(
        functools.partial(_oriented, load_yolo_obb),
        required=("images", "annotations", "classes"),
        optional=("evaluator",),
    ),
    "yolo": Format(
        _yolo,
        required=(),
        optional=("data", "split", "images", "annotations", "classes", "evaluator"),
    ),
    "csv": Format(
        _collected(
            read_csv,
            ("annotations", "images", "descriptions"),
            ("columns", "normalized"),
        ),
        required=("images", "annotations"),
        optional=("columns", "normalized", "descriptions", "classes", "evaluator"),
    ),
    "open_images": Format(
        _collected(read_open_images, ("annotations", "images", "descriptions")),
        required=("images", "annotations"),
        optional=("descriptions", "classes", "evaluator"),
    ),
    "labelme": Format(
        _collected(read_labelme, ("annotations", "images")),
        required=("annotations",),
        optional=("images", "classes", "evaluator"),
    ),
    "cvat": Format(
        _collected(read_cvat, ("annotations", "images")),
        required=("images", "annotations"),
        optional=("classes", "evaluator"),
        remote=("images", "annotations"),
    ),
    "hugging_face": Format(
        _hugging_face, required=("root",), optional=("split", "classes", "evaluator")
    ),
    "auto": Format(_auto, required=("root",), optional=("split", "classes", "evaluator")),
    "lvis": Format(
        _lvis, required=("images", "annotations"), optional=("evaluator",), remote=("images",)
    ),
    "sem_seg": Format(
        _sem_seg,
        required=("images", "labels", "classes"),
        optional=("image_ending", "ignore_label", "evaluator"),
    ),
    "coco_panoptic": Format(
        _panoptic,
        required=("images", "annotations", "segments"),
        optional=("instances", "labels", "evaluator"),
        remote=("images",),
    ),
}
