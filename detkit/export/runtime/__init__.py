"""Runs exported models with NumPy, Pillow, and onnxruntime or openvino: torch is not imported."""
