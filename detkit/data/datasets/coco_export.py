"""Any registered data set as COCO json: one format that every COCO tool reads."""

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, as_flag
from detkit.structures.mask_formats import bitmask_to_rle, polygon_area, rle_counts, rle_record
from detkit.utils.errors import DataError

logger = logging.getLogger(__name__)


def convert_to_coco_json(
    dataset_name: str, output_file: str | os.PathLike[str], allow_cached: bool = False
) -> None:
    """Write a registered data set as a COCO json file, replacing what is there.

    Args:
        dataset_name: A name in `DatasetCatalog`.
        output_file: The file; missing folders are created.
        allow_cached: Not used, Detectron2's way to keep an older file.

    Raises:
        DataError: See `records_to_coco_dict`.
    """
    # An existing file is not used: it may be of a data set that has changed since.
    output_path = Path(output_file)
    coco = convert_to_coco_dict(dataset_name)
    output_path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that another process never reads half a file.
    partial_path = output_path.with_name(f"{output_path.name}.{os.getpid()}.partial")
    partial_path.write_text(json.dumps(coco), encoding="utf-8")
    partial_path.replace(output_path)
    logger.info(
        "wrote %d images of %s as COCO json to %s", len(coco["images"]), dataset_name, output_path
    )


def convert_to_coco_dict(dataset_name: str) -> dict[str, Any]:
    """Return a registered data set as the content of a COCO json file.

    See `records_to_coco_dict`.
    """
    return records_to_coco_dict(dataset_name, DatasetCatalog.get(dataset_name))


def records_to_coco_dict(dataset_name: str, records: Sequence[ImageRecord]) -> dict[str, Any]:
    """Return the records of a data set as the content of a COCO json file.

    - Boxes are XYWH in full precision. Bitmaps become run-length masks; other masks are kept.
    - Keypoints number pixels, as COCO's files do: half a pixel less than in the records.
    - `area` is the record's own, else that of its mask, else that of its box.
    - Pascal VOC's `difficult` is kept; COCO's metric does not know it.
    - Image ids are kept if all are integers; otherwise images are numbered from 1 in the order of
      the records (see `coco_image_ids`).
    - Category ids are those of the data set, otherwise the contiguous class ids.
    - Annotations are numbered from 1: COCO tools take 0 for "matched to nothing".

    Args:
        dataset_name: The data set whose metadata has class names and category ids.
        records: Its records. Not changed, and polygons are not copied.

    Returns:
        `info`, `images`, `categories` and `annotations`; the last is missing if no record has
        annotations (a test set whose ground truth is not published).

    Raises:
        DataError: There are no class names, a class id lies outside of them, or an image id
            appears twice.
    """
    class_names = class_names_of(dataset_name)
    category_ids = category_ids_of(dataset_name)
    image_ids = coco_image_ids(dataset_name, records)
    images = []
    for record in records:
        image = {"id": image_ids[record["image_id"]], "file_name": record["file_name"]}
        for side in ("height", "width"):
            pixels = record.get(side)
            if pixels is not None:
                image[side] = int(pixels)
        images.append(image)
    keypoints = _keypoint_entry(dataset_name)
    categories = [
        {"id": category_id, "name": name, **keypoints}
        for category_id, name in zip(category_ids, class_names, strict=True)
    ]
    coco: dict[str, Any] = {
        "info": {"description": f"{dataset_name}, written by detkit"},
        "images": images,
        "categories": categories,
    }
    if any("annotations" in record for record in records):
        coco["annotations"] = _annotation_entries(dataset_name, records, image_ids, category_ids)
    return coco


def class_names_of(dataset_name: str) -> list[str]:
    """Return the class names of a data set in the order of the contiguous ids.

    Raises:
        DataError: Its metadata has none. Those of a COCO file are known once it has been loaded.
    """
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    if not names:
        raise DataError(
            f"data set {dataset_name!r} has no class names: "
            f"set MetadataCatalog.get({dataset_name!r}).thing_classes = [...]"
        )
    repeated = sorted({name for name in names if list(names).count(name) > 1})
    if repeated:  # one would overwrite the score of the other
        raise DataError(f"data set {dataset_name!r} has class names twice: {', '.join(repeated)}")
    return list(names)


def _keypoint_entry(dataset_name: str) -> dict[str, Any]:
    """Return the part of a category that names its keypoints; empty if there are none."""
    metadata = MetadataCatalog.get(dataset_name)
    names = list(metadata.get("keypoint_names") or ())
    rules = metadata.get("keypoint_connection_rules") or ()
    # COCO's skeletons count keypoints from 1.
    skeleton = [[names.index(a) + 1, names.index(b) + 1] for a, b, _ in rules]
    return {"keypoints": names, "skeleton": skeleton} if names else {}


def category_ids_of(dataset_name: str) -> list[int]:
    """Return the category id of each contiguous class id in the data set's own files.

    It is the contiguous id itself if the data set has no other ones, the lowest one if several ids
    share a class, and one that is not in use for a class that the files lack.
    """
    to_contiguous = MetadataCatalog.get(dataset_name).get("thing_dataset_id_to_contiguous_id") or {}
    unused = max(to_contiguous, default=-1) + 1
    category_ids = list(range(unused, unused + len(class_names_of(dataset_name))))
    # From the highest id to the lowest, which overwrites the others.
    for dataset_id in sorted(to_contiguous, reverse=True):
        category_ids[to_contiguous[dataset_id]] = dataset_id
    return category_ids


def coco_image_ids(dataset_name: str, records: Sequence[ImageRecord]) -> dict[int | str, int]:
    """Return image id -> the integer that stands for it in COCO json.

    It is the id itself if all ids are integers, otherwise the image's number from 1. The format
    asks for integers, and some tools convert: they would take VOC's "000005" for 5 and fail at
    "2008_000008".

    Raises:
        DataError: An id appears twice.
    """
    first_use: dict[int | str, ImageRecord] = {}
    for record in records:
        # `setdefault` returns the record that had the id first.
        other = first_use.setdefault(record["image_id"], record)
        if other is not record:
            raise DataError(
                f"data set {dataset_name!r} uses image id {record['image_id']!r} twice: for"
                f" {other['file_name']} and {record['file_name']}"
            )
    if all(isinstance(image_id, Integral) for image_id in first_use):
        return {image_id: int(image_id) for image_id in first_use}
    return {image_id: number for number, image_id in enumerate(first_use, start=1)}


def annotation_area(annotation: Mapping[str, Any], box_xywh: Sequence[float]) -> float:
    """Return the area by which COCO calls an object small, medium or large.

    Args:
        annotation: Its `area` counts if it has one, else the area of its `segmentation`.
        box_xywh: Its box, whose area counts if it has neither.
    """
    area, segmentation = annotation.get("area"), annotation.get("segmentation")
    if area is not None:
        return float(area)
    if isinstance(segmentation, np.ndarray):
        return float(np.count_nonzero(segmentation))
    if not segmentation:
        return float(box_xywh[2] * box_xywh[3])
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        if isinstance(counts, list):  # uncompressed runs alternate, starting with background
            return float(sum(counts[1::2]))
        return float(rle_counts(segmentation)[1::2].sum())
    polygons = [np.asarray(polygon, dtype=float) for polygon in segmentation]
    return sum(polygon_area(polygon[0::2], polygon[1::2]) for polygon in polygons)


def _annotation_entries(
    dataset_name: str,
    records: Sequence[ImageRecord],
    image_ids: Mapping[int | str, int],
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for record in records:
        for annotation in record.get("annotations", ()):
            class_id = annotation["category_id"]
            if not 0 <= class_id < len(category_ids):
                raise DataError(
                    f"data set {dataset_name!r} has {len(category_ids)} class names, but an object"
                    f" of class id {class_id} in image {record['image_id']!r}"
                    f" ({record['file_name']})"
                )
            keys = {
                "id": len(entries) + 1,
                "image_id": image_ids[record["image_id"]],
                "category_id": category_ids[class_id],
            }
            try:
                entries.append(keys | _annotation_content(annotation))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise DataError(
                    f"object {len(entries) + 1} in image {record['image_id']!r}"
                    f" ({record['file_name']}) of data set {dataset_name!r} cannot be read:"
                    f" {error if isinstance(error, ValueError) else repr(error)}"
                ) from error
    return entries


def _annotation_content(annotation: AnnotationRecord) -> dict[str, Any]:
    numbers, mode = list(annotation["bbox"]), annotation["bbox_mode"]
    if mode != BoxMode.XYWHA_ABS:
        numbers = BoxMode.convert(numbers, mode, BoxMode.XYWH_ABS)
    box = [float(x) for x in numbers]
    if not math.isfinite(sum(box)):
        raise ValueError(f"its box {annotation['bbox']} is not finite: correct or remove it")
    content: dict[str, Any] = {
        "bbox": box,
        "area": annotation_area(annotation, box),
        "iscrowd": as_flag(annotation.get("iscrowd")),
    }
    if as_flag(annotation.get("difficult")):
        content["difficult"] = 1
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, np.ndarray) or segmentation:
        content["segmentation"] = _json_segmentation(segmentation)
    if "keypoints" in annotation:
        keypoints = annotation["keypoints"]
        content["keypoints"] = [
            value if i % 3 == 2 else value - 0.5 for i, value in enumerate(keypoints)
        ]
        content["num_keypoints"] = sum(visibility > 0 for visibility in keypoints[2::3])
    return content


def _json_segmentation(segmentation: Any) -> Any:
    if isinstance(segmentation, np.ndarray):
        return bitmask_to_rle(segmentation)
    if isinstance(segmentation, Mapping):
        is_compressed = isinstance(segmentation["counts"], bytes)
        return rle_record(segmentation) if is_compressed else segmentation
    return [
        polygon.tolist() if isinstance(polygon, np.ndarray) else polygon for polygon in segmentation
    ]
