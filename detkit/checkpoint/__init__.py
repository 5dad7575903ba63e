"""Saving and loading of models and training states, without running anything that a file contains."""

from detkit.checkpoint.detection_checkpoint import DetectionCheckpointer
from detkit.checkpoint.foreign import translate_for, translate_for_file
from detkit.checkpoint.foreign_layout import Translation
from detkit.checkpoint.foreign_torchvision import fold_frozen_eps
from detkit.checkpoint.initial_weights import HasInitialWeights
from detkit.checkpoint.key_matching import LoadReport, match_weights, strip_wrapper_prefixes
from detkit.checkpoint.periodic_checkpoint import PeriodicCheckpointer
from detkit.checkpoint.resnet_depth import check_depth
from detkit.checkpoint.safe_load import CheckpointError, UnsafeCheckpointError, load_checkpoint_file
from detkit.checkpoint.safe_save import save_checkpoint_file
from detkit.checkpoint.torchvision_weights import published_file_name, torchvision_weights_file
from detkit.checkpoint.weights_file import check_weight_format, save_weights_file

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
