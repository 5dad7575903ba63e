import sys

import numpy as np
import pytest
from PIL import Image

from detkit.config import get_cfg
from detkit.data import DatasetCatalog
from detkit.export.quantize import calibration_images, quantize_onnx, write_int8
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


def test_copies_lie_beside_the_file_in_the_formats_asked_for(tmp_path):
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    path = write_onnx(tmp_path / "model.onnx")
    (copy,) = write_int8(path, ["openvino"], _images(2))
    assert copy == tmp_path / "model_int8.xml"
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "model.onnx",
        "model_int8.bin",
        "model_int8.xml",
    ]
    predictor = ExportedPredictor(copy)
    assert predictor.metadata.document["precision"] == "int8"
    expected = ExportedPredictor(path)(_images(1)[0])["instances"].pred_boxes
    assert np.array_equal(predictor(_images(1)[0])["instances"].pred_boxes, expected)
    with pytest.raises(ConfigError, match="torch_export has no int8"):
        write_int8(path, ["torch_export"], [])


def test_images_come_from_all_over_the_data_set(tmp_path):
    records = []
    for i in range(70):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
        records.append({"file_name": str(tmp_path / f"{i}.png"), "image_id": i})
    DatasetCatalog.register("test_calibration", lambda: records)
    try:
        reds = [int(image[0, 0, 2]) for image in calibration_images(get_cfg(), "test_calibration")]
    finally:
        DatasetCatalog.remove("test_calibration")
    assert reds == list(range(0, 64, 2))


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
