"""Runs exported models with NumPy, Pillow, and onnxruntime or openvino: torch is not imported."""

from detkit.export.runtime.model_file import ModelFileError, ModelMetadata
from detkit.export.runtime.predictor import ExportedPredictor
from detkit.export.runtime.results import Detections
from detkit.utils.image import read_image

__all__ = ["Detections", "ExportedPredictor", "ModelFileError", "ModelMetadata", "read_image"]
