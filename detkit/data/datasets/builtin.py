"""The public data sets under their usual names.

Importing this module registers them; nothing is read before it is used. Their folders are resolved
below `$DETKIT_DATASETS`, or `datasets`, when a data set is used, so that the variable may be set
after the import. `datasets/README.md` shows the folders expected.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import (
    VOC_CLASSES,
    cityscapes_metadata,
    cityscapes_panoptic_metadata,
    coco_metadata,
    coco_panoptic_metadata,
    coco_panoptic_separated_metadata,
    coco_person_metadata,
)
from detkit.data.datasets.cityscapes import (
    load_cityscapes_instances,
    load_cityscapes_panoptic,
    load_cityscapes_semantic,
)
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.coco_panoptic import (
    IGNORE_LABEL,
    LABEL_DIVISOR,
    load_coco_panoptic_json,
    load_separated,
)
from detkit.data.datasets.lvis import class_image_count, load_lvis_json
from detkit.data.datasets.pascal_voc import load_voc_instances, note_voc_metadata
from detkit.data.datasets.sem_seg import load_sem_seg
from detkit.data.datasets.shapes import register_shapes
from detkit.structures import ImageRecord
from detkit.utils.errors import MissingFileError
from detkit.utils.file_io import dataset_root

# Name -> (folder of images, annotation file), both below the root. Splits and names as in
# Detectron2: minival and valminusminival are the 5,000 and 35,000 images that papers before 2017
# made of val2014.
_COCO_SPLITS = {
    "coco_2014_train": ("coco/train2014", "coco/annotations/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "coco/annotations/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "coco/annotations/instances_minival2014.json"),
    "coco_2014_minival_100": ("coco/val2014", "coco/annotations/instances_minival2014_100.json"),
    "coco_2014_valminusminival": (
        "coco/val2014",
        "coco/annotations/instances_valminusminival2014.json",
    ),
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", "coco/annotations/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
}
# Persons with keypoints: of the same images.
_COCO_KEYPOINT_SPLITS = {
    f"keypoints_coco_{year}_{split}": (
        f"coco/{folder}",
        f"coco/annotations/person_keypoints_{split}{year}{end}.json",
    )
    for year, split, end, folder in (
        (2014, "train", "", "train2014"),
        (2014, "val", "", "val2014"),
        (2014, "minival", "", "val2014"),
        (2014, "valminusminival", "", "val2014"),
        (2017, "train", "", "train2017"),
        (2017, "val", "", "val2017"),
    )
} | {
    "keypoints_coco_2014_minival_100": (
        "coco/val2014",
        "coco/annotations/person_keypoints_minival2014_100.json",
    ),
    "keypoints_coco_2017_val_100": (
        "coco/val2017",
        "coco/annotations/person_keypoints_val2017_100.json",
    ),
}
# Split -> name below coco/ of the panoptic files, which hold the segments of COCO_SPLITS' images.
_COCO_PANOPTIC_SPLITS = {
    "coco_2017_train": "train2017",
    "coco_2017_val": "val2017",
    "coco_2017_val_100": "val2017_100",
}
_LVIS_SPLITS = {
    "lvis_v1_train": "lvis_v1_train",
    "lvis_v1_val": "lvis_v1_val",
    "lvis_v1_test_dev": "lvis_v1_image_info_test_dev",
    "lvis_v1_test_challenge": "lvis_v1_image_info_test_challenge",
    "lvis_v0.5_train": "lvis_v0.5_train",
    "lvis_v0.5_val": "lvis_v0.5_val",
    "lvis_v0.5_val_rand_100": "lvis_v0.5_val_rand_100",
    "lvis_v0.5_test": "lvis_v0.5_image_info_test",
    "lvis_v0.5_train_cocofied": "lvis_v0.5_train_cocofied",
    "lvis_v0.5_val_cocofied": "lvis_v0.5_val_cocofied",
}
_CITYSCAPES_SPLITS = ("train", "val", "test")
_VOC_YEARS = (2007, 2012)
_VOC_SPLITS = ("trainval", "train", "val", "test")


def register_builtin_datasets() -> None:
    """Register COCO, LVIS, Cityscapes, Pascal VOC and the generated shapes.

    Registering them again has no effect.
    """
    register_shapes()
    for name, (images, json_file) in _COCO_SPLITS.items():
        _register_coco(name, images, json_file, coco_metadata())
    for name, (images, json_file) in _COCO_KEYPOINT_SPLITS.items():
        _register_coco(name, images, json_file, coco_person_metadata())
    for name, stem in _COCO_PANOPTIC_SPLITS.items():
        _register_coco_panoptic(f"{name}_panoptic", *_COCO_SPLITS[name], stem)
    for name, stem in _LVIS_SPLITS.items():
        _register_lvis(name, f"lvis/{stem}.json")
    for split in _CITYSCAPES_SPLITS:
        _register_cityscapes(split)
        if split != "test":
            _register_cityscapes_panoptic(split)
    for year in _VOC_YEARS:
        for split in _VOC_SPLITS:
            if (year, split) != (2012, "test"):  # its annotations were never published
                _register_voc(f"voc_{year}_{split}", f"VOC{year}", split, year)


def _below_root(path: str) -> str:
    return str(dataset_root() / path)


def _register(
    name: str,
    load: Callable[..., list[ImageRecord]],
    paths: Mapping[str, str],
    metadata: Mapping[str, Any],
    **options: Any,
) -> None:
    """Register a loader, called with `paths` below the root and with `options`.

    The paths are metadata too.
    """
    DatasetCatalog.register(name, functools.partial(_load, load, name, paths, options))
    lazy = {key: functools.partial(_below_root, path) for key, path in paths.items()}
    MetadataCatalog.get(name).set(**metadata).set_lazy(**lazy)


def _load(
    load: Callable[..., list[ImageRecord]],
    name: str,
    paths: Mapping[str, str],
    options: Mapping[str, Any],
) -> list[ImageRecord]:
    """Call a loader; the error for a missing file tells where all of them are expected."""
    try:
        return load(**{key: _below_root(path) for key, path in paths.items()}, **options)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{error}. Data set {name!r} takes {', '.join(paths.values())} below {dataset_root()}"
            " (DETKIT_DATASETS names another folder); datasets/README.md of detkit's repository"
            " shows the files, and where they come from"
        ) from error


# Nobody can correct public files: bad polygons in them are dropped, with a count.


def _register_coco(name: str, images: str, json_file: str, metadata: Mapping[str, Any]) -> None:
    paths = {"json_file": json_file, "image_root": images}
    metadata = {"evaluator_type": "coco", **metadata}
    _register(name, load_coco_json, paths, metadata, dataset_name=name, drop_bad_polygons=True)


def _register_coco_panoptic(name: str, images: str, json_file: str, stem: str) -> None:
    panoptic = {
        "image_root": images,
        "panoptic_root": f"coco/panoptic_{stem}",
        "panoptic_json": f"coco/annotations/panoptic_{stem}.json",
        "json_file": json_file,
    }
    stuff = {"sem_seg_root": f"coco/panoptic_stuff_{stem}"}
    evaluated = {
        "evaluator_type": "coco_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "label_divisor": LABEL_DIVISOR,
    }
    _register(name, _load_panoptic, panoptic, {**evaluated, **coco_panoptic_metadata()})
    classes = coco_panoptic_separated_metadata()
    separated = f"{name}_separated"
    paths = {**panoptic, **stuff}
    _register(separated, _load_separated, paths, {**evaluated, **classes}, dataset_name=separated)
    only = {"evaluator_type": "sem_seg", "ignore_label": IGNORE_LABEL, **classes}
    _register(f"{name}_stuffonly", _load_sem_seg, {"image_root": images, **stuff}, only)


def _load_panoptic(
    *, image_root: str, panoptic_root: str, panoptic_json: str, json_file: str
) -> list[ImageRecord]:
    metadata = coco_panoptic_metadata()
    return load_coco_panoptic_json(panoptic_json, image_root, panoptic_root, metadata)


def _load_separated(
    *, dataset_name: str, json_file: str, image_root: str, sem_seg_root: str, **panoptic: str
) -> list[ImageRecord]:
    return load_separated(json_file, image_root, sem_seg_root, dataset_name, drop_bad_polygons=True)


def _load_sem_seg(*, image_root: str, sem_seg_root: str) -> list[ImageRecord]:
    return load_sem_seg(sem_seg_root, image_root)


def _register_lvis(name: str, json_file: str) -> None:
    # "cocofied": LVIS' annotations of COCO's classes.
    classes = coco_metadata() if name.endswith("_cocofied") else {}
    paths = {"json_file": json_file, "image_root": "coco"}
    metadata = {"evaluator_type": "lvis", **classes}
    _register(name, load_lvis_json, paths, metadata, dataset_name=name, drop_bad_polygons=True)
    if "_train" in name:  # only the frequency of a class in training matters
        count = functools.partial(_image_count_below_root, json_file)
        MetadataCatalog.get(name).set_lazy(class_image_count=count)


def _image_count_below_root(json_file: str) -> list[dict[str, int]] | None:
    return class_image_count(_below_root(json_file))


def _register_cityscapes(split: str) -> None:
    paths = {"image_dir": f"cityscapes/leftImg8bit/{split}", "gt_dir": f"cityscapes/gtFine/{split}"}
    for task, evaluator, load in (
        ("instance", "cityscapes_instance", load_cityscapes_instances),
        ("sem", "cityscapes_sem_seg", load_cityscapes_semantic),
    ):
        metadata = {"evaluator_type": evaluator, "ignore_label": IGNORE_LABEL}
        metadata |= cityscapes_metadata()
        _register(f"cityscapes_fine_{task}_seg_{split}", load, paths, metadata)


def _register_cityscapes_panoptic(split: str) -> None:
    # Under Detectron2's keys, from which its projects take the folders.
    root = f"cityscapes/gtFine/cityscapes_panoptic_{split}"
    paths = {"image_root": f"cityscapes/leftImg8bit/{split}", "panoptic_root": root}
    paths |= {"panoptic_json": f"{root}.json", "gt_dir": f"cityscapes/gtFine/{split}"}
    metadata = {
        "evaluator_type": "cityscapes_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "label_divisor": LABEL_DIVISOR,
        **cityscapes_panoptic_metadata(),
    }
    _register(f"cityscapes_fine_panoptic_{split}", _load_cityscapes_panoptic, paths, metadata)


def _load_cityscapes_panoptic(
    *, image_root: str, panoptic_root: str, panoptic_json: str, gt_dir: str
) -> list[ImageRecord]:
    metadata = cityscapes_panoptic_metadata()
    return load_cityscapes_panoptic(image_root, panoptic_root, panoptic_json, metadata)


def _register_voc(name: str, folder: str, split: str, year: int) -> None:
    note_voc_metadata(name, VOC_CLASSES)
    metadata = {"evaluator_type": "pascal_voc", "year": year, "split": split}
    paths = {"dirname": folder}
    _register(name, load_voc_instances, paths, metadata, split=split, class_names=VOC_CLASSES)


register_builtin_datasets()
