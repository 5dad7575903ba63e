"""Data sets declared in YAML, under `DATASETS.REGISTER`: no Python needed.

    DATASETS:
      REGISTER:
        - {name: cells_train, format: coco, images: cells/images, annotations: cells/train.json}
        - {name: blood_train, format: voc, root: bccd, split: train, classes: [RBC, WBC, Platelets]}
        - {name: signs, format: voc, images: signs/photos, annotations: signs/xml, classes: [stop]}

Fields of all formats:
    name          as in DATASETS.TRAIN and DATASETS.TEST
    format        coco, voc, yolo, csv, labelme, cvat, open_images, hugging_face, dota, yolo_obb,
                  lvis, sem_seg, coco_panoptic, or auto
    images        the folder of images; file names in a JSON file are relative to it
    evaluator     optional: the protocol to evaluate with, one of coco, pascal_voc, lvis, sem_seg or
                  coco_panoptic_seg; without it, that of the format: coco for coco and voc
Fields of coco:
    annotations   the JSON file
    classes       optional: names in the order of their ids; picks and orders categories, of which
                  the file may lack some
    keypoints     optional: names of the keypoints, if the JSON file does not name them
    flip_pairs    optional: pairs of names that a mirror exchanges; without it, those that differ
                  in left and right
    drop_bad_polygons
                  optional: true drops polygons and run lengths that cannot be used, with a count,
                  and keeps the boxes; otherwise they are an error
Fields of voc:
    classes       names in the order of their ids
    root          a folder with VOC's own layout: JPEGImages, Annotations, ImageSets/Main
    images        the folder of images, if it is not ROOT/JPEGImages
    annotations   the folder of XML files, if it is not ROOT/Annotations; without root, both are
                  required
    split         optional: which images, as a text file with one name per line (it ends in .txt),
                  or the name of one in ImageSets/Main, of the root or beside the folder of
                  annotations; without it, every XML file
Fields of dota and yolo_obb:
    annotations   the folder of text files, one per image, with the corners of rotated boxes
    classes       names in the order of their ids
Fields of yolo, csv, labelme, cvat, open_images, hugging_face and auto:
    classes       optional, as for coco; required for yolo without data, and for hugging_face where
                  classes are numbers
Fields of yolo:
    data          the data.yaml; without it, images and classes are required
    split         optional: train, val or test, train without it
    annotations   optional, without data: the folder of text files, beside that of the images
Fields of csv:
    annotations   the table, a box per row
    columns       optional: meaning (image, label, xmin, ymin, xmax, ymax, or width and height,
                  crowd, difficult) -> name of the column, where it is not usual; a list of meanings
                  if the first line has no names
    normalized    optional: true if coordinates are shares of the image's sides
    descriptions  optional: a table of two columns, a class and what to call it
Fields of open_images:
    annotations   *-annotations-bbox.csv
    descriptions  optional: class-descriptions.csv
Fields of labelme:
    annotations   the folder of JSON files
    images        optional: the folder of images, if they are not where the files say
Fields of cvat:
    annotations   the XML file, exported as "CVAT for images"
Fields of hugging_face:
    root          a folder with metadata.jsonl and images, or with parquet files (needs pyarrow)
    split         optional: a folder in root, or the start of the names of parquet files
Fields of auto:
    root          the folder or file; what was found is logged
    split         required if there are several, which an error lists
Fields of lvis:
    annotations   the JSON file; images are found below `images` by the last two parts of their
                  coco_url
Fields of sem_seg:
    labels        the folder of label maps, png with the names of the images
    classes       names in the order of the labels, which count from 0
    image_ending  optional: that of the images, jpg without it
    ignore_label  optional: label of the pixels that are not evaluated, 255 without it
Fields of coco_panoptic:
    annotations   the panoptic JSON file
    segments      the folder of its png
    instances     optional, to train instances and stuff apart as Panoptic FPN does: a COCO JSON
                  file of the things
    labels        required with instances: label maps of stuff, 0 for all things, then the stuff in
                  the order of its ids

A path is absolute, or relative to the YAML file if it exists there, or else relative to
`$DETKIT_DATASETS`. `images` and `annotations` of coco and cvat, and `images` of lvis and
coco_panoptic, may be addresses: see `detkit.utils.remote_files`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from detkit.data.datasets.declared_formats import FORMATS, register_declared
from detkit.data.datasets.formats.table import COLUMNS
from detkit.utils.errors import ConfigError
from detkit.utils.remote_files import is_address
from detkit.utils.text import did_you_mean

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
    "data",
    "descriptions",
)
_EVALUATORS = ("coco", "pascal_voc", "lvis", "sem_seg", "coco_panoptic_seg")
# Names that other frameworks and formats have for the same fields.
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


class EntryTypeError(ConfigError, TypeError):
    """A field of a declared data set whose value has the wrong type."""


def register_declared_datasets(entries: Sequence[Mapping[str, Any]]) -> None:
    """Register the data sets that a config declares. Doing it again has no effect.

    Args:
        entries: The value of `DATASETS.REGISTER`. Nothing is read before a data set is used.

    Raises:
        ConfigError: An entry is wrong; the message names it and the field. No data set of the list
            is registered then.
        EntryTypeError: A value has the wrong type; likewise.

    Example:
        >>> from detkit.data import DatasetCatalog
        >>> entry = {"name": "my_signs", "format": "coco", "images": "img", "annotations": "a.json"}
        >>> register_declared_datasets([entry])
        >>> "my_signs" in DatasetCatalog
        True
    """
    checked = [_checked(entry, f"DATASETS.REGISTER[{i}]") for i, entry in enumerate(entries)]
    # Only after all were checked, so that a mistake leaves nothing half registered.
    for entry in checked:
        register_declared(entry)


def _checked(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return an entry with `classes` as a tuple or None."""
    if not isinstance(entry, Mapping):
        raise EntryTypeError(
            f"{where} must be a mapping such as {{name: ..., format: coco, ...}}, got {entry!r}"
        )
    if entry.get("name"):
        where = f"{where} ({entry['name']})"
    _check_fields(entry, where)
    _check_texts(entry, where)
    _check_values(entry, where)
    return {**entry, "classes": tuple(entry["classes"]) if "classes" in entry else None}


def _check_fields(entry: Mapping[str, Any], where: str) -> None:
    """Check that an entry has the fields that its format needs, and no other than it knows."""
    name = entry.get("format")
    if name not in FORMATS:
        raise ConfigError(
            f"{where} needs a format, one of {', '.join(FORMATS)}, got"
            f" {name!r}.{did_you_mean(str(name), FORMATS)}"
        )
    required = ("name", *FORMATS[name].required)
    known = ("name", "format", *FORMATS[name].required, *FORMATS[name].optional)
    for field in entry:
        if field not in known:
            hint = did_you_mean(str(field), known)
            if _SYNONYMS.get(field) in known:
                hint = f" Did you mean {_SYNONYMS[field]!r}?"
            raise ConfigError(
                f"{where} has an unknown field {field!r}.{hint} Fields of format {name}:"
                f" {', '.join(known)}."
            )
    _require_fields(entry, required, where)
    if name == "voc" and "root" not in entry:
        _require_fields(entry, ("images", "annotations"), where, "without root, ")
    if name == "yolo" and "data" not in entry:
        _require_fields(entry, ("images", "classes"), where, "without data, ")
    if name == "coco_panoptic" and ("instances" in entry or "labels" in entry):
        condition = "to train instances and stuff apart, "
        _require_fields(entry, ("instances", "labels"), where, condition)


def _check_texts(entry: Mapping[str, Any], where: str) -> None:
    for field in _TEXTS:
        if field in entry and (not isinstance(entry[field], str) or not entry[field]):
            raise EntryTypeError(
                f"{where}: {field} must be text, got {entry[field]!r}; put it in quotes"
            )
        # With label maps, images are found by a look into their folder.
        may_be_address = field in FORMATS[entry["format"]].remote and "labels" not in entry
        if is_address(str(entry.get(field))) and not may_be_address:
            raise ConfigError(
                f"{where}: {field} must be a local path, got {entry[field]!r}. Addresses are read"
                " where a file names the images: `images` and `annotations` of coco and cvat,"
                " `images` of lvis, and of coco_panoptic without labels; `detkit convert-dataset`"
                " writes coco"
            )


def _check_values(entry: Mapping[str, Any], where: str) -> None:
    """Check the fields that are no plain texts."""
    if entry.get("evaluator", "coco") not in _EVALUATORS:
        raise ConfigError(
            f"{where}: evaluator must be one of {', '.join(_EVALUATORS)}, got"
            f" {entry['evaluator']!r}"
        )
    if "classes" in entry:
        _require_names(entry["classes"], "class", "classes", where)
    if "keypoints" in entry:
        _require_names(entry["keypoints"], "keypoint", "keypoints", where)
    if "flip_pairs" in entry:
        _require_pairs(entry["flip_pairs"], entry.get("keypoints"), where)
    for field in ("drop_bad_polygons", "normalized"):
        if not isinstance(entry.get(field, False), bool):
            raise EntryTypeError(f"{where}: {field} must be true or false, got {entry[field]!r}")
    if "columns" in entry:
        _require_columns(entry["columns"], where)
    label = entry.get("ignore_label", 0)
    if isinstance(label, bool) or not isinstance(label, int):
        raise EntryTypeError(f"{where}: ignore_label must be a number, got {label!r}")


def _require_fields(
    entry: Mapping[str, Any], fields: Sequence[str], where: str, condition: str = ""
) -> None:
    missing = [field for field in fields if field not in entry]
    if missing:
        raise ConfigError(
            f"{where} lacks {', '.join(map(repr, missing))}: {condition}format {entry['format']}"
            f" needs {', '.join(fields)}; it has {', '.join(map(str, entry))}."
        )


def _require_names(names: Any, kind: str, field: str, where: str) -> None:
    if not isinstance(names, list | tuple) or not names:
        raise EntryTypeError(
            f"{where}: {field} must be a list of names, at least one, got {names!r}"
        )
    for name in names:
        if not isinstance(name, str):
            # YAML reads yes, no, on and off as booleans, and 1 as a number.
            raise EntryTypeError(
                f"{where}: {kind} names must be text, got {name!r}; put it in quotes"
            )
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:
        raise ConfigError(f"{where}: {field} repeats {', '.join(repeated)}")


def _require_columns(columns: Any, where: str) -> None:
    if isinstance(columns, Mapping):
        meanings, names = list(columns), list(columns.values())
    elif isinstance(columns, list | tuple):
        meanings, names = [meaning for meaning in columns if meaning != ""], []
    else:
        raise EntryTypeError(
            f"{where}: columns must map meanings to names of columns, or list meanings, got"
            f" {columns!r}"
        )
    stray = [meaning for meaning in meanings if meaning not in COLUMNS]
    if stray:
        hint = did_you_mean(str(stray[0]), COLUMNS)
        raise ConfigError(
            f"{where}: columns has {stray[0]!r}, need some of {', '.join(COLUMNS)}.{hint}"
        )
    if not all(isinstance(name, str) for name in names):
        raise EntryTypeError(f"{where}: names in columns must be text, got {names}; use quotes")


def _require_pairs(pairs: Any, names: Sequence[str] | None, where: str) -> None:
    if names is None:
        raise ConfigError(f"{where}: flip_pairs exchanges `keypoints`, which must be named as well")
    is_list = isinstance(pairs, list | tuple)
    if not is_list or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise EntryTypeError(
            f"{where}: flip_pairs must be a list of pairs of keypoints, got {pairs!r}"
        )
    stray = sorted({str(name) for pair in pairs for name in pair if name not in names})
    if stray:
        raise ConfigError(
            f"{where}: flip_pairs names {', '.join(stray)}, which is not among keypoints:"
            f" {', '.join(names)}"
        )
