"""What each format of a declared data set loads, and what is noted about it. `declared` checks the entries first.

Paths are looked for at the moment of use, so that `$DETKIT_DATASETS` may be set after the config
was read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import left_right_pairs
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.coco_panoptic import IGNORE_LABEL, load_coco_panoptic_json, load_separated
from detkit.data.datasets.json_file import read_json, section
from detkit.data.datasets.lvis import class_image_count, load_lvis_json
from detkit.data.datasets.pascal_voc import load_voc_folders
from detkit.data.datasets.sem_seg import load_sem_seg
from detkit.structures import ImageRecord
from detkit.utils.colormap import class_colors
from detkit.utils.file_io import dataset_root

Classes = tuple[str, ...] | None


def register_declared(entry: Mapping[str, Any]) -> None:
    """Register one entry of `DATASETS.REGISTER` that was checked; its `classes` are a tuple or
    None.
    """
    _REGISTER[entry["format"]](entry)


def _register_coco(entry: Mapping[str, Any]) -> None:
    images, annotations = entry["images"], entry["annotations"]
    loader = functools.partial(
        _load_coco,
        entry["name"],
        images,
        annotations,
        entry["classes"],
        drop_bad_polygons=entry.get("drop_bad_polygons", False),
    )
    _register(
        entry, loader, {"json_file": annotations, "image_root": images}, _keypoint_metadata(entry)
    )


def _register_voc(entry: Mapping[str, Any]) -> None:
    paths = {field: entry.get(field) for field in ("root", "images", "annotations", "split")}
    loader = functools.partial(_load_voc, classes=entry["classes"], **paths)
    split = {"split": Path(entry["split"]).stem} if entry.get("split") else {}
    _register(entry, loader, {"dirname": entry["root"]} if "root" in entry else {}, split)


def _register_lvis(entry: Mapping[str, Any]) -> None:
    name, images, annotations = entry["name"], entry["images"], entry["annotations"]
    loader = functools.partial(_load_lvis, name, images, annotations)
    _register(
        entry, loader, {"json_file": annotations, "image_root": images}, {"evaluator_type": "lvis"}
    )
    MetadataCatalog.get(name).set_lazy(
        class_image_count=functools.partial(_image_count, annotations)
    )


def _register_sem_seg(entry: Mapping[str, Any]) -> None:
    images, labels, classes = entry["images"], entry["labels"], list(entry["classes"])
    loader = functools.partial(_load_sem_seg, labels, images, entry.get("image_ending", "jpg"))
    metadata = {
        "evaluator_type": "sem_seg",
        "stuff_classes": classes,
        "stuff_colors": class_colors(len(classes)),
        "ignore_label": entry.get("ignore_label", IGNORE_LABEL),
    }
    _register(
        entry, loader, {"image_root": images, "sem_seg_root": labels}, metadata, has_things=False
    )


def _register_panoptic(entry: Mapping[str, Any]) -> None:
    paths = {
        "image_root": entry["images"],
        "panoptic_json": entry["annotations"],
        "panoptic_root": entry["segments"],
    }
    if "instances" in entry:
        paths |= {"json_file": entry["instances"], "sem_seg_root": entry["labels"]}
    loader = functools.partial(_load_panoptic, entry["name"], **paths)
    metadata = {
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "label_divisor": 1000,
    }
    _register(entry, loader, paths, metadata)


_REGISTER = {
    "coco": _register_coco,
    "voc": _register_voc,
    "lvis": _register_lvis,
    "sem_seg": _register_sem_seg,
    "coco_panoptic": _register_panoptic,
}


def _register(
    entry: Mapping[str, Any],
    loader: Any,
    paths: Mapping[str, str],
    metadata: Mapping[str, Any],
    has_things: bool = True,
) -> None:
    """Register a loader, and note paths, metadata, the evaluator that was asked for, and classes of
    things.
    """
    name, classes = entry["name"], entry.get("classes")
    DatasetCatalog.register(name, loader)
    known = MetadataCatalog.get(name)
    known.set_lazy(**{key: functools.partial(_located, path) for key, path in paths.items()})
    known.set(
        **{**metadata, **({"evaluator_type": entry["evaluator"]} if "evaluator" in entry else {})}
    )
    if has_things and classes is not None:
        known.set(thing_classes=list(classes), thing_colors=class_colors(len(classes)))


def _keypoint_metadata(entry: Mapping[str, Any]) -> dict[str, Any]:
    names = list(entry.get("keypoints", ()))
    pairs = (
        [tuple(pair) for pair in entry["flip_pairs"]]
        if "flip_pairs" in entry
        else left_right_pairs(names)
    )
    return {"keypoint_names": names, "keypoint_flip_map": pairs} if names else {}


def _located(path: str) -> str:
    return str(dataset_root() / Path(path).expanduser())


def _load_coco(
    name: str, images: str, annotations: str, classes: Classes, *, drop_bad_polygons: bool
) -> list[ImageRecord]:
    return load_coco_json(
        _located(annotations),
        _located(images),
        name,
        classes=classes,
        drop_bad_polygons=drop_bad_polygons,
    )


def _load_lvis(name: str, images: str, annotations: str) -> list[ImageRecord]:
    return load_lvis_json(_located(annotations), _located(images), name)


def _image_count(annotations: str) -> list[dict[str, int]] | None:
    return class_image_count(_located(annotations))


def _load_sem_seg(labels: str, images: str, image_ending: str) -> list[ImageRecord]:
    return load_sem_seg(
        _located(labels), _located(images), image_ext=image_ending.removeprefix(".")
    )


def _load_panoptic(name: str, **paths: str) -> list[ImageRecord]:
    located = {key: _located(path) for key, path in paths.items()}
    categories = section(
        read_json(located["panoptic_json"]), "categories", located["panoptic_json"]
    )
    known = MetadataCatalog.get(name)
    if "json_file" in located:
        known.set(**separated_classes(categories))
        return load_separated(
            located["json_file"], located["image_root"], located["sem_seg_root"], name
        )
    known.set(**joined_classes(categories))
    return load_coco_panoptic_json(
        located["panoptic_json"], located["image_root"], located["panoptic_root"], known.as_dict()
    )


def joined_classes(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metadata of a panoptic json's `categories`: one contiguous id for things, then
    stuff.
    """
    ordered = [*_of_kind(categories, is_thing=True), *_of_kind(categories, is_thing=False)]
    names, colors = [category["name"] for category in ordered], class_colors(len(ordered))
    ids = {category["id"]: index for index, category in enumerate(ordered)}
    return {
        "thing_classes": names,
        "thing_colors": colors,
        "stuff_classes": names,
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {
            c["id"]: ids[c["id"]] for c in _of_kind(categories, is_thing=True)
        },
        "stuff_dataset_id_to_contiguous_id": {
            c["id"]: ids[c["id"]] for c in _of_kind(categories, is_thing=False)
        },
    }


def separated_classes(categories: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the metadata of stuff for label maps of which 0 is all things; the things are those of
    the instances.
    """
    stuff = _of_kind(categories, is_thing=False)
    return {
        "stuff_classes": ["things", *(category["name"] for category in stuff)],
        "stuff_colors": class_colors(len(stuff) + 1),
        "stuff_dataset_id_to_contiguous_id": {
            0: 0,
            **{c["id"]: index for index, c in enumerate(stuff, start=1)},
        },
    }


def _of_kind(categories: Sequence[Mapping[str, Any]], is_thing: bool) -> list[Mapping[str, Any]]:
    return sorted(
        (c for c in categories if bool(c.get("isthing", 1)) == is_thing), key=lambda c: c["id"]
    )


def _load_voc(
    *,
    root: str | None,
    images: str | None,
    annotations: str | None,
    split: str | None,
    classes: tuple[str, ...],
) -> list[ImageRecord]:
    images = _located(images) if images else str(Path(_located(root or "")) / "JPEGImages")
    annotations = (
        _located(annotations) if annotations else str(Path(_located(root or "")) / "Annotations")
    )
    base = Path(_located(root)) if root else Path(annotations).parent
    return load_voc_folders(images, annotations, classes, split_file=_split_file(split, base))


def _split_file(split: str | None, base: Path) -> str | None:
    if split is None:
        return None
    # By its ending, not by what exists: a folder `train` beside the YAML file says nothing about
    # the split `train`.
    if split.endswith(".txt"):
        return _located(split)
    return str(base / "ImageSets" / "Main" / f"{Path(split).name}.txt")
