"""Data sets in Pascal VOC's format: a folder of images, and one XML file of objects per image.

    ROOT/JPEGImages/IMAGE.jpg
    ROOT/Annotations/IMAGE.xml
    ROOT/ImageSets/Main/SPLIT.txt    one IMAGE per line

Pixels are counted from 1 in these files, and a box includes its last column and row: `(xmin - 1,
ymin - 1, xmax, ymax)` is the same box in continuous coordinates, as in Detectron2.

Legend: K classes.
"""

import functools
import logging
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any, cast
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import VOC_CLASSES
from detkit.data.datasets.faults import collect, is_collecting
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, as_flag
from detkit.utils.colormap import class_colors
from detkit.utils.errors import ConfigError, DataError, MissingFileError
from detkit.utils.file_io import PathManager, files_below, read_file, read_text
from detkit.utils.image import read_image_size
from detkit.utils.image_file import IMAGE_SUFFIXES, BadImageError
from detkit.utils.logger import FILE_ONLY
from detkit.utils.text import did_you_mean, listed

logger = logging.getLogger(__name__)

_EAST_ASIAN = re.compile(
    rb"<\?xml\s[^>]{0,40}?encoding\s*=\s*['\"]"
    rb"((?:gb|big5|shift|sjis|euc|cp9|ms9|ks|iso-2022)[\w.-]{0,20})['\"][^>]{0,40}>",
    re.IGNORECASE,
)


def register_pascal_voc(
    name: str, dirname: str, split: str, year: int | str, class_names: Sequence[str] | None = None
) -> None:
    """Register a data set with VOC's three folders. Registering the same one again has no effect.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        dirname: The folder that holds JPEGImages, Annotations and ImageSets.
        split: Name of a file in ImageSets/Main, without `.txt`.
        year: 2007 or 2012: which average precision the VOC evaluator computes.
        class_names: In the order of their ids; None for VOC's own 20.

    Raises:
        ConfigError: The name is taken by another data set, or class names repeat.
    """
    dirname = os.fspath(dirname)
    class_names = _require_class_names(VOC_CLASSES if class_names is None else class_names, name)
    DatasetCatalog.register(
        name, functools.partial(load_voc_instances, dirname, split, class_names)
    )
    note_voc_metadata(name, class_names).set(dirname=dirname, year=int(year), split=split)


def note_voc_metadata(name: str, class_names: Sequence[str]) -> Any:
    """Set classes and colors of a data set as metadata, and return its metadata."""
    metadata = MetadataCatalog.get(name).set(thing_classes=list(class_names))
    if metadata.get("thing_colors") is None:
        metadata.set(thing_colors=class_colors(len(class_names)))
    return metadata


def load_voc_instances(dirname: str, split: str, class_names: Sequence[str]) -> list[ImageRecord]:
    """Load one split of a data set with VOC's three folders.

    Args:
        dirname: The folder that holds JPEGImages, Annotations and ImageSets.
        split: Name of a file in ImageSets/Main, without `.txt`.
        class_names: In the order of their ids.

    Raises:
        MissingFileError, DataError: See `load_voc_folders`.
    """
    return load_voc_folders(
        os.path.join(dirname, "JPEGImages"),
        os.path.join(dirname, "Annotations"),
        class_names,
        split_file=os.path.join(dirname, "ImageSets", "Main", f"{split}.txt"),
    )


def load_voc_folders(
    images: str, annotations: str, class_names: Sequence[str], *, split_file: str | None = None
) -> list[ImageRecord]:
    """Load a folder of images and a folder of XML files.

    Args:
        images: Folder of the images, with all folders in it: for each XML file one of the same
            name, with the suffix `.jpg`, `.png` or another usual one.
        annotations: Folder of the XML files, with all folders in it. One without `<object>` is an
            image of background; one without `<size>` (or with size 0, as some tools write) gets the
            size of its image.
        class_names: In the order of their ids.
        split_file: Text file with one name per line, with or without suffix; None reads every XML
            file, in the order of names.

    Returns:
        The images in the order of the split. `category_id` is in [0, K); difficult objects are
        included and marked.

    Raises:
        MissingFileError: A folder, the split, an XML file or an image does not exist.
        DataError: An XML file is damaged or declares entities, or a box lacks a number.
        DataError: Two XML files are about one image.
        DataError: Several images have the name of an XML file, and its `<filename>` names none.
        DataError: Objects have classes that are not in `class_names`; the message lists all classes
            expected and found.
    """
    class_names = _require_class_names(class_names, annotations)
    split = None if split_file is None else _split_text(split_file)
    xml_files = files_below(annotations, [".xml"], "annotations")
    image_of = _images_by_name(images)
    if split is None:
        names = list(xml_files)
        if not names:
            raise MissingFileError(f"folder {annotations} of annotations holds no .xml file")
    else:
        names = _names_in_split(split, str(split_file), image_of)
    images_of = _images_of(names, image_of, images, annotations)
    paths, roots = _parsed_files(images_of, xml_files, annotations, split_file)
    try:
        _check_classes(roots, paths, class_names, annotations)
    except DataError as error:
        collect(error, "unknown-class")
        for root in roots.values():
            for obj in root.findall("object"):
                if (obj.findtext("name") or "").strip() not in class_names:
                    root.remove(obj)
    ids = {class_name: index for index, class_name in enumerate(class_names)}
    records, unclear = [], list[str]()
    xml_of: dict[str, str] = {}
    for name, root in roots.items():
        path = paths[name]
        image_file = _image_of(root, images_of[name], path)
        if xml_of.setdefault(image_file, path) != path:
            raise DataError(
                f"{xml_of[image_file]} and {path} are both about {image_file}: move one of them out"
                " of the folder"
            )
        try:
            records.append(_record(name, image_file, root, ids, path, unclear))
        except DataError as error:
            collect(error, "broken-annotation-file", file=image_file)
    if unclear:
        logger.warning(
            "%d objects in %s have a <difficult> that is neither 0 nor 1, and count as not"
            " difficult: %s",
            len(unclear),
            annotations,
            _listed(sorted(set(unclear))),
        )
    unused = sorted({file for files in image_of.values() for file in files} - xml_of.keys())
    if unused and split is None:
        message = "left out of images in %s: %d that are without an .xml file: %s"
        logger.info(message, images, len(unused), listed(unused, 5))
    logger.info(
        "loaded %d images in Pascal VOC format from %s", len(records), annotations, extra=FILE_ONLY
    )
    return records


def _require_class_names(class_names: Sequence[str], where: str) -> tuple[str, ...]:
    if isinstance(class_names, str) or not all(isinstance(name, str) for name in class_names):
        raise TypeError(f"class_names of {where} must be a list of names, got {class_names!r}")
    repeated = [name for name, count in Counter(class_names).items() if count > 1]
    if repeated or not class_names:
        raise ConfigError(
            f"class_names of {where} must be different names, at least one; repeated: {repeated}"
        )
    return tuple(class_names)


def _split_text(split_file: str) -> str:
    try:
        return read_text(split_file, "split file")
    except FileNotFoundError as error:
        raise MissingFileError(
            f"split file {split_file} does not exist{_other_splits(split_file)}"
        ) from error


def _names_in_split(text: str, split_file: str, known: Container[str]) -> list[str]:
    names = []
    for line in text.splitlines():
        name = line.strip().replace("\\", "/").removeprefix("./")
        # Lists of other tools have file names.
        ending = PurePosixPath(name).suffix
        is_file = name not in known and ending.lower() in (*IMAGE_SUFFIXES, ".xml")
        names.append(name.removesuffix(ending) if is_file else name)
    names = [name for name in names if name]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(f"split file {split_file} lists images more than once: {_listed(repeated)}")
    outside = [name for name in names if ".." in name or PurePath(name).is_absolute()]
    if outside:
        raise DataError(
            f"split file {split_file} must list names inside the image folder, it has"
            f" {_listed(outside)}"
        )
    # VOC's lists for one class have `000012 -1` in each line.
    words = [name.split() for name in names]
    if names and all(len(w) == 2 and w[1] in ("-1", "0", "1") for w in words):
        raise DataError(
            f"split file {split_file} must list one image per line; {names[0]!r} looks like VOC's"
            " list for one class"
        )
    return names


def _other_splits(split_file: str) -> str:
    folder, file = os.path.split(split_file)
    if not PathManager.isdir(folder):
        return f", nor does its folder {folder}"
    entries = PathManager.ls(folder)
    found = sorted(PurePath(entry).stem for entry in entries if entry.endswith(".txt"))
    hint = did_you_mean(PurePath(file).stem, found)
    return f". Splits there: {', '.join(found) or 'none'}.{hint}"


def _images_of(
    names: Sequence[str], image_of: Mapping[str, list[str]], images: str, annotations: str
) -> dict[str, list[str]]:
    """Return the images that have the name of each annotation file, without names that have none.

    Raises:
        MissingFileError: An annotation file has no image.
    """
    # Folders of the one may be missing in the other.
    found = {
        name: image_of.get(name) or image_of.get(PurePosixPath(name).name, []) for name in names
    }
    missing = [name for name in names if not found[name]]
    if missing:
        error = MissingFileError(
            f"{len(missing)} of {len(names)} images annotated in {annotations} are not in {images}:"
            f" {_listed(missing)}; looked for names ending in {', '.join(IMAGE_SUFFIXES)}"
        )
        for name in missing:
            collect(error, "missing-image", file=os.path.join(images, name))
    return {name: files for name, files in found.items() if files}


def _parsed_files(
    images_of: Mapping[str, list[str]],
    xml_files: Mapping[str, list[str]],
    annotations: str,
    split_file: str | None,
) -> tuple[dict[str, str], dict[str, Element]]:
    """Return the path of each XML file by name, and the roots of those that can be read."""
    paths: dict[str, str] = {}
    roots: dict[str, Element] = {}
    for name, image_files in images_of.items():
        files = xml_files.get(name, [f"{name}.xml"])
        if len(files) > 1:
            raise DataError(f"{annotations} has {' and '.join(files)}: remove one of them")
        paths[name] = path = os.path.join(annotations, files[0])
        if name not in xml_files:
            lost = MissingFileError(
                f"annotation file {path} does not exist, though {split_file} lists it"
            )
            collect(lost, "missing-annotation-file", file=image_files[0])
            continue
        try:
            roots[name] = parse_xml_without_entities(read_file(path, "annotation file"), path)
        except DataError as error:
            collect(error, "broken-annotation-file", file=image_files[0])
    return paths, roots


def _image_of(root: Element, image_files: Sequence[str], path: str) -> str:
    """Return the image of an XML file: the only one of its name, or the one that it names."""
    if len(image_files) == 1:
        return image_files[0]
    # Written on Windows, it may hold a path with backslashes.
    named = PureWindowsPath((root.findtext("filename") or "").strip()).name
    chosen = [file for file in image_files if PurePath(file).name == named]
    if not chosen:
        raise DataError(
            f"{path} may be about any of {', '.join(image_files)}: name the image in its"
            f" <filename> (now {named!r}), or move the others out of the folder"
        )
    return chosen[0]


def _images_by_name(images: str) -> dict[str, list[str]]:
    """Return name without suffix -> paths, of which there is rarely more than one.

    An image in a folder of the folder is there by its name alone, too, unless that of another.
    """
    files = files_below(images, IMAGE_SUFFIXES, "images")
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, entries in files.items():
        for key in {name, PurePosixPath(name).name}:
            if key == name or key not in files:
                found[key] += [os.path.join(images, entry) for entry in entries]
    return dict(found)


def parse_xml_without_entities(data: bytes, path: str) -> Element:
    """Parse XML without a document type declaration.

    Raises:
        DataError: It does not parse, or has such a declaration. The message names `path`.
    """

    # Entities that stand for entities blow a kilobyte up to gigabytes, and external ones read
    # files. Both can only be declared in a document type declaration, which no annotation needs, so
    # expat stops at its very start: whatever the encoding, and without a further dependency.
    def refuse(*_: Any) -> None:
        raise DataError(
            f"annotation file {path} has a document type declaration (<!DOCTYPE ...>), which is"
            " refused"
        )

    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        # expat knows no East Asian encodings.
        declared = _EAST_ASIAN.match(data)
        if declared:
            data = data[len(declared[0]) :].decode(declared[1].decode("ascii")).encode()
        parser.Parse(data, True)
    except DataError:
        raise
    except (expat.ExpatError, LookupError, ValueError) as error:  # the latter two over encodings
        raise DataError(f"annotation file {path} is not valid XML: {error}") from error
    return builder.close()


def _check_classes(
    roots: dict[str, Element], paths: dict[str, str], class_names: Sequence[str], annotations: str
) -> None:
    found: Counter[str] = Counter()
    first_file: dict[str, str] = {}
    for name, root in roots.items():
        for obj in root.findall("object"):
            class_name = _text(obj, "name", paths[name])
            found[class_name] += 1
            first_file.setdefault(class_name, name)
    unknown = [class_name for class_name in found if class_name not in class_names]
    if unknown:
        counts = ", ".join(
            f"{n!r} ({found[n]} objects, first in {first_file[n]}.xml)" for n in unknown
        )
        raise DataError(
            f"{annotations} has objects of unknown classes:"
            f" {counts}.{did_you_mean(unknown[0], class_names)} Expected classes:"
            f" {', '.join(class_names)}. Found: {', '.join(sorted(found))}."
        )


def _record(
    name: str,
    image_file: str,
    root: Element,
    ids: dict[str, int],
    path: str,
    unclear: list[str],
) -> ImageRecord:
    height = width = 0
    size = root.find("size")
    if size is not None:
        height, width = int(_number(size, "height", path)), int(_number(size, "width", path))
    if height < 1 or width < 1:
        logger.debug("%s gives no size, taking it from %s", path, image_file)
        try:
            height, width = read_image_size(image_file)
        except BadImageError:
            if not is_collecting():  # the doctor looks at every image by itself
                raise
    annotations = []
    for i, obj in enumerate(root.findall("object"), start=1):
        try:
            annotations.append(_annotation(obj, i, ids, path, unclear))
        except DataError as error:
            collect(error, "broken-box", file=image_file, annotation=f"object {i}")
    record: ImageRecord = {
        "file_name": image_file,
        "image_id": name,
        "height": height,
        "width": width,
        "annotations": annotations,
    }
    if height < 1 or width < 1:
        del record["height"], record["width"]
    return record


def _annotation(
    obj: Element, number: int, ids: dict[str, int], path: str, unclear: list[str]
) -> AnnotationRecord:
    where = f"object {number} of {path}"
    box = obj.find("bndbox")
    if box is None:
        raise DataError(f"{where} has no <bndbox>")
    xmin, ymin, xmax, ymax = (_number(box, key, where) for key in ("xmin", "ymin", "xmax", "ymax"))
    record: dict[str, Any] = {
        "bbox": [xmin - 1.0, ymin - 1.0, xmax, ymax],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": ids[_text(obj, "name", where)],
        "iscrowd": 0,
    }
    if obj.find("difficult") is not None:
        try:
            record["difficult"] = as_flag(obj.findtext("difficult"))
        except DataError:  # make-sense wrote "Unspecified" for years
            record["difficult"] = 0
            unclear.append(obj.findtext("difficult") or "")
    return cast(AnnotationRecord, record)


def _text(parent: Element, tag: str, where: str) -> str:
    text = (parent.findtext(tag) or "").strip()
    if not text:
        raise DataError(f"{where} has a <{parent.tag}> without <{tag}>")
    return text


def _number(parent: Element, tag: str, where: str) -> float:
    text = _text(parent, tag, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where} has <{tag}>{text}</{tag}>, need a number")
    return value


def _listed(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names])
