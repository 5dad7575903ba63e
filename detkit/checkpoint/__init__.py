"""Saving and loading of models and training states, without running anything that a file contains."""

from detkit.checkpoint.detection_checkpoint import DetectionCheckpointer
from detkit.checkpoint.key_matching import LoadReport
from detkit.checkpoint.periodic_checkpoint import PeriodicCheckpointer
from detkit.checkpoint.safe_load import CheckpointError, UnsafeCheckpointError, load_checkpoint_file
from detkit.checkpoint.safe_save import save_checkpoint_file
from detkit.checkpoint.torchvision_weights import torchvision_weights_file

__all__ = [
    "CheckpointError",
    "DetectionCheckpointer",
    "LoadReport",
    "PeriodicCheckpointer",
    "UnsafeCheckpointError",
    "load_checkpoint_file",
    "save_checkpoint_file",
    "torchvision_weights_file",
]
