"""The annotations of a COCO file, one image at a time: boxes, masks and keypoints, all checked.

Anything that cannot be meant as it is written is an error that names the annotation and the file,
when the data set is loaded and not hours later in a worker process.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from detkit.data.datasets.faults import collect, is_collecting
from detkit.data.datasets.json_file import as_number, as_numbers
from detkit.structures import AnnotationRecord, BoxMode, as_flag
from detkit.structures.mask_formats import as_polygon, rle_counts
from detkit.utils.errors import DataError
from detkit.utils.text import listed, shortened

logger = logging.getLogger(__name__)

_MIN_POLYGON_POINTS = 3
_COUNTS = (str, bytes, list)
# The root of a polygon's squared numbers, times how many they are: below it, none is beyond a
# million and the outline is no longer than ten million, as `as_polygon` asks for.
_NEAR = 5e6
_MAX = 2**62


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
            drop_bad_polygons: Drop polygons and run lengths that cannot be used, and count them,
                instead of raising an error: nobody can correct the files of a public data set.
        """
        self.json_file = json_file
        self.to_contiguous = to_contiguous
        self.keys = tuple(keys)
        self.drop_bad_polygons = drop_bad_polygons
        self.num_dropped_polygons = 0
        self.without_polygon: list[Any] = []
        self.with_mask_outside: list[Any] = []
        self._file = ""
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

        Args:
            image: The image's record.
            annotations: Its annotations, as in the file.

        Raises:
            DataError: A box, a mask or a list of keypoints is not what the format asks for.
        """
        size = (image["height"], image["width"]) if "height" in image and "width" in image else None
        records = []
        self._file = image["file_name"]
        for annotation in annotations:
            if annotation["category_id"] not in self.to_contiguous:
                continue
            try:
                records.append(self._record(annotation, size))
            except DataError as error:
                self._collect(error, "broken-box", annotation)
        return records

    def log_dropped(self) -> None:
        """Warn of masks that were dropped."""
        if self.num_dropped_polygons or (self.without_polygon and not is_collecting()):
            logger.warning(
                "%s: left out %d polygons or run lengths that cannot be used; annotations that have"
                " no other keep their box: %s",
                self.json_file,
                self.num_dropped_polygons,
                listed(self.without_polygon) or "none",
            )
        if self.with_mask_outside:
            logger.warning(
                "%s: the mask of %d annotations lies wholly outside of its image. They count as"
                " objects without a mask; correct or remove them: %s",
                self.json_file,
                len(self.with_mask_outside),
                listed(self.with_mask_outside),
                extra={"code": "mask-outside"},
            )

    def _record(
        self, annotation: Mapping[str, Any], size: tuple[int, int] | None
    ) -> AnnotationRecord:
        """Return the record of an annotation; an empty `segmentation` is one that was dropped."""
        record: dict[str, Any] = {key: annotation[key] for key in self.keys if key in annotation}
        # `[[]]` has no mask either.
        mask = record.pop("segmentation", None)
        if mask and (not isinstance(mask, list) or mask[0] or any(p != [] for p in mask)):
            record["segmentation"] = self._segmentation(annotation, size)
        if record.get("keypoints"):
            try:
                # COCO's files number pixels; records, like boxes and polygons, measure from the
                # corner of the first pixel.
                record["keypoints"] = [
                    value if i % 3 == 2 else value + 0.5
                    for i, value in enumerate(self._keypoints(annotation))
                ]
            except DataError as error:
                self._collect(error, "broken-keypoints", annotation)
                del record["keypoints"]
        else:
            record.pop("keypoints", None)
        box = as_numbers(annotation.get("bbox"))
        # JSON has whole numbers that no float can hold.
        if box is None or len(box) not in (4, 5) or _MAX < abs(sum(box)) < math.inf:
            raise DataError(
                f"{self._name(annotation)} needs a bbox of four numbers [x, y, width, height], or"
                " of five [center x, center y, width, height, angle], has"
                f" {shortened(annotation.get('bbox'), 80)}"
            )
        record["bbox"] = box
        record["bbox_mode"] = BoxMode.XYWH_ABS if len(box) == 4 else BoxMode.XYWHA_ABS
        record["category_id"] = self.to_contiguous[annotation["category_id"]]
        for flag in ("iscrowd", "difficult") if "difficult" in record else ("iscrowd",):
            try:
                record[flag] = as_flag(annotation.get(flag))
            except DataError as error:
                wrong = DataError(f"{self._name(annotation)} has a wrong {flag}: {error}")
                self._collect(wrong, "broken-flag", annotation)
                record[flag] = 0
        area = record.get("area", 0.0)
        if type(area) is not float or not area >= 0:  # JSON's NaN too
            area = as_number(record.pop("area"))
            if area is None and annotation["area"] is not None:
                wrong = DataError(
                    f"{self._name(annotation)} needs an area that is a number, has"
                    f" {shortened(annotation['area'], 80)}"
                )
                self._collect(wrong, "broken-area", annotation)
            # A score needs one that is at least 0; without it, it measures the mask or the box.
            if area is not None and area >= 0:
                record["area"] = area
        return cast(AnnotationRecord, record)

    def _segmentation(self, annotation: Mapping[str, Any], size: tuple[int, int] | None) -> Any:
        """Return the mask of an annotation, without bad polygons if these are dropped."""
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, dict):
            problem = rle_problem(segmentation, size)
            if problem is None:
                return segmentation
            self._drop_or_raise(annotation, problem, "broken-run-length")
            self.without_polygon.append(annotation["id"])
            return []
        if not isinstance(segmentation, list):
            wrong = DataError(
                f"{self._name(annotation)} needs a segmentation of polygons or a run-length mask,"
                f" has {shortened(segmentation, 80)}"
            )
            self._collect(wrong, "broken-polygon", annotation)
            return []
        good = []
        reaches_image = False
        for polygon in segmentation:
            numbers = as_numbers(polygon)
            if numbers == []:
                continue
            problem = polygon_problem(polygon, numbers)
            if problem is not None:
                self._drop_or_raise(annotation, problem, "broken-polygon")
                continue
            assert numbers is not None
            good.append(numbers)
            reaches_image = reaches_image or size is None or _reaches_image(numbers, size)
        if not good:
            self.without_polygon.append(annotation["id"])
        elif not reaches_image:
            self.with_mask_outside.append(annotation["id"])
            return []
        return good

    def _drop_or_raise(self, annotation: Mapping[str, Any], problem: str, code: str) -> None:
        if self.drop_bad_polygons:
            self.num_dropped_polygons += 1
            return
        error = DataError(
            f"{self._name(annotation)} {problem}. Correct it, or leave such polygons and run"
            " lengths out with drop_bad_polygons: true in the data set's entry under"
            " DATASETS.REGISTER"
        )
        self._collect(error, code, annotation)

    def _collect(self, error: DataError, code: str, annotation: Mapping[str, Any]) -> None:
        collect(error, code, file=self._file, annotation=annotation["id"])

    def _keypoints(self, annotation: Mapping[str, Any]) -> list[Any]:
        """Return the keypoints of an annotation, checked."""
        keypoints = annotation["keypoints"]
        if not isinstance(keypoints, list) or len(keypoints) % 3:
            found = len(keypoints) if isinstance(keypoints, list) else shortened(keypoints, 80)
            raise DataError(
                f"{self._name(annotation)} needs keypoints of three numbers each (x, y,"
                f" visibility), has {found} numbers"
            )
        numbers = as_numbers(keypoints)
        if numbers is None or not abs(sum(numbers)) < _MAX:
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
        return numbers

    def _name(self, annotation: Mapping[str, Any]) -> str:
        return f"annotation {annotation['id']} of {self.json_file}"


def polygon_problem(polygon: Any, numbers: list[Any] | None) -> str | None:
    """Return what is wrong with a polygon `[x0, y0, x1, y1, ...]`, None if nothing is.

    Its area is not checked.

    Args:
        polygon: As in the file.
        numbers: What `as_numbers` makes of it.
    """
    if numbers is None:
        if not isinstance(polygon, list):
            return f"needs polygons that are lists of numbers, has {shortened(polygon, 80)}"
        stray = next(value for value in polygon if as_number(value) is None)
        return f"has a polygon with {shortened(stray, 40)} among its numbers"
    if len(numbers) % 2:
        return (
            f"has a polygon of {len(numbers)} numbers, but x and y alternate: the number must be"
            " even"
        )
    if len(numbers) < 2 * _MIN_POLYGON_POINTS:
        return (
            f"has a polygon of {len(numbers) // 2} points, {shortened(polygon, 80)}: it needs at"
            f" least {_MIN_POLYGON_POINTS}"
        )
    try:
        # Nearly all polygons pass here, in a fifth of the time that an array takes to build; NaN
        # does not.
        if math.hypot(*numbers) * len(numbers) < _NEAR:
            return None
        as_polygon(numbers)
    except (ValueError, OverflowError) as error:
        return f"has a polygon that cannot be drawn: {error}"
    return None


def _reaches_image(polygon: Sequence[float], image_size: tuple[int, int]) -> bool:
    """Return whether a polygon does not lie wholly beside, above or below its image."""
    height, width = image_size
    if 0 < polygon[0] < width and 0 < polygon[1] < height:
        return True
    xs, ys = polygon[0::2], polygon[1::2]
    return max(xs) > 0 and min(xs) < width and max(ys) > 0 and min(ys) < height


def rle_problem(rle: Mapping[str, Any], image_size: tuple[int, int] | None) -> str | None:
    """Return what is wrong with a run-length mask, or None.

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
    is_number_list = as_numbers(list(size)) == list(size)
    if not is_number_list or (isinstance(counts, list) and as_numbers(counts) != counts):
        return (
            "needs a run-length mask whose size and counts are numbers, has"
            f" {shortened(dict(rle), 80)}"
        )
    if image_size is not None and tuple(size) != tuple(image_size):
        return (
            f"has a run-length mask of {size[0]}x{size[1]} (height x width), but its image is "
            f"{image_size[0]}x{image_size[1]}"
        )
    if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
        return (
            f"has a run-length mask whose counts add up to {sum(counts)}, not to {size[0]} x"
            f" {size[1]} pixels"
        )
    try:
        rle_counts(rle)
    except (ValueError, OverflowError) as error:
        return f"has a run-length mask that cannot be read: {error}"
    return None
