"""Data sets declared in YAML, under `DATASETS.REGISTER`: no Python needed.

    DATASETS:
      REGISTER:
        - {name: cells_train, format: coco, images: cells/images, annotations: cells/train.json}
        - {name: blood_train, format: voc, root: bccd, split: train, classes: [RBC, WBC, Platelets]}
        - {name: signs, format: voc, images: signs/photos, annotations: signs/xml, classes: [stop, yield]}

Fields of both formats:
    name         as in DATASETS.TRAIN and DATASETS.TEST.
    format       coco or voc.
    classes      names in the order of their ids. voc: required. coco: optional, picks and orders categories.
    evaluator    optional: coco or pascal_voc, the protocol to evaluate with. Without it, coco.
Fields of coco:
    images       the folder that file names in the JSON are relative to.
    annotations  the JSON file.
Fields of voc:
    root         a folder with VOC's own layout: JPEGImages, Annotations, ImageSets/Main.
    images       the folder of images, where it is not ROOT/JPEGImages.
    annotations  the folder of XML files, where it is not ROOT/Annotations. Without root, both are needed.
    split        which images: a text file with one name per line (it ends in .txt), or the name of one in
                 ImageSets/Main, of the root or beside the folder of annotations. Without it, every XML file.

A path is absolute, or relative to the YAML file where it exists there, or else relative to `$DETKIT_DATASETS`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.pascal_voc import load_voc_folders
from detkit.structures import ImageRecord
from detkit.utils.colormap import class_colors
from detkit.utils.file_io import dataset_root
from detkit.utils.near_miss import did_you_mean

_FIELDS = {
    "coco": ("name", "format", "images", "annotations", "classes", "evaluator"),
    "voc": ("name", "format", "root", "images", "annotations", "split", "classes", "evaluator"),
}
_EVALUATORS = ("coco", "pascal_voc")
# Fields that other frameworks and formats use for the same thing.
_SYNONYMS = {"image_root": "images", "json_file": "annotations", "dirname": "root", "class_names": "classes"}


def register_declared_datasets(entries: Sequence[Mapping[str, Any]]) -> None:
    """Register the data sets that a config declares. Doing it again with the same entries does nothing.

    Args:
        entries: The value of `DATASETS.REGISTER`. Nothing is read before a data set is used.

    Raises:
        TypeError, ValueError: An entry is wrong; the message names it and the field. No data set of the list is
            registered then.
    """
    checked = [_checked(entry, f"DATASETS.REGISTER[{index}]") for index, entry in enumerate(entries)]
    for entry in checked:
        _register(entry)


def _checked(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where} must be a mapping such as {{name: ..., format: coco, ...}}, got {entry!r}")
    name = entry.get("name")
    where = f"{where} ({name})" if name else where
    format_name = entry.get("format")
    if format_name not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise ValueError(
            f"{where} needs a format, one of {known}, got {format_name!r}.{did_you_mean(str(format_name), _FIELDS)}"
        )
    _require_known_fields(entry, _FIELDS[format_name], where)
    required = ("name", "images", "annotations") if format_name == "coco" else ("name", "classes")
    _require_fields(entry, required, where)
    if format_name == "voc" and "root" not in entry:
        _require_fields(entry, ("images", "annotations"), where, "without root, ")
    _require_texts(entry, where)
    classes = _require_classes(entry["classes"], where) if "classes" in entry else None
    return {**entry, "classes": classes}


def _require_known_fields(entry: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for field in entry:
        if field not in fields:
            synonym = f" Did you mean {_SYNONYMS[field]!r}?" if _SYNONYMS.get(field) in fields else ""
            raise ValueError(
                f"{where} has an unknown field {field!r}.{synonym or did_you_mean(str(field), fields)} "
                f"Fields of format {entry['format']}: {', '.join(fields)}."
            )


def _require_fields(entry: Mapping[str, Any], fields: Sequence[str], where: str, condition: str = "") -> None:
    missing = [field for field in fields if field not in entry]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(map(repr, missing))}: {condition}format {entry['format']} needs "
            f"{', '.join(fields)}; it has {', '.join(map(str, entry))}."
        )


def _require_texts(entry: Mapping[str, Any], where: str) -> None:
    for field in ("name", "root", "images", "annotations", "split"):
        if field in entry and (not isinstance(entry[field], str) or not entry[field]):
            raise TypeError(f"{where}: {field} must be text, got {entry[field]!r}; put it in quotes")
    evaluator = entry.get("evaluator", "coco")
    if evaluator not in _EVALUATORS:
        raise ValueError(f"{where}: evaluator must be one of {', '.join(_EVALUATORS)}, got {evaluator!r}")


def _require_classes(classes: Any, where: str) -> tuple[str, ...]:
    if not isinstance(classes, list | tuple) or not classes:
        raise TypeError(f"{where}: classes must be a list of names, at least one, got {classes!r}")
    for name in classes:
        if not isinstance(name, str):
            # YAML reads yes, no, on and off as truth values, and 1 as a number.
            raise TypeError(f"{where}: class names must be text, got {name!r}; put it in quotes")
    repeated = sorted({name for name in classes if list(classes).count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: classes repeats {', '.join(repeated)}")
    return tuple(classes)


def _register(entry: dict[str, Any]) -> None:
    name, classes = entry["name"], entry["classes"]
    if entry["format"] == "coco":
        loader = functools.partial(_load_coco, name, entry["images"], entry["annotations"], classes)
        lazy = {"json_file": entry["annotations"], "image_root": entry["images"]}
    else:
        paths = {field: entry.get(field) for field in ("root", "images", "annotations", "split")}
        loader = functools.partial(_load_voc, classes=classes, **paths)
        lazy = {"dirname": entry["root"]} if "root" in entry else {}
    DatasetCatalog.register(name, loader)
    metadata = MetadataCatalog.get(name)
    metadata.set_lazy(**{key: functools.partial(_located, path) for key, path in lazy.items()})
    if "evaluator" in entry:
        metadata.set(evaluator_type=entry["evaluator"])
    if classes is not None:
        metadata.set(thing_classes=list(classes), thing_colors=class_colors(len(classes)))
    if entry.get("split"):
        metadata.set(split=Path(entry["split"]).stem)


def _located(path: str) -> str:
    # The root is asked at the moment of use, so that $DETKIT_DATASETS may be set after the config was read.
    return str(dataset_root() / Path(path).expanduser())


def _load_coco(name: str, images: str, annotations: str, classes: tuple[str, ...] | None) -> list[ImageRecord]:
    return load_coco_json(_located(annotations), _located(images), name, classes=classes)


def _load_voc(
    *, root: str | None, images: str | None, annotations: str | None, split: str | None, classes: tuple[str, ...]
) -> list[ImageRecord]:
    images = _located(images) if images else str(Path(_located(root or "")) / "JPEGImages")
    annotations = _located(annotations) if annotations else str(Path(_located(root or "")) / "Annotations")
    base = Path(_located(root)) if root else Path(annotations).parent
    return load_voc_folders(images, annotations, classes, split_file=_split_file(split, base))


def _split_file(split: str | None, base: Path) -> str | None:
    if split is None:
        return None
    # By its ending, not by what exists: a folder `train` beside the YAML file says nothing about the split `train`.
    if split.endswith(".txt"):
        return _located(split)
    return str(base / "ImageSets" / "Main" / f"{Path(split).name}.txt")
