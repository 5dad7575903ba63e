import sys

import numpy as np
import pytest

from detkit.export.quantize import quantize_onnx
from detkit.export.runtime import ExportedPredictor
from detkit.utils.errors import ConfigError, MissingPackageError
from tests.export.runtime.fakes import write_onnx


def _images(count):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20, 30 + i, 3), dtype=np.uint8) for i in range(count)]


def test_copy_computes_in_int8_and_says_so(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "m.onnx")
    quantize_onnx(path, tmp_path / "q.onnx", _images(3))
    before, after = ExportedPredictor(path), ExportedPredictor(tmp_path / "q.onnx")
    assert after.metadata.document == {**before.metadata.document, "precision": "int8"}
    (weights,) = (
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer
        if tensor.dims == [8, 3, 3, 3]
    )
    assert weights.dtype == np.int8
    for image in _images(2):
        found = [predictor(image)["instances"].pred_boxes for predictor in (before, after)]
        assert np.array_equal(*found)


def test_calibration_needs_images(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ConfigError, match="--calibrate: the data set has no images"):
        quantize_onnx(write_onnx(tmp_path / "m.onnx"), tmp_path / "q.onnx", [])
    assert not (tmp_path / "q.onnx").exists()


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingPackageError, match="pip install 'detkit-vision\\[onnx\\]'"):
        quantize_onnx(tmp_path / "m.onnx", tmp_path / "q.onnx", [])
