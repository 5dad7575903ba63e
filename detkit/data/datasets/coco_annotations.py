"""The annotations of a COCO file, one image at a time: boxes, masks and keypoints, all checked.

Anything that cannot be meant as it is written is an error that names the annotation and the file,
when the data set is loaded and not hours later in a worker process.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from detkit.data.datasets.json_file import listed, shortened
from detkit.structures import AnnotationRecord, BoxMode
from detkit.utils.errors import DataError

logger = logging.getLogger(__name__)

_MIN_POLYGON_POINTS = 3
_NUMBERS = frozenset((int, float))
_COUNTS = (str, bytes, list)


class AnnotationReader:
    """Turns the annotations of a file into records."""

    def __init__(
        self,
        json_file: str,
        categories: Mapping[Any, Mapping[str, Any]],
        to_contiguous: Mapping[Any, int],
        keys: Iterable[str],
        *,
        drop_bad_polygons: bool = False,
    ) -> None:
        """Take what holds for the whole file.

        Args:
            json_file: Its path, for messages.
            categories: The file's categories by their ids.
            to_contiguous: Class id of each category to use; annotations of others are left out.
            keys: Keys of annotations to copy.
            drop_bad_polygons: Drop polygons of fewer than three points, and objects that have no
                others, and count them, instead of raising an error: nobody can correct the files of
                a public data set.
        """
        self.json_file = json_file
        self.to_contiguous = to_contiguous
        self.keys = tuple(keys)
        self.drop_bad_polygons = drop_bad_polygons
        self.num_dropped_polygons = 0
        self.without_polygon: list[Any] = []
        self._keypoint_counts: dict[Any, int] = {}
        self._first_with_keypoints: dict[Any, Any] = {}
        for key, category in categories.items():
            names = category.get("keypoints")
            if not names:
                continue
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise DataError(
                    f"category {key} of {json_file} needs keypoints that are a list of names, has"
                    f" {shortened(names, 80)}"
                )
            self._keypoint_counts[key] = len(names)

    def records(
        self, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]
    ) -> list[AnnotationRecord]:
        """Return the records of one image's annotations, in their order.

        Raises:
            DataError: A box, a mask or a list of keypoints is not what the format asks for.
        """
        size = (image["height"], image["width"]) if "height" in image and "width" in image else None
        records = []
        for annotation in annotations:
            if annotation["category_id"] in self.to_contiguous:
                record = self._record(annotation, size)
                if record is not None:
                    records.append(record)
        return records

    def log_dropped(self) -> None:
        """Warn of polygons and objects that were dropped."""
        if self.num_dropped_polygons or self.without_polygon:
            logger.warning(
                "%s: left out %d polygons of fewer than three points, and %d annotations that have"
                " no other: %s",
                self.json_file,
                self.num_dropped_polygons,
                len(self.without_polygon),
                listed(self.without_polygon) or "none",
            )

    def _record(
        self, annotation: Mapping[str, Any], size: tuple[int, int] | None
    ) -> AnnotationRecord | None:
        """Return the record of an annotation, None if all its polygons were dropped."""
        record: dict[str, Any] = {key: annotation[key] for key in self.keys if key in annotation}
        if record.get("segmentation"):
            record["segmentation"] = self._segmentation(annotation, size)
            if not record["segmentation"]:
                self.without_polygon.append(annotation["id"])
                return None
        else:
            record.pop("segmentation", None)  # an empty list, or null: this object has no mask
        if record.get("keypoints"):
            self._check_keypoints(annotation)
            # COCO's files number pixels; records, like boxes and polygons, measure from the corner
            # of the first pixel.
            record["keypoints"] = [
                value if i % 3 == 2 else value + 0.5 for i, value in enumerate(record["keypoints"])
            ]
        else:
            record.pop("keypoints", None)
        box = annotation.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
            raise DataError(
                f"{self._name(annotation)} needs a bbox of four numbers [x, y, width, height], has"
                f" {box!r}"
            )
        record["bbox"] = box
        record["bbox_mode"] = BoxMode.XYWH_ABS
        record["category_id"] = self.to_contiguous[annotation["category_id"]]
        record.setdefault("iscrowd", 0)
        return cast(AnnotationRecord, record)

    def _segmentation(self, annotation: Mapping[str, Any], size: tuple[int, int] | None) -> Any:
        """Return the mask of an annotation, without bad polygons if these are dropped."""
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            problem = rle_problem(segmentation, size)
            if problem:
                raise DataError(f"{self._name(annotation)} {problem}")
            return segmentation
        if not isinstance(segmentation, list):
            raise DataError(
                f"{self._name(annotation)} needs a segmentation of polygons or a run-length mask,"
                f" has {shortened(segmentation, 80)}"
            )
        good = []
        for polygon in segmentation:
            problem = polygon_problem(polygon)
            if problem is None:
                good.append(polygon)
            elif not self.drop_bad_polygons:
                raise DataError(
                    f"{self._name(annotation)} {problem}. Correct it, or leave such polygons out"
                    " with drop_bad_polygons: true in the data set's entry under DATASETS.REGISTER"
                )
        self.num_dropped_polygons += len(segmentation) - len(good)
        return good if len(good) < len(segmentation) else segmentation

    def _check_keypoints(self, annotation: Mapping[str, Any]) -> None:
        keypoints = annotation["keypoints"]
        if not isinstance(keypoints, list) or len(keypoints) % 3:
            found = len(keypoints) if isinstance(keypoints, list) else shortened(keypoints, 80)
            raise DataError(
                f"{self._name(annotation)} needs keypoints of three numbers each (x, y,"
                f" visibility), has {found} numbers"
            )
        if not _are_numbers(keypoints):
            raise DataError(
                f"{self._name(annotation)} needs keypoints that are numbers, has"
                f" {shortened(keypoints, 80)}"
            )
        category, found = annotation["category_id"], len(keypoints) // 3
        first = self._first_with_keypoints.setdefault(category, annotation["id"])
        expected = self._keypoint_counts.setdefault(category, found)
        if found != expected:
            source = f"others of its category (annotation {first}) have {expected}"
            if first == annotation["id"]:
                source = f"category {category} lists {expected}"
            raise DataError(
                f"{self._name(annotation)} has {found} keypoints ({len(keypoints)} numbers), but"
                f" {source}: it needs {3 * expected} numbers"
            )

    def _name(self, annotation: Mapping[str, Any]) -> str:
        return f"annotation {annotation['id']} of {self.json_file}"


def polygon_problem(polygon: Any) -> str | None:
    """Return what is wrong with a polygon `[x0, y0, x1, y1, ...]`, None if nothing is.

    Its area is not checked.
    """
    if not isinstance(polygon, list):
        return f"needs polygons that are lists of numbers, has {shortened(polygon, 80)}"
    if not _are_numbers(polygon):
        stray = next(value for value in polygon if type(value) not in _NUMBERS)
        return f"has a polygon with {stray!r} among its numbers"
    if len(polygon) % 2:
        return (
            f"has a polygon of {len(polygon)} numbers, but x and y alternate: the number must be"
            " even"
        )
    if len(polygon) < 2 * _MIN_POLYGON_POINTS:
        return (
            f"has a polygon of {len(polygon) // 2} points, {shortened(polygon, 80)}: it needs at"
            f" least {_MIN_POLYGON_POINTS}"
        )
    return None


def rle_problem(rle: Mapping[str, Any], image_size: tuple[int, int] | None) -> str | None:
    """Return what can be seen to be wrong with a run-length mask without decoding it, or None.

    Args:
        rle: As in COCO's files.
        image_size: `(height, width)` that it must have, None if unknown.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2 or not isinstance(counts, _COUNTS):
        return (
            "needs a run-length mask with size [height, width] and counts, has"
            f" {shortened(dict(rle), 80)}"
        )
    if image_size is not None and tuple(size) != tuple(image_size):
        return (
            f"has a run-length mask of {size[0]}x{size[1]} (height x width), but its image is "
            f"{image_size[0]}x{image_size[1]}"
        )
    if not _are_numbers(size) or (isinstance(counts, list) and not _are_numbers(counts)):
        return (
            "needs a run-length mask whose size and counts are numbers, has"
            f" {shortened(dict(rle), 80)}"
        )
    if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
        return (
            f"has a run-length mask whose counts add up to {sum(counts)}, not to {size[0]} x"
            f" {size[1]} pixels"
        )
    return None


def _are_numbers(values: Sequence[Any]) -> bool:
    # By type rather than by isinstance, in an eighth of the time: all polygons of COCO's training
    # set go through here.
    return _NUMBERS.issuperset(map(type, values))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
