"""Label maps of the generated data set: every pixel's class, and every pixel's segment in COCO's panoptic format.

Things are the shapes; stuff is the background, of one of four textures.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from detkit.data.datasets.shapes_scene import SHAPES_BACKGROUNDS, SHAPES_CLASSES, Scene
from detkit.utils.colormap import class_colors

_NAMES = (*SHAPES_CLASSES, *SHAPES_BACKGROUNDS)


def panoptic_categories() -> list[dict[str, Any]]:
    """Return COCO's `categories`: ids from 1, shapes first, then backgrounds."""
    return [
        {
            "id": i,
            "name": name,
            "supercategory": "shape" if name in SHAPES_CLASSES else "background",
            "isthing": int(name in SHAPES_CLASSES),
            "color": list(color),
        }
        for i, (name, color) in enumerate(
            zip(_NAMES, class_colors(len(_NAMES)), strict=True), start=1
        )
    ]


def sem_seg_metadata() -> dict[str, Any]:
    """Return the classes of `sem_seg_*`: all nine."""
    return {
        "stuff_classes": list(_NAMES),
        "stuff_colors": class_colors(len(_NAMES)),
        "ignore_label": 255,
    }


def separated_metadata() -> dict[str, Any]:
    """Return the classes for one head for things and another for stuff, to which all things are
    class 0.
    """
    colors = class_colors(len(_NAMES))
    first_stuff = len(SHAPES_CLASSES)
    return {
        "thing_classes": list(SHAPES_CLASSES),
        "thing_colors": colors[:first_stuff],
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(first_stuff)},
        "stuff_classes": ["things", *SHAPES_BACKGROUNDS],
        "stuff_colors": [(82, 18, 128), *colors[first_stuff:]],
        "stuff_dataset_id_to_contiguous_id": {
            0: 0,
            **{first_stuff + i: i for i in range(1, len(SHAPES_BACKGROUNDS) + 1)},
        },
        "ignore_label": 255,
        "label_divisor": 1000,
    }


def joined_metadata() -> dict[str, Any]:
    """Return the classes for models that tell all nine by one contiguous id."""
    colors, first_stuff = class_colors(len(_NAMES)), len(SHAPES_CLASSES)
    return {
        "thing_classes": list(_NAMES),
        "thing_colors": colors,
        "stuff_classes": list(_NAMES),
        "stuff_colors": colors,
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(first_stuff)},
        "stuff_dataset_id_to_contiguous_id": {i + 1: i for i in range(first_stuff, len(_NAMES))},
        "ignore_label": 255,
        "label_divisor": 1000,
    }


def write_label_maps(folder: Path, split: str, stem: str, scene: Scene) -> None:
    """Write the three png of one scene: class of nine, class of stuff, and segment."""
    things = len(SHAPES_CLASSES)
    classes = [things + scene.background, *(obj.class_index for obj in scene.objects)]
    stuff = [scene.background + 1, *(0 for _ in scene.objects)]
    ids = np.array(_segment_ids(scene))
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=1).astype(np.uint8)
    for name, pixels in (
        (f"sem_seg_{split}", np.array(classes, np.uint8)[scene.owners]),
        (f"panoptic_stuff_{split}", np.array(stuff, np.uint8)[scene.owners]),
        (f"panoptic_{split}", colors[scene.owners]),
    ):
        Image.fromarray(pixels).save(folder / name / f"{stem}.png")


def segments_of(scene: Scene) -> list[dict[str, Any]]:
    """Return COCO's `segments_info` of one scene: the background, then the objects from back to
    front.
    """
    categories = [
        len(SHAPES_CLASSES) + scene.background + 1,
        *(obj.class_index + 1 for obj in scene.objects),
    ]
    masks = [scene.owners == owner for owner in range(len(categories))]
    return [
        {
            "id": segment_id,
            "category_id": category,
            "area": int(mask.sum()),
            "bbox": _box_xywh(mask),
            "iscrowd": 0,
        }
        for segment_id, category, mask in zip(_segment_ids(scene), categories, masks, strict=True)
        if mask.any()
    ]


def _segment_ids(scene: Scene) -> list[int]:
    """Ids of the background and of the objects; far apart, so that a viewer shows them in different
    colours.
    """
    return [37 * 256 * (owner + 1) + owner + 1 for owner in range(len(scene.objects) + 1)]


def _box_xywh(mask: npt.NDArray[np.bool_]) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y]
