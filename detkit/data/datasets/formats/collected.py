"""What a reader of foreign files found, on its way to records.

The files of YOLO, labelme, CVAT, CSV and so on say the same as those of COCO in other words. Their
readers gather images and objects here; selection of classes, metadata and all checks are those of
COCO's reader.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from detkit.data.datasets.coco import records_of_content, used_categories
from detkit.data.datasets.faults import is_collecting
from detkit.structures import ImageRecord
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import files_below
from detkit.utils.image import read_image_size
from detkit.utils.image_file import IMAGE_SUFFIXES, BadImageError
from detkit.utils.text import did_you_mean, listed

logger = logging.getLogger(__name__)

_THREADS = 8
# Shares of an image exceed 1 by rounding, or where an oriented box sticks out; pixels do by far.
_LARGEST_SHARE = 2.0


class Collected:
    """Images and objects of a data set, whose classes have names and no ids yet."""

    def __init__(self, source: str, image_root: str) -> None:
        """Take the file or folder that is read, for messages, and the folder of images."""
        self.source = source
        self.image_root = image_root
        self.names: list[str] | None = None
        """Class names in the order of their ids; None takes those of the objects, sorted."""
        self.keypoints: list[str] = []
        self._images: list[dict[str, Any]] = []
        self._objects: list[dict[str, Any]] = []

    def add_image(self, file_name: str, size: tuple[int, int] | None = None) -> int:
        """Add an image of `(height, width)`, by its name below the folder, and return its id."""
        image: dict[str, Any] = {"id": len(self._images) + 1, "file_name": file_name}
        if size is not None:
            image["height"], image["width"] = size
        self._images.append(image)
        return image["id"]

    def add_object(
        self,
        image: int,
        label: str,
        where: str,
        *,
        box: Sequence[float] = (),
        polygons: Sequence[Sequence[float]] = (),
        **further: Any,
    ) -> None:
        """Add an object.

        Args:
            image: As `add_image` returned it.
            label: Name of its class.
            where: File and line, for messages.
            box: XYXY in pixels; empty takes the hull of the polygons.
            polygons: Flat, in pixels.
            further: Other keys of an annotation in COCO's files, in their units.

        Raises:
            DataError: A side of the box is negative, or a polygon has fewer than three points.
        """
        if self.names is not None and label not in self.names:
            raise DataError(
                f"{where} has class {label!r}.{did_you_mean(label, self.names)} Expected:"
                f" {', '.join(self.names)}"
            )
        for polygon in polygons:
            if len(polygon) < 6 or len(polygon) % 2:
                raise DataError(
                    f"{where} has a polygon of {len(polygon)} numbers, need x and y of at least"
                    " three points"
                )
        if polygons:
            further["segmentation"] = [list(polygon) for polygon in polygons]
        x0, y0, x1, y1 = box or hull([v for polygon in polygons for v in polygon])
        if x1 < x0 or y1 < y0:
            raise DataError(f"{where} has a box whose right or lower side comes first: {list(box)}")
        annotation = {"id": len(self._objects) + 1, "image_id": image, "category_id": label}
        self._objects.append({**annotation, "bbox": [x0, y0, x1 - x0, y1 - y0], **further})

    def records(
        self, dataset_name: str | None = None, classes: Sequence[str] | None = None
    ) -> list[ImageRecord]:
        """Return the records; see `load_coco_json`."""
        if not self._images:
            raise DataError(f"{self.source} names no image")
        names = self.names
        if names is None:
            names = sorted({annotation["category_id"] for annotation in self._objects})
            if classes is None:
                # A training and a test set of other objects would number them in other ways.
                message = "%s does not list its classes, numbered in the order of their names: %s"
                logger.info(message, self.source, ", ".join(names))
            else:
                # The classes of which this split has no object count as well: ids are the same.
                known = dict(enumerate(names))
                used_categories(known, classes, self.source, must_match=False)
                names = list(dict.fromkeys([*classes, *names]))
        ids = {name: k for k, name in enumerate(names)}
        keypoints = {"keypoints": self.keypoints} if self.keypoints else {}
        objects = [{**entry, "category_id": ids[entry["category_id"]]} for entry in self._objects]
        content = {
            "images": self._images,
            "categories": [{"id": k, "name": name, **keypoints} for name, k in ids.items()],
            "annotations": objects,
        }
        return records_of_content(
            content, self.source, self.image_root, dataset_name, classes=classes
        )


def hull(coordinates: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the upright box around flat coordinates, XYXY."""
    xs, ys = coordinates[::2], coordinates[1::2]
    return min(xs), min(ys), max(xs), max(ys)


def numbers_of(values: Iterable[Any], where: str) -> list[float]:
    """Return finite numbers, where some may be written as text.

    Raises:
        DataError: One is not; the message begins with `where`.
    """
    numbers = []
    for value in values:
        try:
            number = float(value)
        except (ValueError, TypeError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{where} has {value!r}, need a number")
        numbers.append(number)
    return numbers


def require_shares(shares: Sequence[float], where: str) -> None:
    """Raise a DataError if coordinates that are shares of the image's sides must be pixels."""
    stray = [value for value in shares if abs(value) > _LARGEST_SHARE]
    if stray:
        raise DataError(
            f"{where} has {stray[0]:g}, need shares of the width and height of the image, from 0"
            " to 1"
        )


def image_sizes(paths: Sequence[str], source: str) -> list[tuple[int, int] | None]:
    """Return `(height, width)` of image files, upright; None for one that cannot be read.

    Raises:
        MissingFileError: Some do not exist; `source` names them.
    """

    def size(path: str) -> tuple[int, int] | str | None:
        try:
            return read_image_size(path)
        except MissingFileError:
            return path
        except BadImageError:
            return None

    with ThreadPoolExecutor(_THREADS) as pool:  # waits for files, outside of Python's lock
        found = list(pool.map(size, paths))
    missing = [value for value in found if isinstance(value, str)]
    # The doctor looks at every image by itself.
    if missing and not is_collecting():
        raise MissingFileError(
            f"{len(missing)} of {len(paths)} images of {source} do not exist: {listed(missing, 5)}"
        )
    bad = [path for path, value in zip(paths, found, strict=True) if value is None]
    if bad:
        logger.warning(
            "%s: %d images cannot be read, and their objects are left out: %s",
            source,
            len(bad),
            listed(bad, 5),
            extra={"code": ""},
        )
    return [None if isinstance(value, str) else value for value in found]


def images_in(folder: str) -> list[str]:
    """Return the names of the images below a folder, in the order of their names."""
    below = files_below(folder, IMAGE_SUFFIXES, "images")
    return [name for names in below.values() for name in names]


def image_file_of(name: str, folder: str) -> str:
    """Return an image's name below a folder, where its ending may be missing."""
    if Path(name).suffix.lower() in IMAGE_SUFFIXES:
        return name
    endings = (e for ending in IMAGE_SUFFIXES for e in (ending, ending.upper()))
    found = (name + ending for ending in endings)
    return next((n for n in found if Path(os.path.join(folder, n)).is_file()), name)
