"""Data sets declared in YAML, under `DATASETS.REGISTER`: no Python needed.

    DATASETS:
      REGISTER:
        - {name: cells_train, format: coco, images: cells/images, annotations: cells/train.json}
        - {name: blood_train, format: voc, root: bccd, split: train, classes: [RBC, WBC, Platelets]}
        - {name: signs, format: voc, images: signs/photos, annotations: signs/xml, classes: [stop,
          yield]}

Fields of all formats:
    name         as in DATASETS.TRAIN and DATASETS.TEST. format       coco, voc, lvis, sem_seg or
    coco_panoptic. classes      names in the order of their ids. voc, sem_seg: required. coco:
    optional, picks and orders categories. images       the folder of images; file names in a JSON
    are relative to it. evaluator    optional: coco, pascal_voc, lvis, sem_seg or coco_panoptic_seg,
    the protocol to evaluate with. Without
                 it, that of the format; coco for coco and voc.
Fields of coco:
    annotations  the JSON file. keypoints    optional: names of the keypoints, where the JSON does
    not name them in its category. flip_pairs   optional: pairs of names that a mirror exchanges.
    Without it, those that differ in left and right. drop_bad_polygons
                 optional: true leaves polygons of fewer than three points out, with a count;
                 otherwise they are an error.
Fields of voc:
    root         a folder with VOC's own layout: JPEGImages, Annotations, ImageSets/Main. images
    the folder of images, where it is not ROOT/JPEGImages. annotations  the folder of XML files,
    where it is not ROOT/Annotations. Without root, both are needed. split        which images: a
    text file with one name per line (it ends in .txt), or the name of one in
                 ImageSets/Main, of the root or beside the folder of annotations. Without it, every
                 XML file.
Fields of lvis:
    annotations  the JSON file. Images are looked for below `images` by the last two parts of their
    coco_url.
Fields of sem_seg:
    labels       the folder of label maps, png with the names of the images, whose pixels count
    `classes` from 0. image_ending optional: that of the images, jpg without it. ignore_label
    optional: the pixels that are not evaluated, 255 without it.
Fields of coco_panoptic:
    annotations  the panoptic JSON. segments     the folder of its png. instances    optional, to
    train instances and stuff apart as Panoptic FPN does: a COCO JSON of the things. labels
    needed with instances: label maps of stuff, 0 for all things, then the stuff in the order of its
    ids.

A path is absolute, or relative to the YAML file where it exists there, or else relative to
`$DETKIT_DATASETS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detkit.data.datasets.declared_formats import register_declared
from detkit.utils.near_miss import did_you_mean

_FIELDS = {
    "coco": (
        "name",
        "format",
        "images",
        "annotations",
        "classes",
        "keypoints",
        "flip_pairs",
        "drop_bad_polygons",
        "evaluator",
    ),
    "voc": ("name", "format", "root", "images", "annotations", "split", "classes", "evaluator"),
    "lvis": ("name", "format", "images", "annotations", "evaluator"),
    "sem_seg": (
        "name",
        "format",
        "images",
        "labels",
        "classes",
        "image_ending",
        "ignore_label",
        "evaluator",
    ),
    "coco_panoptic": (
        "name",
        "format",
        "images",
        "annotations",
        "segments",
        "instances",
        "labels",
        "evaluator",
    ),
}
_REQUIRED = {
    "coco": ("name", "images", "annotations"),
    "voc": ("name", "classes"),
    "lvis": ("name", "images", "annotations"),
    "sem_seg": ("name", "images", "labels", "classes"),
    "coco_panoptic": ("name", "images", "annotations", "segments"),
}
_TEXTS = (
    "name",
    "root",
    "images",
    "annotations",
    "split",
    "labels",
    "segments",
    "instances",
    "image_ending",
)
_EVALUATORS = ("coco", "pascal_voc", "lvis", "sem_seg", "coco_panoptic_seg")
# Fields that other frameworks and formats use for the same thing.
_SYNONYMS = {
    "image_root": "images",
    "json_file": "annotations",
    "dirname": "root",
    "class_names": "classes",
    "keypoint_names": "keypoints",
    "keypoint_flip_map": "flip_pairs",
    "sem_seg_root": "labels",
    "gt_root": "labels",
    "stuff_classes": "classes",
    "panoptic_json": "annotations",
    "panoptic_root": "segments",
    "instances_json": "instances",
}


def register_declared_datasets(entries: Sequence[Mapping[str, Any]]) -> None:
    """Register the data sets that a config declares. Doing it again with the same entries does nothing.

    Args:
        entries: The value of `DATASETS.REGISTER`. Nothing is read before a data set is used.

    Raises:
        TypeError, ValueError: An entry is wrong; the message names it and the field. No data set of
        the list is
            registered then.
    """
    checked = [
        _checked(entry, f"DATASETS.REGISTER[{index}]") for index, entry in enumerate(entries)
    ]
    for entry in checked:
        register_declared(entry)


def _checked(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{where} must be a mapping such as {{name: ..., format: coco, ...}}, got {entry!r}"
        )
    name = entry.get("name")
    where = f"{where} ({name})" if name else where
    format_name = entry.get("format")
    if format_name not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise ValueError(
            f"{where} needs a format, one of {known}, got"
            f" {format_name!r}.{did_you_mean(str(format_name), _FIELDS)}"
        )
    _require_known_fields(entry, _FIELDS[format_name], where)
    _require_fields(entry, _REQUIRED[format_name], where)
    if format_name == "voc" and "root" not in entry:
        _require_fields(entry, ("images", "annotations"), where, "without root, ")
    if "instances" in entry or (format_name == "coco_panoptic" and "labels" in entry):
        _require_fields(
            entry, ("instances", "labels"), where, "to train instances and stuff apart, "
        )
    _require_texts(entry, where)
    classes = (
        _require_names(entry["classes"], "class", "classes", where) if "classes" in entry else None
    )
    if "keypoints" in entry:
        _require_names(entry["keypoints"], "keypoint", "keypoints", where)
    _require_pairs(entry, where)
    if not isinstance(entry.get("drop_bad_polygons", False), bool):
        raise TypeError(
            f"{where}: drop_bad_polygons must be true or false, got {entry['drop_bad_polygons']!r}"
        )
    label = entry.get("ignore_label", 0)
    if isinstance(label, bool) or not isinstance(label, int):
        raise TypeError(f"{where}: ignore_label must be a number, got {label!r}")
    return {**entry, "classes": classes}


def _require_pairs(entry: Mapping[str, Any], where: str) -> None:
    if "flip_pairs" not in entry:
        return
    pairs, names = entry["flip_pairs"], entry.get("keypoints")
    if names is None:
        raise ValueError(f"{where}: flip_pairs exchanges `keypoints`, which must be named as well")
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(p, list | tuple) and len(p) == 2 for p in pairs
    ):
        raise TypeError(f"{where}: flip_pairs must be a list of pairs of keypoints, got {pairs!r}")
    stray = sorted({str(name) for pair in pairs for name in pair if name not in names})
    if stray:
        raise ValueError(
            f"{where}: flip_pairs names {', '.join(stray)}, which is not among keypoints:"
            f" {', '.join(names)}"
        )


def _require_known_fields(entry: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    for field in entry:
        if field not in fields:
            synonym = (
                f" Did you mean {_SYNONYMS[field]!r}?" if _SYNONYMS.get(field) in fields else ""
            )
            raise ValueError(
                f"{where} has an unknown field"
                f" {field!r}.{synonym or did_you_mean(str(field), fields)} Fields of format"
                f" {entry['format']}: {', '.join(fields)}."
            )


def _require_fields(
    entry: Mapping[str, Any], fields: Sequence[str], where: str, condition: str = ""
) -> None:
    missing = [field for field in fields if field not in entry]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(map(repr, missing))}: {condition}format {entry['format']}"
            f" needs {', '.join(fields)}; it has {', '.join(map(str, entry))}."
        )


def _require_texts(entry: Mapping[str, Any], where: str) -> None:
    for field in _TEXTS:
        if field in entry and (not isinstance(entry[field], str) or not entry[field]):
            raise TypeError(
                f"{where}: {field} must be text, got {entry[field]!r}; put it in quotes"
            )
    evaluator = entry.get("evaluator", "coco")
    if evaluator not in _EVALUATORS:
        raise ValueError(
            f"{where}: evaluator must be one of {', '.join(_EVALUATORS)}, got {evaluator!r}"
        )


def _require_names(names: Any, kind: str, field: str, where: str) -> tuple[str, ...]:
    if not isinstance(names, list | tuple) or not names:
        raise TypeError(f"{where}: {field} must be a list of names, at least one, got {names!r}")
    for name in names:
        if not isinstance(name, str):
            # YAML reads yes, no, on and off as truth values, and 1 as a number.
            raise TypeError(f"{where}: {kind} names must be text, got {name!r}; put it in quotes")
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ValueError(f"{where}: {field} repeats {', '.join(repeated)}")
    return tuple(names)
