"""Runs exported models with NumPy, Pillow, and onnxruntime or openvino: torch is not imported."""

from detkit.export.runtime.model_file import (
    ENDINGS,
    WRITTEN_ENDINGS,
    ModelFileError,
    ModelMetadata,
)
from detkit.export.runtime.predictor import ExportedPredictor
from detkit.export.runtime.results import Detections
from detkit.utils.image import read_image

__all__ = [
    "ENDINGS",
    "WRITTEN_ENDINGS",
    "Detections",
    "ExportedPredictor",
    "ModelFileError",
    "ModelMetadata",
    "read_image",
]
