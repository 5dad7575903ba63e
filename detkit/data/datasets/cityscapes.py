"""Cityscapes: streets of 50 cities, finely annotated; instances of 8 classes, and label maps of 19.

Source: Cordts et al. 2016, arXiv 1604.01685; files: https://www.cityscapes-dataset.com.

Legend: H and W height and width of an image, h and w of a window in it.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw

from detkit.data.datasets.builtin_meta import CITYSCAPES_LABELS, cityscapes_metadata
from detkit.data.datasets.coco_panoptic import load_coco_panoptic_json
from detkit.data.datasets.json_file import read_json, section
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord
from detkit.structures.mask_formats import box_of_bitmask, window_to_rle
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.image import read_image_size, read_label_map
from detkit.utils.logger import FILE_ONLY
from detkit.utils.text import shortened

logger = logging.getLogger(__name__)

_IMAGE_ENDING = "_leftImg8bit.png"
_THINGS = cityscapes_metadata()["thing_dataset_id_to_contiguous_id"]
_THING_NAMES = {name: index for index, name in enumerate(cityscapes_metadata()["thing_classes"])}
# Cityscapes' scripts do not draw these: their ids are negative.
_NOT_DRAWN = ("license plate", "license plategroup")
_FARTHEST = 1e6


def load_cityscapes_instances(
    image_dir: str, gt_dir: str, from_json: bool = True
) -> list[ImageRecord]:
    """Load the instances of the 8 classes of things.

    Args:
        image_dir: Images, in a folder per city, such as `leftImg8bit/train`.
        gt_dir: Annotations, likewise, such as `gtFine/train`.
        from_json: Draw the polygons of `*_gtFine_polygons.json`, one over the other as they are
            listed, as Cityscapes' own scripts do. Otherwise read `*_gtFine_instanceIds.png`, which
            these scripts drew. Both give the same records.

    Returns:
        Records in the order of cities and files, with run-length masks. Groups of objects that are
        not told apart are crowds.

    Raises:
        MissingFileError: A folder or an annotation file is missing.
        DataError: An annotation has another size than its image, or cannot be read.
    """
    ending = "_gtFine_polygons.json" if from_json else "_gtFine_instanceIds.png"
    masks_of, records = _masks_of_json if from_json else _masks_of_png, []
    for image, annotation_file in _pairs(image_dir, gt_dir, ending):
        size = read_image_size(str(image))
        records.append(_record(image, size, masks_of(annotation_file, size)))
    logger.info("loaded %d images of Cityscapes from %s", len(records), image_dir, extra=FILE_ONLY)
    return records


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[ImageRecord]:
    """Pair images with `*_gtFine_labelTrainIds.png`: 19 classes, and 255 for ignored pixels.

    Raises:
        MissingFileError: A folder or a label map is missing. The download has `labelIds` only:
            `write_train_ids` converts them.
    """
    records = []
    for image, labels in _pairs(image_dir, gt_dir, "_gtFine_labelTrainIds.png"):
        height, width = read_image_size(str(image))
        records.append(
            {
                "file_name": str(image),
                "image_id": image.name,
                "sem_seg_file_name": str(labels),
                "height": height,
                "width": width,
            }
        )
    return cast(list[ImageRecord], records)


def load_cityscapes_panoptic(
    image_dir: str, gt_dir: str, gt_json: str, meta: Mapping[str, Any]
) -> list[ImageRecord]:
    """Load the segments that Cityscapes' script `createPanopticImgs.py` has written.

    Args:
        image_dir: Images, in a folder per city, such as `leftImg8bit/train`.
        gt_dir: The png, such as `gtFine/cityscapes_panoptic_train`.
        gt_json: The json beside it.
        meta: See `load_coco_panoptic_json`.

    Returns:
        Records with `pan_seg_file_name` and `segments_info`, in the order of the json.

    Raises:
        MissingFileError: An image, a png or the json does not exist.
        DataError: See `load_coco_panoptic_json`.
    """
    records = []
    for record in load_coco_panoptic_json(gt_json, image_dir, gt_dir, meta):
        # The json names an image after its png, and not where it is.
        frame = str(record["image_id"])
        image = str(Path(image_dir, frame.partition("_")[0], frame + _IMAGE_ENDING))
        height, width = read_image_size(image)
        records.append({**record, "file_name": image, "height": height, "width": width})
    return cast(list[ImageRecord], records)


def write_train_ids(gt_dir: str) -> int:
    """Write `*_labelTrainIds.png` for every `*_gtFine_labelIds.png`, and return their number."""
    from_ids = np.full(256, 255, np.uint8)
    for train_id, label in enumerate(CITYSCAPES_LABELS):
        from_ids[label.id] = train_id
    files = sorted(Path(gt_dir).rglob("[!.]*_gtFine_labelIds.png"))
    for file in files:
        labels = Image.fromarray(from_ids[read_label_map(str(file))])
        labels.save(file.with_name(file.name.replace("_labelIds", "_labelTrainIds")))
    return len(files)


def _pairs(image_dir: str, gt_dir: str, ending: str) -> list[tuple[Path, Path]]:
    """Return the image file and the annotation file of every image below `image_dir`."""
    if not Path(image_dir).is_dir():
        raise MissingFileError(f"folder {image_dir} of Cityscapes does not exist")
    pairs = []
    for image in sorted(Path(image_dir).glob(f"*/[!.]*{_IMAGE_ENDING}")):
        name = image.name.removesuffix(_IMAGE_ENDING) + ending
        pairs.append((image, Path(gt_dir, image.parent.name, name)))
    if not pairs:
        raise MissingFileError(f"folder {image_dir} of Cityscapes has no CITY/*{_IMAGE_ENDING}")
    missing = [annotation for _, annotation in pairs if not annotation.is_file()]
    if missing:
        hint = " Write them with datasets/prepare_cityscapes.py." if "TrainIds" in ending else ""
        raise MissingFileError(
            f"{len(missing)} of {len(pairs)} images in {image_dir} have no annotation, first"
            f" {missing[0]}.{hint}"
        )
    return pairs


# One object: its class, whether it is a crowd, its window (x, y), and its pixels there (h, w).
_Mask = tuple[int, bool, tuple[int, int], np.ndarray]


def _masks_of_json(file: Path, image_size: tuple[int, int]) -> Iterator[_Mask]:
    """Draw all polygons, and yield what remains visible of each object."""
    content = read_json(str(file))
    _require_size(file, (content.get("imgHeight"), content.get("imgWidth")), image_size)
    objects = section(content, "objects", str(file))
    corners_of = [_corners(entry, f"object {i} of {file}") for i, entry in enumerate(objects)]
    canvas = Image.new("I", (image_size[1], image_size[0]))
    draw = ImageDraw.Draw(canvas)
    # Later objects of the list lie in front of earlier ones.
    for number, (entry, corners) in enumerate(zip(objects, corners_of, strict=True), start=1):
        if entry["label"] not in _NOT_DRAWN:
            draw.polygon(corners.reshape(-1).tolist(), fill=number)
    drawn = np.asarray(canvas)
    for number, (entry, corners) in enumerate(zip(objects, corners_of, strict=True), start=1):
        name = entry["label"].removesuffix("group")
        if name in _THING_NAMES:
            x, y = (int(side) for side in np.maximum(np.floor(corners.min(axis=0)), 0))
            right, bottom = (int(side) for side in np.ceil(corners.max(axis=0)) + 1)
            window = drawn[y : max(bottom, 0), x : max(right, 0)] == number
            yield _THING_NAMES[name], entry["label"] != name, (x, y), window


def _corners(entry: dict[str, Any], where: str) -> np.ndarray:
    """Return the corners of an object's polygon, (P, 2) float64 x and y."""
    if not isinstance(entry.get("label"), str):
        raise DataError(f"{where} (from 0) needs a label, has {shortened(entry)}")
    try:
        corners = np.array(entry.get("polygon"), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        corners = np.zeros(0)
    if corners.shape[1:] != (2,) or len(corners) < 2 or not np.abs(corners).max() <= _FARTHEST:
        raise DataError(
            f"{where} (from 0), {entry['label']}, needs a polygon of corners [x, y] in pixels, has"
            f" {shortened(entry.get('polygon'))}"
        )
    return corners


def _require_size(file: Path, size: tuple[Any, ...], image_size: tuple[int, int]) -> None:
    if size != image_size:
        raise DataError(
            f"annotation {file} is {size[1]}x{size[0]} (width x height), its image"
            f" {image_size[1]}x{image_size[0]}"
        )


def _masks_of_png(file: Path, image_size: tuple[int, int]) -> Iterator[_Mask]:
    """Yield the instances of a map of ids: 1000 * label + number, or the label for a group."""
    ids = read_label_map(str(file)).astype(np.int64)
    _require_size(file, ids.shape, image_size)
    # Things only: two megapixels, most of them road and buildings, are compared once, not once for
    # each instance.
    rows, columns = np.nonzero(ids >= min(_THINGS))
    values = ids[rows, columns]
    for instance_id in np.unique(values).tolist():
        label = instance_id // 1000 if instance_id >= 1000 else instance_id
        if label in _THINGS:
            own_rows, own_columns = rows[values == instance_id], columns[values == instance_id]
            y, bottom = int(own_rows.min()), int(own_rows.max()) + 1
            x, right = int(own_columns.min()), int(own_columns.max()) + 1
            window = ids[y:bottom, x:right] == instance_id
            yield _THINGS[label], instance_id < 1000, (x, y), window


def _record(image: Path, size: tuple[int, int], masks: Iterator[_Mask]) -> ImageRecord:
    annotations = []
    for class_index, is_crowd, corner, window in masks:
        if window.any():
            annotations.append(_annotation(class_index, is_crowd, corner, window, size))
    return {
        "file_name": str(image),
        "image_id": image.name,
        "height": size[0],
        "width": size[1],
        "annotations": annotations,
    }


def _annotation(
    class_index: int,
    is_crowd: bool,
    corner: tuple[int, int],
    window: np.ndarray,
    size: tuple[int, int],
) -> AnnotationRecord:
    x, y = corner
    x0, y0, x1, y1 = box_of_bitmask(window)
    return {
        "bbox": [float(x + x0), float(y + y0), float(x + x1), float(y + y1)],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": class_index,
        "iscrowd": int(is_crowd),
        "segmentation": window_to_rle(window, y, x, size),
    }
