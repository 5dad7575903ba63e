"""The public data sets under their usual names.

Importing this module registers them; nothing is read before it is used. Their folders are looked for below
`$DETKIT_DATASETS`, or `datasets`, at the moment of use, so that setting the variable after the import still counts.
`datasets/README.md` shows the folders expected.
"""

from __future__ import annotations

import functools

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import VOC_CLASSES, coco_metadata
from detkit.data.datasets.coco import load_coco_json
from detkit.data.datasets.pascal_voc import load_voc_instances, note_voc_metadata
from detkit.data.datasets.shapes import register_shapes
from detkit.structures import ImageRecord
from detkit.utils.file_io import dataset_root

# Name -> (folder of images, annotation file), both below the root. Splits and names as in Detectron2: minival and
# valminusminival are the 5,000 and 35,000 images that papers before 2017 made of val2014.
_COCO_SPLITS = {
    "coco_2014_train": ("coco/train2014", "coco/annotations/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "coco/annotations/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "coco/annotations/instances_minival2014.json"),
    "coco_2014_minival_100": ("coco/val2014", "coco/annotations/instances_minival2014_100.json"),
    "coco_2014_valminusminival": ("coco/val2014", "coco/annotations/instances_valminusminival2014.json"),
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", "coco/annotations/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
}
_VOC_YEARS = (2007, 2012)
_VOC_SPLITS = ("trainval", "train", "val", "test")


def register_builtin_datasets() -> None:
    """Register COCO 2014 and 2017, Pascal VOC 2007 and 2012, and the generated shapes. Once more does nothing."""
    register_shapes()
    for name, (images, json_file) in _COCO_SPLITS.items():
        _register_coco(name, images, json_file)
    for year in _VOC_YEARS:
        for split in _VOC_SPLITS:
            if (year, split) != (2012, "test"):  # its annotations were never published
                _register_voc(f"voc_{year}_{split}", f"VOC{year}", split, year)


def _below_root(path: str) -> str:
    return str(dataset_root() / path)


def _load_coco(json_file: str, images: str, name: str) -> list[ImageRecord]:
    return load_coco_json(_below_root(json_file), _below_root(images), name)


def _load_voc(folder: str, split: str) -> list[ImageRecord]:
    return load_voc_instances(_below_root(folder), split, VOC_CLASSES)


def _register_coco(name: str, images: str, json_file: str) -> None:
    DatasetCatalog.register(name, functools.partial(_load_coco, json_file, images, name))
    metadata = MetadataCatalog.get(name).set(evaluator_type="coco", **coco_metadata())
    metadata.set_lazy(
        json_file=functools.partial(_below_root, json_file), image_root=functools.partial(_below_root, images)
    )


def _register_voc(name: str, folder: str, split: str, year: int) -> None:
    DatasetCatalog.register(name, functools.partial(_load_voc, folder, split))
    metadata = note_voc_metadata(name, VOC_CLASSES).set(evaluator_type="pascal_voc", year=year, split=split)
    metadata.set_lazy(dirname=functools.partial(_below_root, folder))


register_builtin_datasets()
