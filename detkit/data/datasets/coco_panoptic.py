"""Panoptic data sets in COCO's format: one png of segments per image, and a json describing them.

There are two ways to use one: joined, with things and stuff in one list of segments; or separated,
with instances from one json and stuff from label maps, as Panoptic FPN trains.

Format: https://cocodataset.org/#format-data, section 4.
"""

import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

import numpy as np
from PIL import Image

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.json_file import (
    DataFolder,
    as_number,
    by_id,
    known_id,
    read_json,
    require_ids_of_64_bits,
    section,
)
from detkit.data.datasets.sem_seg import load_sem_seg
from detkit.structures import ImageRecord, as_flag
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import PathManager
from detkit.utils.image import upright_pixels
from detkit.utils.image_file import opened_image, read_image_bytes
from detkit.utils.logger import FILE_ONLY
from detkit.utils.text import listed, shortened

logger = logging.getLogger(__name__)

IGNORE_LABEL = 255
# A segment's id in an evaluation is its class * LABEL_DIVISOR + its number, as in Detectron2.
LABEL_DIVISOR = 1000


def load_coco_panoptic_json(
    json_file: str, image_dir: str, gt_dir: str, meta: Mapping[str, Any]
) -> list[ImageRecord]:
    """Load a panoptic json.

    Args:
        json_file: Its path.
        image_dir: Folder of images. Their names are those in `images` of the json, by `image_id`;
            without an entry there, those of the png with the ending .jpg.
        gt_dir: Folder of the png.
        meta: `thing_dataset_id_to_contiguous_id` and `stuff_dataset_id_to_contiguous_id`.

    Returns:
        Records with `pan_seg_file_name` and `segments_info`; in these, `category_id` is contiguous.

    Raises:
        MissingFileError: The json, or a png that it names, does not exist.
        DataError: The json lacks a part, names a file outside of the folders, or a segment has an
            unknown category.
    """
    content = read_json(json_file)
    annotations = panoptic_annotations(content, json_file)
    require_panoptic_files(annotations, gt_dir, json_file)
    listed_images = by_id(
        section({"images": [], **content}, "images", json_file), "image", json_file
    )
    things = meta["thing_dataset_id_to_contiguous_id"]
    stuff = meta["stuff_dataset_id_to_contiguous_id"]
    images, segments = DataFolder(image_dir, json_file), DataFolder(gt_dir, json_file)
    records: list[dict[str, Any]] = []
    for annotation in annotations:
        segments_info = []
        for segment in annotation["segments_info"]:
            category = known_id(segment["category_id"], {**stuff, **things})
            if category is None:
                raise DataError(
                    f"segment {segment['id']} of image id {annotation['image_id']!r} in"
                    f" {json_file} has category {segment['category_id']!r}, which is neither a"
                    " thing nor stuff of the data set"
                )
            is_thing = category in things
            class_id = things[category] if is_thing else stuff[category]
            segments_info.append({**segment, "category_id": class_id, "isthing": is_thing})
        image_id = known_id(annotation["image_id"], listed_images)
        image = listed_images[image_id].get("file_name") if image_id is not None else None
        if not isinstance(image, str) or not image:
            image = str(Path(annotation["file_name"]).with_suffix(".jpg"))
        records.append(
            {
                "file_name": images.path_of(image),
                "image_id": annotation["image_id"],
                "pan_seg_file_name": segments.path_of(annotation["file_name"]),
                "segments_info": segments_info,
            }
        )
    logger.info(
        "loaded %d images in COCO's panoptic format from %s",
        len(records),
        json_file,
        extra=FILE_ONLY,
    )
    return cast(list[ImageRecord], records)


def panoptic_annotations(content: dict[str, Any], json_file: str) -> list[dict[str, Any]]:
    """Return the annotations of a panoptic json, one per image, after checking their form.

    Args:
        content: Of the json.
        json_file: Its path, for messages.

    Raises:
        DataError: An annotation or a segment lacks a part, or two have the same image.
    """
    annotations = section(content, "annotations", json_file)
    for annotation in annotations:
        required = ("image_id", "file_name", "segments_info")
        lacking = [key for key in required if key not in annotation]
        if lacking:
            raise DataError(
                f"an annotation of {json_file} lacks {', '.join(lacking)}; it has"
                f" {sorted(annotation)}"
            )
        where = f"the annotation of image id {annotation['image_id']!r} in {json_file}"
        if not isinstance(annotation["file_name"], str):
            raise DataError(f"{where} needs a file_name that is text")
        for segment in section(annotation, "segments_info", where):
            number = as_number(segment.get("id"))
            if isinstance(number, float) and number.is_integer():
                number = int(number)
            if "category_id" not in segment or not isinstance(number, int):
                raise DataError(
                    f"{where} needs segments with id, a whole number, and category_id; it has"
                    f" {shortened(segment, 80)}"
                )
            segment["id"] = number  # some tools write "5" or 5.0
            try:
                as_flag(segment.get("iscrowd"))
            except DataError as error:
                raise DataError(f"{where} has a wrong iscrowd: {error}") from error
        ids = [segment["id"] for segment in annotation["segments_info"]]
        require_ids_of_64_bits([annotation["image_id"], *ids], "image or segment", json_file)
        if len(set(ids)) < len(ids):
            repeated = [key for key, count in Counter(ids).items() if count > 1]
            raise DataError(f"{where} lists segments more than once: {listed(repeated)}")
    counts = Counter(str(annotation["image_id"]) for annotation in annotations)
    repeated = [image_id for image_id, count in counts.items() if count > 1]
    if repeated:
        raise DataError(f"{json_file} has several annotations of one image: {listed(repeated)}")
    return annotations


def require_panoptic_files(
    annotations: Sequence[Mapping[str, Any]], gt_dir: str, json_file: str
) -> None:
    """Check that the png of a panoptic json exist.

    Args:
        annotations: Of the json, from `panoptic_annotations`.
        gt_dir: Folder of the png.
        json_file: The json's path, for messages.

    Raises:
        MissingFileError: A png does not exist; the message names the first, and its image.
        DataError: An annotation names a png outside of the folder.
    """
    folder = DataFolder(gt_dir, json_file)
    for annotation in annotations:
        folder.path_of(annotation["file_name"])
    # One listing of the folder instead of a hundred thousand looks at files.
    present = set(PathManager.ls(gt_dir)) if PathManager.isdir(gt_dir) else set()
    missing = []
    for annotation in annotations:
        name = annotation["file_name"]
        exists = PathManager.isfile(f"{gt_dir}/{name}") if "/" in name else name in present
        if not exists:
            missing.append(annotation)
    if missing:
        first = missing[0]
        raise MissingFileError(
            f"{len(missing)} of {len(annotations)} panoptic png that {json_file} names do not"
            f" exist, first {gt_dir}/{first['file_name']} of image id {first['image_id']!r}"
        )


def register_coco_panoptic(
    name: str,
    metadata: Mapping[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    instances_json: str | None = None,
) -> None:
    """Register a panoptic data set, things and stuff joined.

    Args:
        name: Its name, as in `DATASETS.TRAIN`.
        metadata: Classes, and the two maps of ids that `load_coco_panoptic_json` needs.
        image_root: Folder of images.
        panoptic_root: Folder of the png.
        panoptic_json: The panoptic json.
        instances_json: The same things as boxes and masks, for evaluators; metadata only.
    """
    DatasetCatalog.register(
        name, functools.partial(_load_joined, panoptic_json, image_root, panoptic_root, name)
    )
    MetadataCatalog.get(name).set(
        panoptic_root=panoptic_root,
        image_root=image_root,
        panoptic_json=panoptic_json,
        json_file=instances_json,
        **{
            "evaluator_type": "coco_panoptic_seg",
            "ignore_label": IGNORE_LABEL,
            "label_divisor": LABEL_DIVISOR,
            **metadata,
        },
    )


def _load_joined(
    panoptic_json: str, image_root: str, panoptic_root: str, name: str
) -> list[ImageRecord]:
    return load_coco_panoptic_json(
        panoptic_json, image_root, panoptic_root, MetadataCatalog.get(name).as_dict()
    )


def register_coco_panoptic_separated(
    name: str,
    metadata: Mapping[str, Any],
    image_root: str,
    panoptic_root: str,
    panoptic_json: str,
    sem_seg_root: str,
    instances_json: str,
) -> None:
    """Register a panoptic data set for training instances and stuff apart.

    `NAME_separated` has instances and label maps of stuff, `NAME_stuffonly` the label maps alone.

    Args:
        name: The name without the endings.
        metadata: Classes of things, and of stuff, of which class 0 is all things.
        image_root: Folder of images.
        panoptic_root: Folder of panoptic png, for evaluation.
        panoptic_json: The panoptic json, for evaluation.
        sem_seg_root: Folder of label maps; see `separate_coco_semantic_from_panoptic`.
        instances_json: Boxes and masks of things.
    """
    separated, stuff_only = f"{name}_separated", f"{name}_stuffonly"
    DatasetCatalog.register(
        separated,
        functools.partial(load_separated, instances_json, image_root, sem_seg_root, separated),
    )
    common = {"sem_seg_root": sem_seg_root, "image_root": image_root, "ignore_label": IGNORE_LABEL}
    MetadataCatalog.get(separated).set(
        panoptic_root=panoptic_root,
        panoptic_json=panoptic_json,
        json_file=instances_json,
        evaluator_type="coco_panoptic_seg",
        **{**common, **metadata},
    )
    DatasetCatalog.register(stuff_only, functools.partial(load_sem_seg, sem_seg_root, image_root))
    MetadataCatalog.get(stuff_only).set(evaluator_type="sem_seg", **{**common, **metadata})


def load_separated(
    instances_json: str,
    image_root: str,
    sem_seg_root: str,
    name: str,
    *,
    drop_bad_polygons: bool = False,
) -> list[ImageRecord]:
    """Load instances, and pair them with label maps."""
    instances = load_coco_json(
        instances_json, image_root, name, drop_bad_polygons=drop_bad_polygons
    )
    # The label maps tell nothing of the endings of the images, which are jpg as a rule.
    endings = {PurePath(record["file_name"]).suffix[1:] for record in instances}
    labelled = []
    for ending in sorted(endings):
        labelled += load_sem_seg(sem_seg_root, image_root, image_ext=ending)
    return merge_to_panoptic(instances, labelled)


def merge_to_panoptic(
    detection_dicts: Sequence[ImageRecord], sem_seg_dicts: Sequence[ImageRecord]
) -> list[ImageRecord]:
    """Return the records of detection, each with the label map of the same image.

    Raises:
        DataError: An image that has a label map has no record of detection, or two have one file.
    """
    # By file, not by id: label maps are identified by their names alone.
    by_file = {record["file_name"]: record for record in detection_dicts}
    if len(by_file) < len(detection_dicts):
        counts = Counter(record["file_name"] for record in detection_dicts)
        repeated = [file for file, count in counts.items() if count > 1]
        raise DataError(f"several images with instances have one file: {listed(repeated, 3)}")
    stray = [record["file_name"] for record in sem_seg_dicts if record["file_name"] not in by_file]
    if stray:
        raise DataError(
            f"{len(stray)} of {len(sem_seg_dicts)} images with a label map are not among the"
            f" {len(by_file)} images with instances, first {stray[0]}"
        )
    return [
        cast(ImageRecord, {**record, **by_file[record["file_name"]]}) for record in sem_seg_dicts
    ]


def read_panoptic_png(file_name: str) -> np.ndarray:
    """Return the segment ids of a panoptic png, (H, W) int32: red + 256 green + 65536 blue.

    Raises:
        MissingFileError: The file does not exist.
        BadImageError: It is empty, damaged or too large.
        DataError: It is not an RGB image.
    """
    with opened_image(read_image_bytes(file_name, "panoptic png"), file_name) as image:
        mode, pixels = image.mode, upright_pixels(image)
    if mode not in ("RGB", "RGBA"):
        raise DataError(f"panoptic png {file_name} must be an RGB image, is of mode {mode}")
    # In int32: 65536 * 255 does not fit into the bytes of the image.
    red, green, blue = pixels[:, :, :3].astype(np.int32).transpose(2, 0, 1)
    return red + 256 * green + 65536 * blue


def separate_coco_semantic_from_panoptic(
    panoptic_json: str,
    panoptic_root: str,
    sem_seg_root: str,
    stuff_dataset_id_to_contiguous_id: Mapping[int, int],
) -> None:
    """Write the label maps of stuff: 0 for things, the class of stuff, 255 for the rest.

    Args:
        panoptic_json: The panoptic json.
        panoptic_root: Folder of its png.
        sem_seg_root: Folder to write the label maps to.
        stuff_dataset_id_to_contiguous_id: As in the metadata; categories not in it are things.

    Raises:
        MissingFileError: A png does not exist.
        DataError: The json lacks a part, or names a file outside of the folder.
    """
    annotations = panoptic_annotations(read_json(panoptic_json), panoptic_json)
    require_panoptic_files(annotations, panoptic_root, panoptic_json)
    Path(sem_seg_root).mkdir(parents=True, exist_ok=True)
    for annotation in annotations:
        # Pixels of no segment are unlabeled, and not trained on.
        segment_ids = read_panoptic_png(f"{panoptic_root}/{annotation['file_name']}")
        labels = np.full(segment_ids.shape, IGNORE_LABEL, np.uint8)
        for segment in annotation["segments_info"]:
            labels[segment_ids == segment["id"]] = stuff_dataset_id_to_contiguous_id.get(
                segment["category_id"], 0
            )
        target = Path(sem_seg_root, annotation["file_name"])
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(target)
