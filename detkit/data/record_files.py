"""The files that records name, looked at before a run: all there, readable, of the right content.

Of a large data set, every file is looked for, but only so many are opened, spread over it: a run
must not wait minutes for its first step.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from detkit.data.dataset_mapper import require_image_size
from detkit.structures import ImageRecord
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.image import read_image, read_image_size, read_label_map
from detkit.utils.image_file import MAX_IMAGE_PIXELS, read_image_bytes, require_pixels
from detkit.utils.text import listed

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_KINDS = {
    "file_name": "images",
    "sem_seg_file_name": "label maps",
    "pan_seg_file_name": "panoptic png",
}
_MAX_IMAGES, _MAX_LABEL_MAPS, _MAX_DECODED = 1000, 50, 50
# What a whole JPEG or PNG ends with.
_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")


def spread(items: Sequence[Item], limit: int) -> Sequence[Item]:
    """Return at most about `limit` items, spread over all."""
    return items[:: -(-len(items) // limit)] if len(items) > limit else items


def require_files(name: str, records: Sequence[ImageRecord]) -> None:
    """Check that the images, label maps and panoptic png of a data set exist.

    Addresses such as s3://... are not looked for.

    Raises:
        MissingFileError: Files do not exist; the message counts them and names the first ones.
    """
    for key, kind in _KINDS.items():
        paths = [str(record[key]) for record in records if key in record]
        missing = list(_missing(paths))
        if not missing:
            continue
        hint = ""
        if os.sep == "/" and "\\" in missing[0]:
            hint = (
                ". The names have backslashes, as Windows writes paths, which are no separators"
                " here: replace them by / in the annotation file, and give the folder that the"
                " names start from"
            )
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} {kind} of data set {name!r} do not exist:"
            f" {listed(missing)}{hint}"
        )


def _missing(paths: Sequence[str]) -> Iterator[str]:
    # One listing per folder instead of a hundred thousand looks at files.
    names: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if "://" in path:
            continue
        if folder not in names:
            there = Path(folder)
            names[folder] = {file.name for file in there.iterdir()} if there.is_dir() else set()
        # The second look is for file systems that do not tell a.jpg from A.JPG.
        if name not in names[folder] and not Path(path).exists():
            yield path


def check_images(
    name: str,
    records: Sequence[ImageRecord],
    max_pixels: int = MAX_IMAGE_PIXELS,
    image_format: str = "BGR",
) -> None:
    """Check that the images of a data set are whole, and have the size in their record.

    Args:
        name: Of the data set, for messages.
        records: Its images.
        max_pixels: As in `read_image`.
        image_format: As there.

    Raises:
        DataError: Some have not; the message counts them and says what is wrong with the first.
    """
    problems, num_decoded = [], 0
    looked_at = spread([r for r in records if "://" not in str(r["file_name"])], _MAX_IMAGES)
    for record in looked_at:
        file = record["file_name"]
        try:
            size = read_image_size(file)
            require_image_size(record, size)
            data = read_image_bytes(file)
            require_pixels(data, (size[1], size[0]), file, max_pixels)
            # The end of most files tells that they are whole, in no time; the others are decoded.
            if not data.endswith(_ENDS) and num_decoded < _MAX_DECODED:
                num_decoded += 1
                read_image(file, image_format, max_pixels=max_pixels)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(
            f"{len(problems)} of {len(looked_at)} images of data set {name!r} that were looked at"
            f" cannot be used: {listed(problems, 3)}"
        )


def check_label_maps(
    name: str,
    records: Sequence[ImageRecord],
    num_classes: int,
    ignore_label: int,
    max_pixels: int,
) -> None:
    """Check that the label maps of a data set have known labels and the size of their image.

    Args:
        name: Of the data set, for messages.
        records: Its images; those without a label map are passed over.
        num_classes: Labels count from 0 to one less.
        ignore_label: The other label that may appear.
        max_pixels: As in `read_image`.

    Raises:
        DataError: A label map cannot be read, or has another label or size.
    """
    seen: defaultdict[int, str] = defaultdict(str)
    labelled = spread([r for r in records if "sem_seg_file_name" in r], _MAX_LABEL_MAPS)
    for record in labelled:
        file = record["sem_seg_file_name"]
        labels = read_label_map(file, max_pixels=max_pixels)
        size = read_image_size(record["file_name"])
        if labels.shape != tuple(size):
            raise DataError(
                f"label map {file} is {labels.shape}, its image {record['file_name']}"
                f" {tuple(size)} (height, width)"
            )
        for label in np.unique(labels).tolist():
            seen.setdefault(label, file)
    stray = sorted(k for k in seen if not 0 <= k < num_classes and k != ignore_label)
    if stray:
        raise DataError(
            f"the label maps of data set {name!r} have the values {listed(list(map(str, stray)))}"
            f" (first in {seen[stray[0]]}), which are neither classes (0 to {num_classes - 1}) nor"
            f" the ignore_label {ignore_label}: number the classes from 0 in the files, or correct"
            " `classes` or `ignore_label` in its entry under DATASETS.REGISTER"
        )
    if set(seen) == {ignore_label}:
        logger.warning(
            "the label maps of %r that were looked at (%d) hold nothing but %d, its ignore_label:"
            " no pixel is learned or scored. Correct the files, or set another `ignore_label` in"
            " the data set's entry",
            name,
            len(labelled),
            ignore_label,
        )
    if num_classes > 1 and labelled and set(seen) == {0, ignore_label}:
        logger.warning(
            "the label maps of %r that were looked at (%d) hold 0 and %d alone, and %d is its"
            " ignore_label: nothing but class 0 is learned or scored. If %d marks a class, write"
            " its number (1) in the files, or set another `ignore_label` in the data set's entry",
            name,
            len(labelled),
            ignore_label,
            ignore_label,
            ignore_label,
        )
