"""The annotations of a COCO file, one image at a time: boxes, masks and keypoints, each looked at before it is used.

What cannot be meant as it is written is an error that names the annotation and the file, found when
the data set is loaded and not hours later by a worker process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from detkit.structures import AnnotationRecord, BoxMode

logger = logging.getLogger(__name__)

_MIN_POLYGON_POINTS = 3
_NUMBERS = frozenset((int, float))


class AnnotationReader:
    """Turns annotations as a file has them into records."""

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
            categories: The file's entries by their ids.
            to_contiguous: Class id of each category to use; annotations of others are left out.
            keys: Of annotations, to take over as they are.
            drop_bad_polygons: Leave polygons of fewer than three points out, and objects that have
                no others, and count them, where they would be an error: nobody can correct the
                files of a public data set.
        """
        self.json_file = json_file
        self.to_contiguous = to_contiguous
        self.keys = tuple(keys)
        self.drop_bad_polygons = drop_bad_polygons
        self.num_dropped_polygons = 0
        self.without_polygon: list[Any] = []
        named = {
            key: category["keypoints"]
            for key, category in categories.items()
            if category.get("keypoints")
        }
        for key, names in named.items():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"category {key} of {json_file} needs keypoints that are a list of names, has"
                    f" {_shortened(names)}"
                )
        self._keypoint_counts = {key: len(names) for key, names in named.items()}
        self._first_with_keypoints: dict[Any, Any] = {}

    def records(
        self, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]
    ) -> list[AnnotationRecord]:
        """Return the records of one image's annotations, in their order.

        Raises:
            ValueError: A box, a mask or a list of keypoints is not what the format asks for.
        """
        size = (image["height"], image["width"]) if "height" in image and "width" in image else None
        records = (
            self._record(annotation, size)
            for annotation in annotations
            if annotation["category_id"] in self.to_contiguous
        )
        return [record for record in records if record is not None]

    def log_dropped(self) -> None:
        """Say how many polygons and objects were left out."""
        if self.num_dropped_polygons or self.without_polygon:
            logger.warning(
                "%s: left out %d polygons of fewer than three points, and %d annotations that have"
                " no other: %s",
                self.json_file,
                self.num_dropped_polygons,
                len(self.without_polygon),
                ", ".join(map(str, self.without_polygon[:10])) or "none",
            )

    def _record(
        self, annotation: Mapping[str, Any], size: tuple[int, int] | None
    ) -> AnnotationRecord | None:
        record: dict[str, Any] = {key: annotation[key] for key in self.keys if key in annotation}
        segmentation = record.get("segmentation")
        if segmentation:
            record["segmentation"] = self._segmentation(segmentation, annotation, size)
            if not record["segmentation"]:
                self.without_polygon.append(annotation["id"])
                return None
        else:
            record.pop("segmentation", None)  # an empty list, or null: this object has no mask
        if "keypoints" in record:
            self._take_keypoints(record, annotation)
        record["bbox"] = self._box(annotation)
        record["bbox_mode"] = BoxMode.XYWH_ABS
        record["category_id"] = self.to_contiguous[annotation["category_id"]]
        record.setdefault("iscrowd", 0)
        return cast(AnnotationRecord, record)

    def _box(self, annotation: Mapping[str, Any]) -> list[float]:
        box = annotation.get("bbox")
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(isinstance(v, int | float) for v in box)
        ):
            raise ValueError(
                f"{self._name(annotation)} needs a bbox of four numbers [x, y, width, height], has"
                f" {box!r}"
            )
        return box

    def _segmentation(
        self, segmentation: Any, annotation: Mapping[str, Any], size: tuple[int, int] | None
    ) -> Any:
        if isinstance(segmentation, dict):
            problem = rle_problem(segmentation, size)
            if problem:
                raise ValueError(f"{self._name(annotation)} {problem}")
            return segmentation
        if not isinstance(segmentation, list):
            raise ValueError(
                f"{self._name(annotation)} needs a segmentation of polygons or a run-length mask,"
                f" has {_shortened(segmentation)}"
            )
        problems = [polygon_problem(polygon) for polygon in segmentation]
        first = next((problem for problem in problems if problem), None)
        if first is None:
            return segmentation
        if not self.drop_bad_polygons:
            raise ValueError(
                f"{self._name(annotation)} {first}. Correct it, or leave such polygons out with"
                " drop_bad_polygons: true in the data set's entry under DATASETS.REGISTER"
            )
        self.num_dropped_polygons += sum(problem is not None for problem in problems)
        return [
            polygon
            for polygon, problem in zip(segmentation, problems, strict=True)
            if problem is None
        ]

    def _take_keypoints(self, record: dict[str, Any], annotation: Mapping[str, Any]) -> None:
        keypoints = record["keypoints"]
        if not keypoints:
            del record["keypoints"]
            return
        self._require_keypoints(keypoints, annotation)
        # COCO's files count pixels; records, like boxes and polygons, measure from the corner of
        # the first pixel.
        record["keypoints"] = [
            value if i % 3 == 2 else value + 0.5 for i, value in enumerate(keypoints)
        ]

    def _require_keypoints(self, keypoints: Any, annotation: Mapping[str, Any]) -> None:
        if not isinstance(keypoints, list) or len(keypoints) % 3:
            raise ValueError(
                f"{self._name(annotation)} needs keypoints of three numbers each (x, y,"
                " visibility), has"
                f" {len(keypoints) if isinstance(keypoints, list) else _shortened(keypoints)}"
                " numbers"
            )
        if not set(map(type, keypoints)) <= {
            int,
            float,
        }:  # an eighth of the time that asking one by one takes
            raise ValueError(
                f"{self._name(annotation)} needs keypoints that are numbers, has"
                f" {_shortened(keypoints)}"
            )
        category, found = annotation["category_id"], len(keypoints) // 3
        first = self._first_with_keypoints.setdefault(category, annotation["id"])
        expected = self._keypoint_counts.setdefault(category, found)
        if found != expected:
            whence = (
                f"category {category} lists {expected}"
                if first == annotation["id"]
                else f"others of its category (annotation {first}) have {expected}"
            )
            raise ValueError(
                f"{self._name(annotation)} has {found} keypoints ({len(keypoints)} numbers), but"
                f" {whence}: it needs {3 * expected} numbers"
            )

    def _name(self, annotation: Mapping[str, Any]) -> str:
        return f"annotation {annotation['id']} of {self.json_file}"


def polygon_problem(polygon: Any) -> str | None:
    """Say what is wrong with a polygon `[x0, y0, x1, y1, ...]`, None if nothing is. Whether it has
    an area is not.
    """
    if not isinstance(polygon, list):
        return f"needs polygons that are lists of numbers, has {_shortened(polygon)}"
    if not _are_numbers(polygon):
        return f"has a polygon with {_first_stray(polygon)!r} among its numbers"
    if len(polygon) % 2:
        return (
            f"has a polygon of {len(polygon)} numbers, but x and y alternate: the number must be"
            " even"
        )
    if len(polygon) < 2 * _MIN_POLYGON_POINTS:
        return (
            f"has a polygon of {len(polygon) // 2} points, {_shortened(polygon)}: it needs at least"
            f" {_MIN_POLYGON_POINTS}"
        )
    return None


def rle_problem(rle: Mapping[str, Any], image_size: tuple[int, int] | None) -> str | None:
    """Say what is wrong with a mask in run-length encoding, None if nothing is that can be seen without decoding it.

    Args:
        rle: As in COCO's files.
        image_size: `(height, width)` that it must have, None where that is not known.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not isinstance(counts, str | bytes | list)
    ):
        return (
            "needs a run-length mask with size [height, width] and counts, has"
            f" {_shortened(dict(rle))}"
        )
    if image_size is not None and tuple(size) != tuple(image_size):
        return (
            f"has a run-length mask of {size[0]}x{size[1]} (height x width), but its image is "
            f"{image_size[0]}x{image_size[1]}"
        )
    if not _are_numbers(size) or (isinstance(counts, list) and not _are_numbers(counts)):
        return (
            "needs a run-length mask whose size and counts are numbers, has"
            f" {_shortened(dict(rle))}"
        )
    if isinstance(counts, list) and sum(counts) != size[0] * size[1]:
        return (
            f"has a run-length mask whose counts add up to {sum(counts)}, not to {size[0]} x"
            f" {size[1]} pixels"
        )
    return None


def _are_numbers(values: Sequence[Any]) -> bool:
    # By type rather than with isinstance: all polygons of COCO's training set go through here.
    return _NUMBERS.issuperset(map(type, values))


def _first_stray(values: Sequence[Any]) -> Any:
    return next(value for value in values if type(value) not in _NUMBERS)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
