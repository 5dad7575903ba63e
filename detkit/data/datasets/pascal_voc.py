"""Data sets in Pascal VOC's format: a folder of images, and one XML file per image with its objects.

    ROOT/JPEGImages/IMAGE.jpg   ROOT/Annotations/IMAGE.xml   ROOT/ImageSets/Main/SPLIT.txt (one
    IMAGE per line)

Pixels are counted from 1 in these files, and a box includes its last column and row: `(xmin - 1,
ymin - 1, xmax, ymax)` is the same box in continuous coordinates, as in Detectron2.

Legend: K classes.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, cast
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import VOC_CLASSES
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord
from detkit.utils.colormap import class_colors
from detkit.utils.file_io import PathManager
from detkit.utils.image import read_image_size
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def register_pascal_voc(
    name: str, dirname: str, split: str, year: int | str, class_names: Sequence[str] | None = None
) -> None:
    """Register a data set that has VOC's three folders. Registering the same one again does nothing.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        dirname: The folder that holds JPEGImages, Annotations and ImageSets.
        split: Name of a file in ImageSets/Main, without `.txt`.
        year: 2007 or 2012: which average precision the VOC evaluator computes.
        class_names: In the order of their ids; None for VOC's own 20.

    Raises:
        ValueError: The name already means another data set.
    """
    dirname = os.fspath(dirname)
    class_names = _require_class_names(VOC_CLASSES if class_names is None else class_names, name)
    DatasetCatalog.register(
        name, functools.partial(load_voc_instances, dirname, split, class_names)
    )
    note_voc_metadata(name, class_names).set(dirname=dirname, year=int(year), split=split)


def note_voc_metadata(name: str, class_names: Sequence[str]) -> Any:
    """Note classes and colours of a data set, and give its metadata."""
    metadata = MetadataCatalog.get(name).set(thing_classes=list(class_names))
    if metadata.get("thing_colors") is None:
        metadata.set(thing_colors=class_colors(len(class_names)))
    return metadata


def load_voc_instances(dirname: str, split: str, class_names: Sequence[str]) -> list[ImageRecord]:
    """Read one split of a data set that has VOC's three folders.

    Args:
        dirname: The folder that holds JPEGImages, Annotations and ImageSets.
        split: Name of a file in ImageSets/Main, without `.txt`.
        class_names: In the order of their ids.

    Raises:
        FileNotFoundError, ValueError: As `load_voc_folders`.
    """
    join = os.path.join
    return load_voc_folders(
        join(dirname, "JPEGImages"),
        join(dirname, "Annotations"),
        class_names,
        split_file=join(dirname, "ImageSets", "Main", f"{split}.txt"),
    )


def load_voc_folders(
    images: str, annotations: str, class_names: Sequence[str], *, split_file: str | None = None
) -> list[ImageRecord]:
    """Read a folder of images and a folder of XML files.

    Args:
        images: Folder of the images: for each XML file one of the same name, `.jpg`, `.png` or
            another usual suffix.
        annotations: Folder of the XML files. One without `<object>` is an image of background; one
            without `<size>` (or with a size of 0, as some tools write) gets the size of its image.
        class_names: In the order of their ids.
        split_file: Text file with one name per line, without suffix; None reads every XML file, in
            the order of names.

    Returns:
        The images in the order of the split. `category_id` is in [0, K); difficult objects are
        included and marked.

    Raises:
        FileNotFoundError: A folder, the split, an XML file or an image is not there.
        ValueError: An XML file is damaged or declares entities, a box is no box, or objects have
            classes that are not in `class_names`; the last lists all classes expected and found.
    """
    class_names = _require_class_names(class_names, annotations)
    names = _names_in_folder(annotations) if split_file is None else _names_in_split(split_file)
    image_of = _images_by_name(images)
    _require_images(names, image_of, images, annotations)
    roots = {
        name: _parse_xml(os.path.join(annotations, f"{name}.xml"), split_file) for name in names
    }
    _require_known_classes(roots, class_names, annotations)
    ids = {class_name: index for index, class_name in enumerate(class_names)}
    records = [
        _record(name, image_of[name], root, ids, annotations) for name, root in roots.items()
    ]
    logger.info("loaded %d images in Pascal VOC format from %s", len(records), annotations)
    return records


def _require_class_names(class_names: Sequence[str], where: str) -> tuple[str, ...]:
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names of {where} must be a list of names, got {class_names!r}")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated or not class_names:
        raise ValueError(
            f"class_names of {where} must be different names, at least one; repeated: {repeated}"
        )
    return tuple(class_names)


def _listing(folder: str, what: str) -> list[str]:
    if not PathManager.isdir(folder):
        raise FileNotFoundError(f"folder {folder} of {what} does not exist")
    return PathManager.ls(folder)


def _names_in_folder(annotations: str) -> list[str]:
    names = sorted(
        PurePath(entry).stem
        for entry in _listing(annotations, "annotations")
        if entry.endswith(".xml")
    )
    if not names:
        raise FileNotFoundError(f"folder {annotations} of annotations holds no .xml file")
    return names


def _names_in_split(split_file: str) -> list[str]:
    try:
        lines = (
            Path(PathManager.get_local_path(split_file)).read_text(encoding="utf-8").splitlines()
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"split file {split_file} does not exist{_other_splits(split_file)}"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"split file {split_file} lists images more than once: {_listed(repeated)}"
        )
    outside = [name for name in names if ".." in name or PurePath(name).is_absolute()]
    if outside:
        raise ValueError(
            f"split file {split_file} must list names inside the image folder, it has"
            f" {_listed(outside)}"
        )
    if names and all(
        len(name.split()) == 2 and name.split()[1] in ("-1", "0", "1") for name in names
    ):
        raise ValueError(
            f"split file {split_file} must list one image per line; {names[0]!r} looks like VOC's"
            " list for one class"
        )
    return names


def _other_splits(split_file: str) -> str:
    folder, file = os.path.split(split_file)
    if not PathManager.isdir(folder):
        return f", nor does its folder {folder}"
    found = sorted(
        PurePath(entry).stem for entry in PathManager.ls(folder) if entry.endswith(".txt")
    )
    return (
        f". Splits there: {', '.join(found) or 'none'}.{did_you_mean(PurePath(file).stem, found)}"
    )


def _images_by_name(images: str) -> dict[str, str]:
    """Name without suffix -> path. One listing instead of a look for each image and suffix."""
    found: dict[str, str] = {}
    for entry in sorted(_listing(images, "images")):
        path = PurePath(entry)
        if path.suffix.lower() in _IMAGE_SUFFIXES:
            found.setdefault(path.stem, os.path.join(images, entry))
    return found


def _require_images(
    names: Sequence[str], image_of: dict[str, str], images: str, annotations: str
) -> None:
    missing = [name for name in names if name not in image_of]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images annotated in {annotations} are not in {images}:"
            f" {_listed(missing)}; looked for names ending in {', '.join(_IMAGE_SUFFIXES)}"
        )


def _parse_xml(path: str, split_file: str | None) -> Element:
    try:
        data = Path(PathManager.get_local_path(path)).read_bytes()
    except FileNotFoundError as error:
        named_in = f", though {split_file} lists it" if split_file else ""
        raise FileNotFoundError(f"annotation file {path} does not exist{named_in}") from error
    return parse_xml_without_entities(data, path)


def parse_xml_without_entities(data: bytes, path: str) -> Element:
    """Parse XML, refusing document type declarations.

    Entities that stand for entities blow a kilobyte up to gigabytes, and external ones read files.
    Both can only be declared in a document type declaration, which no annotation needs, so expat
    stops at its very start: whatever the encoding, and without a further dependency.

    Raises:
        ValueError: It does not parse, or has such a declaration. The message names `path`.
    """
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse_doctype(path)
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, LookupError, ValueError) as error:  # the latter two over encodings
        if isinstance(error, _DoctypeError):
            raise
        raise ValueError(f"annotation file {path} is not valid XML: {error}") from error
    return builder.close()


class _DoctypeError(ValueError):
    pass


def _refuse_doctype(path: str) -> Callable[..., None]:
    def refuse(*_: Any) -> None:
        raise _DoctypeError(
            f"annotation file {path} has a document type declaration (<!DOCTYPE ...>), which is"
            " refused"
        )

    return refuse


def _require_known_classes(
    roots: dict[str, Element], class_names: Sequence[str], annotations: str
) -> None:
    found: Counter[str] = Counter()
    first_file: dict[str, str] = {}
    for name, root in roots.items():
        for obj in root.findall("object"):
            class_name = _text(obj, "name", os.path.join(annotations, f"{name}.xml"))
            found[class_name] += 1
            first_file.setdefault(class_name, name)
    unknown = [class_name for class_name in found if class_name not in class_names]
    if unknown:
        counts = ", ".join(
            f"{n!r} ({found[n]} objects, first in {first_file[n]}.xml)" for n in unknown
        )
        raise ValueError(
            f"{annotations} has objects of unknown classes:"
            f" {counts}.{did_you_mean(unknown[0], class_names)} Expected classes:"
            f" {', '.join(class_names)}. Found: {', '.join(sorted(found))}."
        )


def _record(
    name: str, image_file: str, root: Element, ids: dict[str, int], annotations: str
) -> ImageRecord:
    path = os.path.join(annotations, f"{name}.xml")
    height, width = _image_size(root, path, image_file)
    objects = [
        _annotation(obj, number, ids, path)
        for number, obj in enumerate(root.findall("object"), start=1)
    ]
    return {
        "file_name": image_file,
        "image_id": name,
        "height": height,
        "width": width,
        "annotations": objects,
    }


def _image_size(root: Element, path: str, image_file: str) -> tuple[int, int]:
    size = root.find("size")
    if size is not None:
        height, width = _number(size, "height", path), _number(size, "width", path)
        if height >= 1 and width >= 1:
            return int(height), int(width)
    logger.debug("%s gives no size, taking it from %s", path, image_file)
    return read_image_size(image_file)


def _annotation(obj: Element, number: int, ids: dict[str, int], path: str) -> AnnotationRecord:
    where = f"object {number} of {path}"
    box = obj.find("bndbox")
    if box is None:
        raise ValueError(f"{where} has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax"))
    record: dict[str, Any] = {
        "bbox": [xmin - 1.0, ymin - 1.0, xmax, ymax],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[_text(obj, "name", where)],
        "iscrowd": 0,
    }
    if obj.find("difficult") is not None:
        record["difficult"] = int(_number(obj, "difficult", where))
    return cast(AnnotationRecord, record)


def _text(parent: Element, tag: str, where: str) -> str:
    text = (parent.findtext(tag) or "").strip()
    if not text:
        raise ValueError(f"{where} has a <{parent.tag}> without <{tag}>")
    return text


def _number(parent: Element, tag: str, where: str) -> float:
    text = _text(parent, tag, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where} has <{tag}>{text}</{tag}>, need a number")
    return value


def _listed(values: Sequence[str], limit: int = 10) -> str:
    more = f", ... ({len(values)} in all)" if len(values) > limit else ""
    return ", ".join(map(repr, values[:limit])) + more
