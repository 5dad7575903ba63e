"""Readers of data set formats, and the public data sets under their usual names."""

from detkit.data.datasets.builtin import register_builtin_datasets
from detkit.data.datasets.cityscapes import load_cityscapes_instances, load_cityscapes_semantic
from detkit.data.datasets.coco import load_coco_json, register_coco_instances
from detkit.data.datasets.coco_export import convert_to_coco_dict, convert_to_coco_json
from detkit.data.datasets.coco_panoptic import (
    load_coco_panoptic_json,
    merge_to_panoptic,
    register_coco_panoptic,
    register_coco_panoptic_separated,
    separate_coco_semantic_from_panoptic,
)
from detkit.data.datasets.declared import register_declared_datasets
from detkit.data.datasets.formats.oriented_text import load_dota, load_yolo_obb
from detkit.data.datasets.lvis import (
    get_lvis_instances_meta,
    load_lvis_json,
    register_lvis_instances,
)
from detkit.data.datasets.pascal_voc import (
    load_voc_folders,
    load_voc_instances,
    register_pascal_voc,
)
from detkit.data.datasets.sem_seg import load_sem_seg, register_sem_seg
from detkit.data.datasets.shapes import generate_shapes, register_shapes

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "generate_shapes",
    "get_lvis_instances_meta",
    "load_cityscapes_instances",
    "load_cityscapes_semantic",
    "load_coco_json",
    "load_coco_panoptic_json",
    "load_dota",
    "load_lvis_json",
    "load_sem_seg",
    "load_voc_folders",
    "load_voc_instances",
    "load_yolo_obb",
    "merge_to_panoptic",
    "register_builtin_datasets",
    "register_coco_instances",
    "register_coco_panoptic",
    "register_coco_panoptic_separated",
    "register_declared_datasets",
    "register_lvis_instances",
    "register_pascal_voc",
    "register_sem_seg",
    "register_shapes",
    "separate_coco_semantic_from_panoptic",
]
