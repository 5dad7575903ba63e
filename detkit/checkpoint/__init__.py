"""Saving and loading of models and training states, without running code from files."""

from detkit.checkpoint.detection_checkpoint import DetectionCheckpointer, HasInitialWeights
from detkit.checkpoint.foreign import (
    Translation,
    fold_frozen_eps,
    translate_for,
    translate_for_file,
)
from detkit.checkpoint.key_matching import (
    LoadReport,
    check_depth,
    match_weights,
    strip_wrapper_prefixes,
)
from detkit.checkpoint.periodic_checkpoint import PeriodicCheckpointer
from detkit.checkpoint.safe_load import CheckpointError, UnsafeCheckpointError, load_checkpoint_file
from detkit.checkpoint.safe_save import check_weight_format, save_checkpoint_file, save_weights_file
from detkit.checkpoint.torchvision_weights import published_file_name, torchvision_weights_file

__all__ = [
    "CheckpointError",
    "DetectionCheckpointer",
    "HasInitialWeights",
    "LoadReport",
    "PeriodicCheckpointer",
    "Translation",
    "UnsafeCheckpointError",
    "check_depth",
    "check_weight_format",
    "fold_frozen_eps",
    "load_checkpoint_file",
    "match_weights",
    "published_file_name",
    "save_checkpoint_file",
    "save_weights_file",
    "strip_wrapper_prefixes",
    "torchvision_weights_file",
    "translate_for",
    "translate_for_file",
]
