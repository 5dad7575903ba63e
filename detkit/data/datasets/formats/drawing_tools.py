"""Data sets of the annotation tools labelme (a JSON file per image) and CVAT (XML for images).

Formats: https://github.com/wkentaro/labelme, https://docs.cvat.ai/docs/dataset_management/formats/
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath, PureWindowsPath
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
from pycocotools import mask as mask_util

from detkit.data.datasets.faults import collect
from detkit.data.datasets.formats.collected import Collected, hull, numbers_of
from detkit.data.datasets.json_file import as_number, read_json, section
from detkit.data.datasets.pascal_voc import parse_xml_without_entities
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import files_below, read_file

logger = logging.getLogger(__name__)


def read_labelme(annotations: str, images: str | None = None) -> Collected:
    """Read a folder of labelme's files: polygons, rectangles and circles.

    Polygons of one label and one group are one object.

    Args:
        annotations: The folder, with all folders in it.
        images: Folder of the images; None takes what the files say, relative to themselves.

    Raises:
        MissingFileError: The folder does not exist or holds no JSON file.
        DataError: A file, or a shape in it, cannot be used.
    """
    files = [
        name
        for names in files_below(annotations, [".json"], "annotations").values()
        for name in names
    ]
    if not files:
        raise MissingFileError(f"folder {annotations} of annotations holds no .json file")
    found = Collected(annotations, annotations if images is None else images)
    left_out: Counter[str] = Counter()
    for name in files:
        path = os.path.join(annotations, name)
        content = read_json(path)
        image_path = content.get("imagePath")
        if not isinstance(image_path, str) or not image_path:
            raise DataError(f"{path} has no imagePath")
        below = PureWindowsPath(image_path)  # of either system
        if images is None:
            file_name = os.path.normpath((PurePath(name).parent / below.as_posix()).as_posix())
        else:
            file_name = below.name
        sides = content.get("imageHeight"), content.get("imageWidth")
        height, width = (int(v) for v in numbers_of(sides, f"imageHeight or imageWidth of {path}"))
        image = found.add_image(file_name, (height, width))
        shapes = section(content, "shapes", path)
        shown = os.path.join(found.image_root, file_name)
        _add_labelme_shapes(found, image, shapes, path, shown, left_out)
    _log_left_out(annotations, left_out)
    return found


def _add_labelme_shapes(
    found: Collected,
    image: int,
    shapes: Sequence[dict[str, Any]],
    path: str,
    shown: str,
    left_out: Counter[str],
) -> None:
    """Add the shapes of a file to its image, which faults show as `shown`."""
    groups: dict[Any, tuple[str, str, list[list[float]]]] = {}
    for k, shape in enumerate(shapes, start=1):
        where = f"shape {k} of {path}"
        label, kind = shape.get("label"), shape.get("shape_type", "polygon")
        try:
            if not isinstance(label, str) or not label:
                raise DataError(f"{where} has no label")
            points = _points(shape.get("points"), where)
        except DataError as error:
            collect(error, "broken-row", file=shown, annotation=f"shape {k}")
            continue
        if kind in ("polygon", "rotation"):
            group = shape.get("group_id")
            key = (k, None) if group is None else (label, str(group))
            groups.setdefault(key, (label, where, []))[2].append(points)
        elif kind == "circle" and len(points) == 4:
            x, y, radius = *points[:2], math.dist(points[:2], points[2:])
            box = (x - radius, y - radius, x + radius, y + radius)
            found.add_object(image, label, where, box=box)
        elif kind in ("rectangle", "mask") and len(points) >= 4:
            found.add_object(image, label, where, box=hull(points))
            left_out["pixels of mask"] += kind == "mask"
        else:
            left_out[str(kind)] += 1
    for label, where, polygons in groups.values():
        try:
            found.add_object(image, label, where, polygons=polygons)
        except DataError as error:
            collect(error, "broken-row", file=shown)


def _points(points: Any, where: str) -> list[float]:
    if not isinstance(points, list) or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise DataError(f"{where} needs points, a list of [x, y]")
    return numbers_of([value for point in points for value in point], where)


def _log_left_out(source: str, left_out: Counter[str]) -> None:
    counts = ", ".join(f"{kind}: {count}" for kind, count in left_out.items() if count)
    if counts:
        logger.warning("%s: left out what is neither box nor polygon: %s", source, counts)


def read_cvat(annotations: str, images: str) -> Collected:
    """Read a file of "CVAT for images": boxes (also turned ones, as polygons), polygons and masks.

    Args:
        annotations: The XML file.
        images: Folder that the names of images are relative to.

    Raises:
        MissingFileError: The file does not exist.
        DataError: It is not valid, or a shape, named by image and number, cannot be used.
    """
    root = parse_xml_without_entities(read_file(annotations, "annotation file"), annotations)
    if root.tag != "annotations" or root.find("track") is not None:
        raise DataError(
            f"{annotations} is not an export of 'CVAT for images 1.1': its root is <{root.tag}>"
            f"{' with tracks of a video' if root.find('track') is not None else ''}"
        )
    found = Collected(annotations, images)
    labels = [label for label in root.iterfind("meta//label") if label.find("parent") is None]
    found.names = [(label.findtext("name") or "").strip() for label in labels] or None
    left_out: Counter[str] = Counter()
    for element in root.iterfind("image"):
        name = (element.get("name") or "").replace("\\", "/")
        where = f"image {element.get('id')} ({name}) of {annotations}"
        height, width = (int(v) for v in _attributes(element, ("height", "width"), where))
        image = found.add_image(name, (height, width))
        for k, shape in enumerate(element, start=1):
            try:
                _add_cvat_shape(found, image, shape, (height, width), f"{shape.tag} {k} of {where}")
            except DataError as error:
                path = os.path.join(images, name)
                collect(error, "broken-row", file=path, annotation=f"{shape.tag} {k}")
            left_out[shape.tag] += shape.tag not in ("box", "polygon", "mask")
    _log_left_out(annotations, left_out)
    return found


def _add_cvat_shape(
    found: Collected, image: int, shape: Element, size: tuple[int, int], place: str
) -> None:
    label = (shape.get("label") or "").strip()
    if shape.tag == "box":
        corners = _attributes(shape, ("xtl", "ytl", "xbr", "ybr"), place)
        angle = as_number(shape.get("rotation", "0"))
        if angle:
            found.add_object(image, label, place, polygons=[_turned(corners, angle)])
        else:
            found.add_object(image, label, place, box=corners)
    elif shape.tag == "polygon":
        texts = (shape.get("points") or "").replace(";", ",").split(",")
        found.add_object(image, label, place, polygons=[numbers_of(texts, place)])
    elif shape.tag == "mask":
        box, mask = _mask(shape, size, place)
        found.add_object(image, label, place, box=box, segmentation=mask)


def _attributes(element: Element, names: Sequence[str], where: str) -> list[float]:
    return numbers_of([element.get(name) for name in names], f"{' or '.join(names)} of {where}")


def _turned(corners: Sequence[float], degrees: float) -> list[float]:
    """Return the polygon of a box that is turned clockwise around its middle."""
    x0, y0, x1, y1 = corners
    x, y, half_w, half_h = (x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    polygon = []
    for a, b in ((-half_w, -half_h), (half_w, -half_h), (half_w, half_h), (-half_w, half_h)):
        polygon += [x + a * cos - b * sin, y + a * sin + b * cos]
    return polygon


def _mask(
    shape: Element, size: tuple[int, int], where: str
) -> tuple[tuple[float, float, float, float], dict[str, Any]]:
    """Return box and run lengths of a mask, which CVAT writes row by row within its box."""
    names = ("left", "top", "width", "height")
    left, top, width, height = (int(v) for v in _attributes(shape, names, where))
    counts = [int(v) for v in numbers_of((shape.get("rle") or "").split(","), where)]
    fits = min(left, top) >= 0 and top + height <= size[0] and left + width <= size[1]
    if min(counts) < 0 or sum(counts) != width * height or not fits:
        raise DataError(
            f"{where} has {sum(counts)} pixels in its rle, need {width}x{height} inside of its"
            " image"
        )
    values = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8)
    bitmap = np.zeros(size, dtype=np.uint8, order="F")
    bitmap[top : top + height, left : left + width] = values.reshape(height, width)
    return (left, top, left + width, top + height), dict(mask_util.encode(bitmap))
