"""Writing of a registered data set in the format of COCO, VOC or YOLO, with its images."""

import contextlib
import filecmp
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import torch
import yaml

from detkit.data.catalog import MetadataCatalog
from detkit.data.datasets.coco_export import class_names_of, records_to_coco_dict
from detkit.data.datasets.formats.collected import hull
from detkit.data.datasets.formats.detect import CLASSES
from detkit.data.datasets.formats.yolo import label_file, read_data_yaml
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, as_flag, rotated_box_corners
from detkit.utils.errors import DataError
from detkit.utils.file_io import PathManager
from detkit.utils.image import read_image_size
from detkit.utils.logger import progress_bar
from detkit.utils.remote_files import is_address
from detkit.utils.text import listed

TARGETS = ("coco", "voc", "yolo")
_DIGITS = 6  # of a pixel; takes away what shares of an image add to whole numbers


@contextlib.contextmanager
def emptied_after_errors(folder: Path) -> Iterator[None]:
    """Empty a folder, if it is there, when an error leaves the block.

    It was empty before, and half a data set would pass for a whole one.
    """
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if folder.is_dir() else ():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def write_dataset(
    dataset_name: str,
    records: Sequence[ImageRecord],
    output: str,
    target: str,
    split: str,
    *,
    link: bool = False,
) -> tuple[dict[str, Any], Counter[str]]:
    """Write a data set; several splits may go to one folder.

    Args:
        dataset_name: Its name, whose metadata has names of classes and keypoints.
        records: Its records.
        output: The folder.
        target: One of `TARGETS`.
        split: What to call it there.
        link: Link images instead of copying them.

    Returns:
        Its entry for DATASETS.REGISTER without `name`, and what the format cannot hold: what it is
        -> how often.

    Raises:
        DataError: Two images have the same name there, or an object cannot be read.
    """
    names = class_names_of(dataset_name)
    folder = Path(output)
    images = folder / ("JPEGImages" if target == "voc" else f"images/{split}")
    placed = _place_images(records, images, link, by_stem=target != "coco")
    lost: Counter[str] = Counter()
    for record in placed:
        for key in ("sem_seg_file_name", "pan_seg_file_name"):
            lost["label maps"] += key in record
        if target != "coco":
            lost["images without annotations, now without objects"] += "annotations" not in record
    if target == "coco":
        entry = _write_coco(dataset_name, placed, folder, images, split)
    elif target == "voc":
        entry = _write_voc(placed, names, folder, images, split, lost)
    else:
        entry = _write_yolo(dataset_name, placed, names, folder, split, lost)
    return entry, Counter({what: count for what, count in lost.items() if count})


def _place_images(
    records: Sequence[ImageRecord], folder: Path, link: bool, *, by_stem: bool
) -> list[ImageRecord]:
    """Copy or link the images, and return the records with their sizes and new paths."""
    remote = [r["file_name"] for r in records if is_address(r["file_name"])]
    if remote:
        raise DataError(
            f"only local images are written, {len(remote)} are not: {listed(remote, 3)}"
        )
    sources = [os.path.abspath(PathManager.get_local_path(r["file_name"])) for r in records]  # noqa: PTH100
    common = os.path.commonpath([os.path.dirname(s) for s in sources]) if sources else ""  # noqa: PTH120
    paths = [folder / os.path.relpath(source, common) for source in sources]
    taken: dict[str, str] = {}
    for source, path in zip(sources, paths, strict=True):  # before the first is copied
        # In VOC and YOLO, text is found by the image's name without ending.
        key = str(path.with_suffix("") if by_stem else path)
        if key in taken and (by_stem or taken[key] != source):
            raise DataError(
                f"{taken[key]} and {source} would both be {key}: rename one, or join what is about"
                " one image"
            )
        taken[key] = source
    placed = []
    pairs = list(zip(records, sources, paths, strict=True))
    for record, source, path in progress_bar(pairs, desc=folder.name, unit="image", leave=False):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            if link:
                path.symlink_to(source)
            else:
                shutil.copyfile(source, path)
        elif not filecmp.cmp(path, source, shallow=False):
            raise DataError(f"{source} would replace {path}, of another split: rename one")
        height, width = record.get("height"), record.get("width")
        if height is None or width is None:
            height, width = read_image_size(source)
        placed.append({**record, "file_name": str(path), "height": height, "width": width})
    return placed


def _write_coco(
    dataset_name: str, records: Sequence[ImageRecord], folder: Path, images: Path, split: str
) -> dict[str, Any]:
    below = [
        ImageRecord(**{**r, "file_name": Path(r["file_name"]).relative_to(images).as_posix()})
        for r in records
    ]
    path = folder / "annotations" / f"{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = records_to_coco_dict(dataset_name, below)
    content["info"] = {"description": f"{split}, written by detkit"}
    path.write_text(json.dumps(content), encoding="utf-8")
    return {"format": "coco", "images": str(images), "annotations": str(path)}


def _write_voc(
    records: Sequence[ImageRecord],
    names: Sequence[str],
    folder: Path,
    images: Path,
    split: str,
    lost: Counter[str],
) -> dict[str, Any]:
    stems = []
    for record in records:
        below = Path(record["file_name"]).relative_to(images)
        stems.append(below.with_suffix("").as_posix())
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = below.name
        size = ET.SubElement(root, "size")
        for side in ("width", "height"):
            ET.SubElement(size, side).text = str(record.get(side))
        for annotation in _single(record, lost):
            lost["angles"] += annotation["bbox_mode"] == BoxMode.XYWHA_ABS
            lost["masks"] += _has_mask(annotation)
            lost["objects' keypoints"] += "keypoints" in annotation
            obj = ET.SubElement(root, "object")
            ET.SubElement(obj, "name").text = names[annotation["category_id"]]
            ET.SubElement(obj, "difficult").text = str(as_flag(annotation.get("difficult")))
            box = ET.SubElement(obj, "bndbox")
            x0, y0, x1, y1 = _corners(annotation)
            # Pixels count from 1, and the last one is included.
            for key, value in zip(
                ("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1), strict=True
            ):
                ET.SubElement(box, key).text = f"{round(value, _DIGITS):.15g}"
        path = (folder / "Annotations" / below).with_suffix(".xml")
        path.parent.mkdir(parents=True, exist_ok=True)
        ET.indent(root)
        text = ET.tostring(root, encoding="unicode")
        if path.exists() and path.read_text("utf-8") != text:
            raise DataError(f"{path}, of another split, has other objects: rename an image")
        path.write_text(text, encoding="utf-8")
    split_file = folder / "ImageSets" / "Main" / f"{split}.txt"
    split_file.parent.mkdir(parents=True, exist_ok=True)
    split_file.write_text("".join(f"{name}\n" for name in stems), encoding="utf-8")
    (folder / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return {"format": "voc", "root": str(folder), "split": split, "classes": list(names)}


def _write_yolo(
    dataset_name: str,
    records: Sequence[ImageRecord],
    names: Sequence[str],
    folder: Path,
    split: str,
    lost: Counter[str],
) -> dict[str, Any]:
    metadata = MetadataCatalog.get(dataset_name)
    keypoints: list[str] = list(metadata.get("keypoint_names") or ())
    for record in records:
        scale = np.array([record.get("width"), record.get("height")], dtype=float)
        rows = []
        for annotation in _single(record, lost):
            lost["difficult flags"] += as_flag(annotation.get("difficult"))
            shares = yolo_shares(annotation, scale, len(keypoints), lost)
            rows.append(f"{annotation['category_id']} {' '.join(f'{v:.10g}' for v in shares)}\n")
        path = Path(label_file(record["file_name"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(rows), encoding="utf-8")
    data = folder / "data.yaml"
    content = read_data_yaml(str(data)) if data.exists() else {}
    content |= {split: f"images/{split}", "names": dict(enumerate(names))}
    if keypoints:
        pairs: dict[str, str] = dict(metadata.get("keypoint_flip_map") or ())
        pairs |= {right: left for left, right in pairs.items()}
        content |= {
            "kpt_shape": [len(keypoints), 3],
            "kpt_names": dict.fromkeys(range(len(names)), keypoints),
            "flip_idx": [keypoints.index(pairs.get(name, name)) for name in keypoints],
        }
    data.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), "utf-8")
    return {"format": "yolo", "data": str(data), "split": split}


def yolo_shares(
    annotation: AnnotationRecord, scale: np.ndarray, num_keypoints: int, lost: Counter[str]
) -> list[float]:
    """Return what follows the class in the row of an object."""
    if annotation["bbox_mode"] == BoxMode.XYWHA_ABS:
        points = rotated_box_corners(torch.tensor([annotation["bbox"]], dtype=torch.float64))
        return (points.reshape(4, 2).numpy() / scale).ravel().tolist()
    corners = np.array(_corners(annotation)).reshape(2, 2)
    box = [*(corners.mean(axis=0) / scale), *((corners[1] - corners[0]) / scale)]
    segmentation = annotation.get("segmentation")
    if num_keypoints:
        lost["masks"] += _has_mask(annotation)
        points = np.array(annotation.get("keypoints") or [0.0] * 3 * num_keypoints, dtype=float)
        points = points.reshape(-1, 3)
        # These files number pixels, as those of COCO do.
        points[:, :2] = np.where(points[:, 2:] > 0, (points[:, :2] - 0.5) / scale, 0)
        return [*box, *points.ravel()]
    if not _has_mask(annotation):
        return box
    if not isinstance(segmentation, list):
        lost["masks that are no polygons"] += 1
        return box
    lost["masks of several polygons, joined by lines without width"] += len(segmentation) > 1
    # From the first corner of each polygon and back to it, then on to the next one's.
    path = [v for polygon in segmentation for v in [*polygon, *polygon[:2]]]
    path += [v for polygon in reversed(segmentation[:-1]) for v in polygon[:2]]
    if len(segmentation) == 1:
        path = list(segmentation[0])
    differs = np.abs(np.array(hull(path)) - corners.ravel()).max() > 0.5
    lost["boxes, replaced by the hull of their mask"] += bool(differs)
    return list((np.array(path).reshape(-1, 2) / scale).ravel())


def _single(record: ImageRecord, lost: Counter[str]) -> list[AnnotationRecord]:
    """Return the objects of an image without groups, which neither VOC nor YOLO knows."""
    annotations = record.get("annotations", [])
    single = [a for a in annotations if not as_flag(a.get("iscrowd"))]
    lost["groups of objects (iscrowd), left out"] += len(annotations) - len(single)
    return single


def _corners(annotation: Mapping[str, Any]) -> list[float]:
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return [float(value) for value in box]


def _has_mask(annotation: Mapping[str, Any]) -> bool:
    mask = annotation.get("segmentation")
    return isinstance(mask, np.ndarray) or bool(mask)
