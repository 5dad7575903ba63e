"""What format a folder or a file is in, for `format: auto` and `detkit convert-dataset`."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from detkit.data.datasets.formats.hugging_face import METADATA
from detkit.data.datasets.formats.yolo import read_data_yaml, splits_of
from detkit.data.datasets.pascal_voc import parse_xml_without_entities
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import files_below, read_file, read_text
from detkit.utils.image_file import IMAGE_SUFFIXES

Entries = dict[str, dict[str, Any]]

_FILE_NAME = re.compile(rb'"file_name"\s*:\s*"([^"\\]+)"')
_OPEN_IMAGES = b"ImageID,Source,LabelName"
CLASSES = "classes.txt"
"""A file of class names in the order of their ids, which labelImg and `write_dataset` write."""


def detect_dataset(path: str) -> Entries:
    """Return the data sets in a folder or a file: name of the split -> entry for DATASETS.REGISTER.

    Entries have absolute paths, and no `name`. What is in several formats is taken in the order
    YOLO, labelme, COCO, VOC, CVAT, Hugging Face, Open Images and CSV.

    Raises:
        MissingFileError: There is no such folder or file.
        DataError: Its format is none of these.
    """
    place = Path(os.path.abspath(path))  # noqa: PTH100 - keeps links
    if not place.exists():
        raise MissingFileError(f"data set {path} does not exist")
    if place.is_file():
        root, files = place.parent, [place]
    else:
        root = place
        # In folders of the folder, too, such as Roboflow's train/_annotations.coco.json.
        files = sorted(f for pattern in ("*", "*/*") for f in place.glob(pattern) if f.is_file())
    for detect in _DETECTORS:
        found = detect(root, files)
        if found:
            return found
    raise DataError(
        f"{path} is in no known format; looked for a data.yaml or classes.txt (YOLO), .json (COCO:"
        " with categories, and images with file_name; labelme),"
        f" .xml (VOC, CVAT), {METADATA} or .parquet (Hugging Face), .csv"
    )


def _yolo(root: Path, files: list[Path]) -> Entries:
    for file in files:
        if file.suffix in (".yaml", ".yml"):
            try:
                content = read_data_yaml(str(file))
            except DataError:  # a YAML file of something else, with tags of its own
                continue
            splits = splits_of(content, str(file))
            if splits and "names" in content:
                return {s: {"format": "yolo", "data": str(file), "split": s} for s in splits}
    classes = root / CLASSES
    if classes in files and (root / "images").is_dir() and (root / "labels").is_dir():
        entry = {"format": "yolo", "images": str(root / "images"), "classes": _lines(classes)}
        return {root.name: {**entry, "annotations": str(root / "labels")}}
    return {}


def _coco(root: Path, files: list[Path]) -> Entries:
    entries: Entries = {}
    for file in files:
        if file.suffix != ".json":
            continue
        data = read_file(str(file), "annotation file")
        named = _FILE_NAME.search(data)
        if not named or b'"categories"' not in data or b'"segments_info"' in data:
            continue
        part = file.stem.rpartition("_")[2]  # instances_train2017 is about the folder train2017
        above = root if root != file.parent else root.parent
        places = [base / name for base in (root, above) for name in (file.stem, part)]
        places += [base / "images" / name for base in (root, above) for name in (file.stem, part)]
        places += [file.parent, *(base / "images" for base in (file.parent, root, above)), root]
        image = named[1].decode(errors="replace")
        images = next((place for place in places if (place / image).is_file()), None)
        if images is None:
            raise MissingFileError(
                f"{file} names the image {image}, which is in none of"
                f" {', '.join(dict.fromkeys(map(str, places)))}. Declare the data set with its"
                " `images` in a config (DATASETS.REGISTER, format: coco)"
            )
        split = file.parent.name if file.name.startswith("_annotations") else file.stem
        entries[split] = {"format": "coco", "images": str(images), "annotations": str(file)}
    return entries


def _voc(root: Path, files: list[Path]) -> Entries:
    folder = root / "Annotations"
    if folder.is_dir() and (root / "JPEGImages").is_dir():
        entry = {"format": "voc", "root": str(root), "classes": _voc_classes(root, folder)}
        lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
        # VOC has lists for single classes beside those of splits.
        splits = [
            file for file in lists if not re.search(r"_(train|val|trainval|test)$", file.stem)
        ]
        return {file.stem: {**entry, "split": str(file)} for file in splits} or {root.name: entry}
    entries: Entries = {}
    for folder in sorted({file.parent for file in files if file.suffix == ".xml"}):
        first = next(file for file in files if file.parent == folder and file.suffix == ".xml")
        if _xml(first).tag == "annotation":
            classes = _voc_classes(root, root)  # the same for all splits
            places = [folder, folder.parent / "images"]
            images = next((p for p in places if _has_images(p)), folder)
            entry = {"images": str(images), "annotations": str(folder), "classes": classes}
            entries[folder.name] = {"format": "voc", **entry}
    return entries


def _voc_classes(root: Path, folder: Path) -> list[str]:
    if (root / CLASSES).is_file():
        return _lines(root / CLASSES)
    below = files_below(str(folder), [".xml"], "annotations")
    roots = (_xml(folder / name) for names in below.values() for name in names)
    return sorted({(obj.findtext("name") or "").strip() for r in roots for obj in r.iter("object")})


def _cvat(root: Path, files: list[Path]) -> Entries:
    for file in files:
        if file.suffix == ".xml" and _xml(file).tag == "annotations":
            images = file.parent / "images"
            images = images if images.is_dir() else file.parent
            return {file.stem: {"format": "cvat", "images": str(images), "annotations": str(file)}}
    return {}


def _labelme(root: Path, files: list[Path]) -> Entries:
    first = next((file for file in files if file.suffix == ".json"), None)
    if first is None or b'"imagePath"' not in read_file(str(first), "annotation file"):
        return {}
    return {root.name: {"format": "labelme", "annotations": str(root)}}


def _hugging_face(root: Path, files: list[Path]) -> Entries:
    entry = {"format": "hugging_face", "root": str(root)}
    folders = [file.parent for file in files if file.name == METADATA]
    if folders:
        return {f.name: entry if f == root else {**entry, "split": f.name} for f in folders}
    # Shards are called train-00000-of-00002.parquet.
    parquet = {file.stem.partition("-")[0]: file for file in files if file.suffix == ".parquet"}
    return {split: {**entry, "split": split} for split in parquet}


def _csv(root: Path, files: list[Path]) -> Entries:
    entries: Entries = {}
    tables = [file for file in files if file.suffix == ".csv"]
    starts = {file: read_file(str(file), "annotation file")[:1000] for file in tables}
    named = next((f for f in tables if f.name.startswith(("class-desc", "oidv"))), None)
    for file in tables:
        images = next((p for p in (file.parent / "images", root / "images") if p.is_dir()), None)
        entry = {"images": str(images or file.parent), "annotations": str(file)}
        if starts[file].startswith(_OPEN_IMAGES):
            descriptions = {"descriptions": str(named)} if named not in (None, file) else {}
            entries[file.stem] = {"format": "open_images", **entry, **descriptions}
        elif file != named and re.search(rb"(?i)x_?min|x_?1|\bx\b|left", starts[file]):
            entries[file.stem] = {"format": "csv", **entry}
    return entries


def _xml(file: Path) -> Element:
    return parse_xml_without_entities(read_file(str(file), "annotation file"), str(file))


def _lines(file: Path) -> list[str]:
    lines = read_text(str(file), "class names").splitlines()
    return [line.strip() for line in lines if line.strip()]


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(f.suffix.lower() in IMAGE_SUFFIXES for f in folder.iterdir())


_DETECTORS: list[Callable[[Path, list[Path]], Entries]] = [
    # labelme before COCO: its first file tells, and there may be ten thousand.
    _yolo, _labelme, _coco, _voc, _cvat, _hugging_face, _csv,
]  # fmt: skip
