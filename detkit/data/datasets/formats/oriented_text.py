"""Rotated boxes as text, one file per image: DOTA's format and that of Ultralytics' YOLO (OBB).

    DOTA   x1 y1 x2 y2 x3 y3 x4 y4 category difficult     corners in pixels
    YOLO   class x1 y1 x2 y2 x3 y3 x4 y4                  corners in shares of the image's sides

Corners need not form a rectangle: the box is the smallest one around them. Its longer side is its
width, and its angle in [-90, 90), so that equal rectangles have equal numbers.

Legend: K classes, M objects in one image.
"""

import logging
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from detkit.data.datasets.faults import collect
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, rotated_boxes_around
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import files_below, read_text
from detkit.utils.image import read_image_size
from detkit.utils.image_file import IMAGE_SUFFIXES
from detkit.utils.text import did_you_mean, listed

logger = logging.getLogger(__name__)

# What DOTA's files say about the whole image, before the objects.
_DOTA_HEADERS = ("imagesource:", "gsd:")


def load_dota(
    image_root: str, annotation_root: str, class_names: Sequence[str]
) -> list[ImageRecord]:
    """Load a folder of images and one of text files in DOTA's format.

    Source: Xia et al. 2018, arXiv 1711.10398.

    Args:
        image_root: Folder of the images, with all folders in it. Images of several thousand pixels
            should be cut into tiles before.
        annotation_root: Folder of the text files: one for each image, of the same name. A file
            without objects is of an image of background; images without a file are left out.
        class_names: In the order of their ids.

    Returns:
        The images in the order of their names. Difficult objects are included and marked.

    Raises:
        MissingFileError: A folder or an image does not exist.
        DataError: A line is not as it should be; the message names file and line.
    """
    ids = {name: index for index, name in enumerate(class_names)}

    def parse(words: list[str]) -> tuple[int, list[str], dict[str, Any]]:
        if len(words) not in (9, 10):
            raise ValueError(f"needs 8 coordinates, a category and a flag, has {len(words)} words")
        if words[8] not in ids:
            known = ", ".join(class_names)
            raise ValueError(
                f"has an unknown category {words[8]!r}, expected one of"
                f" {known}.{did_you_mean(words[8], class_names)}"
            )
        return ids[words[8]], words[:8], {"difficult": int(words[9:] == ["1"])}

    return _load(image_root, annotation_root, parse, relative=False)


def load_yolo_obb(
    image_root: str, annotation_root: str, class_names: Sequence[str]
) -> list[ImageRecord]:
    """Load a folder of images and one of text files in YOLO's format of oriented boxes.

    Args:
        image_root: As in `load_dota`.
        annotation_root: Folder of the text files; an image without one is background.
        class_names: In the order of their numbers.

    Raises:
        MissingFileError, DataError: As in `load_dota`.
    """

    def parse(words: list[str]) -> tuple[int, list[str], dict[str, Any]]:
        if len(words) != 9:
            raise ValueError(f"needs a class and 8 coordinates, has {len(words)} words")
        if not words[0].isdecimal() or int(words[0]) >= len(class_names):
            raise ValueError(f"has class {words[0]}, needs a number below {len(class_names)}")
        return int(words[0]), words[1:], {}

    return _load(image_root, annotation_root, parse, relative=True)


def _load(
    image_root: str,
    annotation_root: str,
    parse: Callable[[list[str]], tuple[int, list[str], dict[str, Any]]],
    *,
    relative: bool,
) -> list[ImageRecord]:
    """Load the images; `parse` turns the words of a line into class, corners and further keys."""
    text_files = files_below(annotation_root, [".txt"], "annotations")
    images = files_below(image_root, IMAGE_SUFFIXES, "images")
    names = sorted({*images, *text_files}) if relative else list(text_files)
    missing = [name for name in names if name not in images]
    if missing or not names:
        raise MissingFileError(
            f"{len(missing)} of {len(names)} images annotated in {annotation_root} are not in"
            f" {image_root}: {listed(missing) or 'there is no annotation'}"
        )
    records: list[ImageRecord] = []
    for name in names:
        if len(images[name]) > 1:
            files = " and ".join(images[name])
            raise DataError(f"{image_root} has {files}, of one name: remove one of them")
        image_file = os.path.join(image_root, images[name][0])
        height, width = read_image_size(image_file)
        annotations: list[AnnotationRecord] = []
        for text_file in text_files.get(name, []):
            path = os.path.join(annotation_root, text_file)
            annotations += _annotations(
                path, parse, (width, height) if relative else None, image_file
            )
        records.append(
            {
                "file_name": image_file,
                "image_id": name,
                "height": height,
                "width": width,
                "annotations": annotations,
            }
        )
    unused = [name for name in images if name not in names]
    if unused:
        message = "left out of images in %s: %d that are without a text file: %s"
        logger.info(message, image_root, len(unused), listed(unused, 5))
    return records


def _annotations(
    path: str,
    parse: Callable[[list[str]], tuple[int, list[str], dict[str, Any]]],
    image_size: tuple[int, int] | None,
    image_file: str,
) -> list[AnnotationRecord]:
    """Return the objects of a text file, in shares of an image of `(width, height)` unless None."""
    text = read_text(path, "annotation file")
    corners: list[list[float]] = []
    others: list[dict[str, Any]] = []
    # Corners may lie a little outside of the image.
    limit, kind = (math.inf, "pixels") if image_size is None else (2, "shares of the image's sides")
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.replace(",", " ").split()
        if not words or words[0].startswith(_DOTA_HEADERS):
            continue
        try:
            class_id, numbers, more = parse(words)
            corners.append([float(word) for word in numbers])
            stray = [value for value in corners[-1] if not abs(value) < limit]
            if stray:
                raise ValueError(f"needs {kind}, has {stray[0]:g}")
        except ValueError as error:
            wrong = DataError(f"line {number} of {path}: {error}")
            collect(wrong, "broken-row", file=image_file, annotation=f"line {number}")
            del corners[len(others) :]
            continue
        others.append({"category_id": class_id, "iscrowd": 0, **more})
    points = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4, 2)
    boxes = rotated_boxes_around(points * torch.tensor(image_size or (1, 1))).tolist()
    for box, other in zip(boxes, others, strict=True):
        other.update(bbox=box, bbox_mode=BoxMode.XYWHA_ABS)
    return cast(list[AnnotationRecord], others)
