"""The generated shapes under the names of their uses, each with its classes."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import (
    Category,
    joined_metadata,
    left_right_pairs,
    stuff_metadata,
    thing_metadata,
)
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.coco_panoptic import (
    IGNORE_LABEL,
    LABEL_DIVISOR,
    load_coco_panoptic_json,
    merge_to_panoptic,
)
from detkit.data.datasets.pascal_voc import load_voc_instances
from detkit.data.datasets.sem_seg import load_sem_seg
from detkit.data.datasets.shapes.files import SPLITS, ensure_shapes
from detkit.data.datasets.shapes.scene import (
    SHAPES_BACKGROUNDS,
    SHAPES_CLASSES,
    SHAPES_KEYPOINTS,
)
from detkit.structures.records import ImageRecord
from detkit.utils.colormap import class_colors, skeleton_colors
from detkit.utils.file_io import dataset_root

_NAMES = (*SHAPES_CLASSES, *SHAPES_BACKGROUNDS)
_CATEGORIES = tuple(map(Category, range(1, 1 + len(_NAMES)), _NAMES, class_colors(len(_NAMES))))
_THINGS, _STUFF = _CATEGORIES[: len(SHAPES_CLASSES)], _CATEGORIES[len(SHAPES_CLASSES) :]


def register_shapes(datasets: str | os.PathLike[str] | None = None) -> None:
    """Register the data set under one name for each use, with `SPLIT` train or val.

    - `shapes_SPLIT`, and the same under `shapes_SPLIT_keypoints`: COCO.
    - `shapes_rotated_SPLIT`: COCO with rotated boxes, of flat shapes at any angle.
    - `shapes_voc_SPLIT`: Pascal VOC.
    - `shapes_SPLIT_sem_seg`: label maps of all nine classes.
    - `shapes_SPLIT_panoptic`: COCO panoptic, joined.
    - `shapes_SPLIT_panoptic_separated`: instances with label maps of stuff.
    - `shapes_SPLIT_panoptic_stuffonly`: these label maps alone.

    Args:
        datasets: The folder of all data sets; None takes the one that `$DETKIT_DATASETS` names
            when the data are loaded. The shapes lie in `shapes` within it and are generated when
            first loaded; the rotated ones in `shapes_rotated`.
    """
    points = skeleton_colors(len(SHAPES_KEYPOINTS) - 1)
    coco = {
        "thing_classes": list(SHAPES_CLASSES),
        "keypoint_names": list(SHAPES_KEYPOINTS),
        "keypoint_flip_map": left_right_pairs(SHAPES_KEYPOINTS),
        "keypoint_connection_rules": [
            (SHAPES_KEYPOINTS[0], end, color)
            for end, color in zip(SHAPES_KEYPOINTS[1:], points, strict=True)
        ],
    }
    nine = {
        "stuff_classes": list(_NAMES),
        "stuff_colors": [category.color for category in _CATEGORIES],
        "ignore_label": IGNORE_LABEL,
    }
    panoptic = {"ignore_label": IGNORE_LABEL, "label_divisor": LABEL_DIVISOR}
    joined = {**joined_metadata(_THINGS, _STUFF), **panoptic}
    separated = {**thing_metadata(_THINGS), **stuff_metadata(_STUFF), **panoptic}

    for split in SPLITS:
        voc = {"thing_classes": list(SHAPES_CLASSES), "split": split, "year": 2012}
        images = {"image_root": "JPEGImages"}
        labels = {**images, "sem_seg_root": f"sem_seg_{split}"}
        instances = {**images, "json_file": f"instances_{split}.json"}
        segments = {
            **instances,
            "panoptic_root": f"panoptic_{split}",
            "panoptic_json": f"panoptic_{split}.json",
        }
        stuff = {"sem_seg_root": f"panoptic_stuff_{split}"}
        register = partial(_register, datasets)
        for name in (f"shapes_{split}", f"shapes_{split}_keypoints"):
            register(name, _load_coco, (split, name), instances, coco, "coco")
        name = f"shapes_rotated_{split}"
        register(name, _load_coco, (split, name), instances, coco, "coco", "shapes_rotated")
        register(f"shapes_voc_{split}", _load_voc, (split,), {"dirname": ""}, voc, "pascal_voc")
        name = f"shapes_{split}_sem_seg"
        register(name, _load_labels, (labels["sem_seg_root"],), labels, nine, "sem_seg")
        name = f"shapes_{split}_panoptic"
        register(name, _load_joined, (split,), segments, joined, "coco_panoptic_seg")
        name = f"shapes_{split}_panoptic_separated"
        paths = {**segments, **stuff}
        register(name, _load_separated, (split, name), paths, separated, "coco_panoptic_seg")
        name, paths = f"shapes_{split}_panoptic_stuffonly", {**images, **stuff}
        register(name, _load_labels, (stuff["sem_seg_root"],), paths, separated, "sem_seg")


def _register(
    datasets: str | os.PathLike[str] | None,
    name: str,
    load: Callable[..., list[ImageRecord]],
    args: Sequence[str],
    paths: Mapping[str, str],
    metadata: Mapping[str, Any],
    evaluator_type: str,
    folder: str = "shapes",
) -> None:
    """Register a loader of the folder and `args`; `paths` in the folder become metadata."""
    DatasetCatalog.register(name, partial(_load, load, datasets, folder, *args))
    lazy = {
        key: partial(_path, datasets, folder, *([path] if path else []))
        for key, path in paths.items()
    }
    MetadataCatalog.get(name).set(evaluator_type=evaluator_type, **metadata).set_lazy(**lazy)


def _path(datasets: str | os.PathLike[str] | None, *parts: str) -> str:
    return str(Path(dataset_root() if datasets is None else datasets, *parts))


def _load(
    load: Callable[..., list[ImageRecord]],
    datasets: str | os.PathLike[str] | None,
    folder: str,
    *args: str,
) -> list[ImageRecord]:
    return load(ensure_shapes(_path(datasets, folder), rotated=folder == "shapes_rotated"), *args)


def _load_coco(folder: Path, split: str, name: str) -> list[ImageRecord]:
    return load_coco_json(str(folder / f"instances_{split}.json"), str(folder / "JPEGImages"), name)


def _load_voc(folder: Path, split: str) -> list[ImageRecord]:
    return load_voc_instances(str(folder), split, SHAPES_CLASSES)


def _load_labels(folder: Path, labels: str) -> list[ImageRecord]:
    images = str(folder / "JPEGImages")
    # The images of the other split have no label map here, which is no reason to warn.
    return load_sem_seg(str(folder / labels), images, warn_of_unlabelled=False)


def _load_joined(folder: Path, split: str) -> list[ImageRecord]:
    images, png = str(folder / "JPEGImages"), str(folder / f"panoptic_{split}")
    meta = joined_metadata(_THINGS, _STUFF)
    return load_coco_panoptic_json(str(folder / f"panoptic_{split}.json"), images, png, meta)


def _load_separated(folder: Path, split: str, name: str) -> list[ImageRecord]:
    instances = _load_coco(folder, split, name)
    return merge_to_panoptic(instances, _load_labels(folder, f"panoptic_stuff_{split}"))
