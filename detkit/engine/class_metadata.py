"""What a checkpoint says about the classes of its model."""

from collections.abc import Sequence
from typing import Any

from detkit.data import MetadataCatalog

_KEYS = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "thing_colors",
    "stuff_classes",
    "stuff_dataset_id_to_contiguous_id",
    "stuff_colors",
    "ignore_label",
    "keypoint_names",
    "keypoint_flip_map",
    "keypoint_connection_rules",
)


def class_metadata(dataset_names: Sequence[str]) -> dict[str, Any]:
    """What is known about the classes of the training data, for the checkpoints."""
    if not dataset_names:
        return {}
    metadata = MetadataCatalog.get(dataset_names[0])
    found = {key: metadata.get(key) for key in _KEYS}
    return {
        "dataset": dataset_names[0],
        **{key: value for key, value in found.items() if value is not None},
    }
