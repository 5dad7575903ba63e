"""Readers of data set formats, and the public data sets under their usual names."""

from detkit.data.datasets.builtin import register_builtin_datasets
from detkit.data.datasets.coco import load_coco_json, register_coco_instances
from detkit.data.datasets.coco_export import convert_to_coco_dict, convert_to_coco_json
from detkit.data.datasets.declared import register_declared_datasets
from detkit.data.datasets.pascal_voc import load_voc_folders, load_voc_instances, register_pascal_voc
from detkit.data.datasets.shapes import generate_shapes, register_shapes

__all__ = [
    "convert_to_coco_dict",
    "convert_to_coco_json",
    "generate_shapes",
    "load_coco_json",
    "load_voc_folders",
    "load_voc_instances",
    "register_builtin_datasets",
    "register_coco_instances",
    "register_declared_datasets",
    "register_pascal_voc",
    "register_shapes",
]
