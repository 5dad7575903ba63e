"""Cityscapes: streets of 50 cities, finely annotated; instances of 8 classes, and label maps of 19.

Source: Cordts et al. 2016, arXiv 1604.01685; files: https://www.cityscapes-dataset.com.

Legend: H and W height and width of an image, h and w of a window in it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util

from detkit.data.datasets.builtin_meta import CITYSCAPES_LABELS, cityscapes_metadata
from detkit.data.datasets.json_file import read_json
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, RLERecord
from detkit.utils.image import read_image_size, read_label_map

logger = logging.getLogger(__name__)

_IMAGE_ENDING = "_leftImg8bit.png"
_THINGS = cityscapes_metadata()["thing_dataset_id_to_contiguous_id"]
_THING_NAMES = {name: index for index, name in enumerate(cityscapes_metadata()["thing_classes"])}
# Drawn by nobody: the format gives it a negative id.
_NOT_DRAWN = ("license plate", "license plategroup")


def load_cityscapes_instances(
    image_dir: str, gt_dir: str, from_json: bool = True
) -> list[ImageRecord]:
    """Read the instances of the 8 classes of things.

    Args:
        image_dir: Folder with a folder per city, such as `leftImg8bit/train`.
        gt_dir: The same of annotations, such as `gtFine/train`.
        from_json: Draw the polygons of `*_gtFine_polygons.json`, one over the other as they are
            listed, as Cityscapes' own scripts do. Otherwise take `*_gtFine_instanceIds.png`, which
            these scripts drew. Both give the same.

    Returns:
        Records in the order of cities and files, with masks in run-length encoding. Groups that are
        not told apart are crowds.

    Raises:
        FileNotFoundError: A folder or an annotation file is missing.
    """
    ending = "_gtFine_polygons.json" if from_json else "_gtFine_instanceIds.png"
    records = []
    for image, annotation_file in _pairs(image_dir, gt_dir, ending):
        masks = _masks_of_json(annotation_file) if from_json else _masks_of_png(annotation_file)
        records.append(_record(image, masks))
    logger.info("loaded %d images of Cityscapes from %s", len(records), image_dir)
    return records


def load_cityscapes_semantic(image_dir: str, gt_dir: str) -> list[ImageRecord]:
    """Pair images with `*_gtFine_labelTrainIds.png`, whose pixels are 0 to 18, or 255 for what is not evaluated.

    Raises:
        FileNotFoundError: A folder or a label map is missing. The download has `labelIds` only:
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


def write_train_ids(gt_dir: str) -> int:
    """Write `*_gtFine_labelTrainIds.png` beside every `*_gtFine_labelIds.png` below a folder, and
    give their number.
    """
    from_ids = np.full(256, 255, np.uint8)
    for train_id, label in enumerate(CITYSCAPES_LABELS):
        from_ids[label.id] = train_id
    files = sorted(Path(gt_dir).rglob("*_gtFine_labelIds.png"))
    for file in files:
        labels = Image.fromarray(from_ids[read_label_map(str(file))])
        labels.save(file.with_name(file.name.replace("_labelIds", "_labelTrainIds")))
    return len(files)


def _pairs(image_dir: str, gt_dir: str, ending: str) -> list[tuple[Path, Path]]:
    """Return image and annotation file of every image below `image_dir`."""
    if not Path(image_dir).is_dir():
        raise FileNotFoundError(f"folder {image_dir} of Cityscapes does not exist")
    pairs = [
        (image, Path(gt_dir, image.parent.name, image.name.removesuffix(_IMAGE_ENDING) + ending))
        for image in sorted(Path(image_dir).glob(f"*/*{_IMAGE_ENDING}"))
    ]
    if not pairs:
        raise FileNotFoundError(f"folder {image_dir} of Cityscapes has no CITY/*{_IMAGE_ENDING}")
    missing = [annotation for _, annotation in pairs if not annotation.is_file()]
    if missing:
        hint = " Write them with datasets/prepare_cityscapes.py." if "TrainIds" in ending else ""
        raise FileNotFoundError(
            f"{len(missing)} of {len(pairs)} images in {image_dir} have no annotation, first"
            f" {missing[0]}.{hint}"
        )
    return pairs


# One object: its class, whether it is a crowd, its window (x, y), its pixels there (h, w), and the
# image's size.
_Mask = tuple[int, bool, tuple[int, int], np.ndarray, tuple[int, int]]


def _masks_of_json(file: Path) -> Iterator[_Mask]:
    """Draw the polygons, and give what is left of each object when all are drawn."""
    content = read_json(str(file))
    size = (content["imgHeight"], content["imgWidth"])
    canvas = Image.new("I", size[::-1])
    draw, objects = ImageDraw.Draw(canvas), content["objects"]
    for number, entry in enumerate(objects, start=1):
        if entry["label"] not in _NOT_DRAWN:
            draw.polygon([tuple(point) for point in entry["polygon"]], fill=number)
    drawn = np.asarray(canvas)
    for number, entry in enumerate(objects, start=1):
        name = entry["label"].removesuffix("group")
        if name in _THING_NAMES:
            corners = np.array(entry["polygon"], dtype=np.float64)
            x, y = (int(side) for side in np.maximum(np.floor(corners.min(axis=0)), 0))
            right, bottom = (int(side) for side in np.ceil(corners.max(axis=0)) + 1)
            window = drawn[y : max(bottom, 0), x : max(right, 0)] == number
            yield _THING_NAMES[name], entry["label"] != name, (x, y), window, size


def _masks_of_png(file: Path) -> Iterator[_Mask]:
    """Split the map of instances: 1000 * label + number, or the label alone for a group."""
    ids = read_label_map(str(file)).astype(np.int64)
    rows, columns = np.nonzero(ids >= min(_THINGS))
    values = ids[rows, columns]
    for instance_id in np.unique(values).tolist():
        label = instance_id // 1000 if instance_id >= 1000 else instance_id
        if label in _THINGS:
            own = values == instance_id
            (y, bottom), (x, right) = (
                (int(v[own].min()), int(v[own].max()) + 1) for v in (rows, columns)
            )
            window = ids[y:bottom, x:right] == instance_id
            yield _THINGS[label], instance_id < 1000, (x, y), window, ids.shape


def _record(image: Path, masks: Iterator[_Mask]) -> ImageRecord:
    height, width = read_image_size(str(image))
    annotations = []
    for class_index, is_crowd, corner, window, size in masks:
        if size != (height, width):
            raise ValueError(
                f"the annotation of {image} is {size[1]}x{size[0]} (width x height), the image"
                f" {width}x{height}"
            )
        if window.any():
            annotations.append(_annotation(class_index, is_crowd, corner, window, size))
    return {
        "file_name": str(image),
        "image_id": image.name,
        "height": height,
        "width": width,
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
    columns, rows = np.flatnonzero(window.any(axis=0)), np.flatnonzero(window.any(axis=1))
    box = (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)
    return {
        "bbox": [float(side) for side in box],
        "bbox_mode": BoxMode.XYXY_ABS,
        "category_id": class_index,
        "iscrowd": int(is_crowd),
        "segmentation": window_rle(window, corner, size),
    }


def window_rle(
    window: np.ndarray, corner: tuple[int, int], image_size: tuple[int, int]
) -> RLERecord:
    """Return the run lengths of a mask in an image, of which only a window, (h, w) bool, is not empty.

    Encoding the window alone takes a hundredth of the time for an image of two megapixels.

    Args:
        window: The pixels in the window.
        corner: x and y of its upper left pixel.
        image_size: `(height, width)` of the image.
    """
    (x, y), (height, width) = corner, image_size
    # Column by column, as the format goes, each with an empty cell behind it, so that every run
    # ends in its column.
    cells = np.column_stack([window.T, np.zeros(window.shape[1], dtype=bool)]).ravel()
    edges = np.flatnonzero(np.diff(np.concatenate([[False], cells]).astype(np.int8)))
    column, row = edges // (window.shape[0] + 1), edges % (window.shape[0] + 1)
    places = (x + column) * height + y + row
    counts = np.diff(np.concatenate([[0], places, [height * width]])).tolist()
    mask_api: Any = mask_util
    rle = mask_api.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}
