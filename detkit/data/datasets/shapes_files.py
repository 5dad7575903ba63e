"""The files of the generated data set: what a scene looks like as COCO json, as VOC xml and as
label maps.
"""

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detkit.data.datasets.shapes_panoptic import panoptic_categories, segments_of, write_label_maps
from detkit.data.datasets.shapes_scene import (
    SHAPES_CLASSES,
    SHAPES_KEYPOINTS,
    Scene,
    SceneObject,
    draw_scene,
)

STAMP_FILE = "shapes.json"
SPLITS = ("train", "val")


def write_data_set(folder: Path, stamp: dict[str, int]) -> None:
    """Draw and write all that the stamp describes, the stamp last."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number, split in enumerate(SPLITS):
        _write_split(folder, split, number, stamp)
    split_files = [folder / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS]
    write_text(
        split_files[0].with_name("trainval.txt"),
        "".join(f.read_text(encoding="utf-8") for f in split_files),
    )
    write_text(folder / STAMP_FILE, json.dumps(stamp) + "\n")


def _write_split(folder: Path, split: str, number: int, stamp: dict[str, int]) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    segments: list[dict[str, Any]] = []
    for name in (f"sem_seg_{split}", f"panoptic_{split}", f"panoptic_stuff_{split}"):
        (folder / name).mkdir()
    stems = [f"{split}_{index:06d}" for index in range(stamp[f"num_{split}"])]
    for index, stem in enumerate(stems):
        scene = draw_scene(np.random.default_rng([stamp["seed"], number, index]))
        # 4:4:4, because halved colour resolution would smear edges between two hues of equal
        # brightness.
        Image.fromarray(scene.image).save(
            folder / "JPEGImages" / f"{stem}.jpg", quality=92, subsampling=0
        )
        height, width = scene.image.shape[:2]
        images.append({"id": index, "file_name": f"{stem}.jpg", "height": height, "width": width})
        annotations += [
            _coco_annotation(obj, len(annotations) + k, index)
            for k, obj in enumerate(scene.objects, start=1)
        ]
        _write_voc_xml(folder / "Annotations" / f"{stem}.xml", scene)
        write_label_maps(folder, split, stem, scene)
        segments.append(
            {"image_id": index, "file_name": f"{stem}.png", "segments_info": segments_of(scene)}
        )
    info = {
        "info": {"description": "detkit shapes, generated", **stamp},
        "licenses": [],
        "images": images,
    }
    coco = {**info, "annotations": annotations, "categories": _instance_categories()}
    panoptic = {**info, "annotations": segments, "categories": panoptic_categories()}
    write_text(folder / f"panoptic_{split}.json", json.dumps(panoptic))
    write_text(folder / f"instances_{split}.json", json.dumps(coco))
    write_text(
        folder / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{stem}\n" for stem in stems)
    )


def _instance_categories() -> list[dict[str, Any]]:
    """The shapes, with their keypoints; a skeleton counts these from 1, here from the centre to
    each other one.
    """
    skeleton = [[1, end] for end in range(2, len(SHAPES_KEYPOINTS) + 1)]
    points = {"keypoints": list(SHAPES_KEYPOINTS), "skeleton": skeleton}
    return [
        {"id": i, "name": name, "supercategory": "shape", **points}
        for i, name in enumerate(SHAPES_CLASSES, start=1)
    ]


def _coco_annotation(obj: SceneObject, annotation_id: int, image_id: int) -> dict[str, Any]:
    x1, y1, x2, y2 = obj.box
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": obj.class_index + 1,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": obj.area,
        "iscrowd": 0,
        "segmentation": [polygon.reshape(-1).tolist() for polygon in obj.polygons],
        "keypoints": _coco_keypoints(obj),
        "num_keypoints": int((obj.keypoints[:, 2] > 0).sum()),
    }


def _coco_keypoints(obj: SceneObject) -> list[float]:
    """COCO's files number pixels: the middle of the first one is 0."""
    return [
        value
        for x, y, v in obj.keypoints.tolist()
        for value in ((round(x - 0.5, 2), round(y - 0.5, 2), int(v)) if v else (0, 0, 0))
    ]


def _write_voc_xml(path: Path, scene: Scene) -> None:
    height, width, depth = scene.image.shape
    root = ET.Element("annotation")
    ET.SubElement(root, "folder").text = "JPEGImages"
    ET.SubElement(root, "filename").text = f"{path.stem}.jpg"
    size = ET.SubElement(root, "size")
    for tag, value in (("width", width), ("height", height), ("depth", depth)):
        ET.SubElement(size, tag).text = str(value)
    ET.SubElement(root, "segmented").text = "0"
    for obj in scene.objects:
        root.append(_voc_object(obj))
    ET.indent(root)
    write_text(path, ET.tostring(root, encoding="unicode") + "\n")


def _voc_object(obj: SceneObject) -> ET.Element:
    element = ET.Element("object")
    ET.SubElement(element, "name").text = SHAPES_CLASSES[obj.class_index]
    ET.SubElement(element, "pose").text = "Unspecified"
    ET.SubElement(element, "truncated").text = str(int(obj.is_truncated))
    ET.SubElement(element, "occluded").text = str(int(obj.visible_share < 0.95))
    ET.SubElement(element, "difficult").text = "0"
    box = ET.SubElement(element, "bndbox")
    x1, y1, x2, y2 = obj.box
    # VOC counts pixels from 1 and includes the last one. Fractions are kept, so that both formats
    # hold the same boxes.
    for tag, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
        ET.SubElement(box, tag).text = f"{value:g}"
    return element


def write_text(path: Path, text: str) -> None:
    """Write a text file that is the same on every platform."""
    # Bytes, so that no platform turns the line ends into its own.
    path.write_bytes(text.encode("utf-8"))
