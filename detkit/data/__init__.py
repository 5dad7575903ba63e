"""From data sets on disk to batches of model inputs."""

from detkit.data import transforms
from detkit.data.albumentations_adapter import Albumentations
from detkit.data.annotations import (
    annotations_to_instances,
    annotations_to_instances_rotated,
    create_keypoint_hflip_indices,
    filter_empty_instances,
    transform_instance_annotations,
)
from detkit.data.build import (
    build_detection_test_loader,
    build_detection_train_loader,
    build_train_sampler,
    get_test_records,
    trivial_batch_collator,
)
from detkit.data.catalog import DatasetCatalog, Metadata, MetadataCatalog
from detkit.data.data_report import count_images_per_class, print_instances_class_histogram
from detkit.data.dataset_dicts import (
    check_dataset_against_model,
    filter_images_with_few_keypoints,
    filter_images_with_only_crowd_annotations,
    get_detection_dataset_dicts,
)
from detkit.data.dataset_mapper import DatasetMapper, check_image_size
from detkit.data.datasets import register_declared_datasets
from detkit.data.mixing import CopyPaste, MixUp, Mosaic
from detkit.data.proposals import load_proposals_into_dataset
from detkit.data.training_stream import (
    AspectRatioGroupedDataset,
    HasState,
    TrainingStream,
    build_batch_data_loader,
)
from detkit.data.transforms.build import build_augmentation
from detkit.data.wrappers import (
    DatasetFromList,
    MapDataset,
    MapIterableDataset,
    SampleError,
    ToIterableDataset,
)

__all__ = [
    "Albumentations",
    "AspectRatioGroupedDataset",
    "CopyPaste",
    "DatasetCatalog",
    "DatasetFromList",
    "DatasetMapper",
    "HasState",
    "MapDataset",
    "MapIterableDataset",
    "Metadata",
    "MetadataCatalog",
    "MixUp",
    "Mosaic",
    "SampleError",
    "ToIterableDataset",
    "TrainingStream",
    "annotations_to_instances",
    "annotations_to_instances_rotated",
    "build_augmentation",
    "build_batch_data_loader",
    "build_detection_test_loader",
    "build_detection_train_loader",
    "build_train_sampler",
    "check_dataset_against_model",
    "check_image_size",
    "count_images_per_class",
    "create_keypoint_hflip_indices",
    "filter_empty_instances",
    "filter_images_with_few_keypoints",
    "filter_images_with_only_crowd_annotations",
    "get_detection_dataset_dicts",
    "get_test_records",
    "load_proposals_into_dataset",
    "print_instances_class_histogram",
    "register_declared_datasets",
    "transform_instance_annotations",
    "transforms",
    "trivial_batch_collator",
]
