import json
import sys

import numpy as np
import pytest
from PIL import Image

from detkit.config import get_cfg
from detkit.data import DatasetCatalog
from detkit.export.quantize import calibration_images, check_copies, quantize_onnx, write_copies
from detkit.export.runtime import ExportedPredictor
from detkit.export.runtime.model_file import open_model
from detkit.utils.errors import ConfigError, MissingPackageError
from tests.export.runtime.fakes import metadata, write_onnx


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
    (copy,) = write_copies(path, "int8", ["openvino"], _images(2))
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
    assert check_copies("int8", ["onnx", "torch_export", "openvino"]) == ["onnx", "openvino"]
    with pytest.raises(ConfigError, match="--int8: torch_export cannot"):
        check_copies("int8", ["torch_export"])


def test_copy_in_float16_rounds_weights_and_maps_but_no_boxes(tmp_path):
    onnx = pytest.importorskip("onnx")
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    path = write_onnx(tmp_path / "model.onnx")
    wide = np.full((20, 4099, 3), 7, np.uint8)  # coordinates beyond the eleven bits of float16
    expected = ExportedPredictor(path)(wide)["instances"].pred_boxes
    assert not np.array_equal(expected.astype(np.float16), expected)
    copies = write_copies(path, "fp16", ["onnx", "openvino"])
    assert [copy.name for copy in copies] == ["model_fp16.onnx", "model_fp16.xml"]
    for copy in copies:
        predictor = ExportedPredictor(copy)
        assert predictor.metadata.document["precision"] == "float16"
        np.testing.assert_array_equal(predictor(wide)["instances"].pred_boxes, expected)
    weights = {x.name: x.data_type for x in onnx.load(copies[0]).graph.initializer}
    assert "kernel" not in weights
    assert weights["kernel_float16"] == onnx.TensorProto.FLOAT16


def test_values_pass_in_float16_between_operators_that_compute_in_it(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        agraph (float[n,3,h,w] images, int64[n,2] image_sizes)
            => (float[n,3,h,w] sem_seg, float[n,3,h,w] rest, float[n,3,h,w] square)
            <float[3,3,1,1] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9}>
        {
            first = Conv (images, weight)
            second = Relu (first)
            third = Add (first, second)
            sem_seg = Conv (third, weight)
            rest = Add (second, images)
            square = Mul (second, second)
        }
    """)
    values = {**metadata(), "outputs": ["sem_seg"], "architecture": "SemanticSegmentor"}
    onnx.helper.set_model_props(model, {"detkit": json.dumps(values)})
    onnx.save(model, tmp_path / "m.onnx")
    (copy,) = write_copies(tmp_path / "m.onnx", "fp16", ["onnx"])
    graph = onnx.load(copy).graph
    steps = [(node.op_type, list(node.input)) for node in graph.node]
    assert steps == [
        ("Cast", ["images"]),
        ("Conv", ["images_float16", "weight_float16"]),
        ("Relu", ["first_float16"]),
        ("Add", ["first_float16", "second_float16"]),
        ("Conv", ["third_float16", "weight_float16"]),
        ("Cast", ["second_float16"]),
        ("Add", ["second", "images"]),
        ("Mul", ["second", "second"]),
        ("Cast", ["sem_seg_float16"]),
    ]
    assert [x.name for x in graph.initializer] == ["weight_float16"]
    image = np.ones((1, 3, 2, 2), np.float32)
    arrays = {"images": image, "image_sizes": np.array([[2, 2]])}
    # 1, 2, 3 + 4, 5, 6 ... in each channel, twice.
    _, run = open_model(copy)
    sums = 2 * np.array([6, 15, 24])
    found = run(arrays)
    assert found["sem_seg"].dtype == found["rest"].dtype == np.float32
    np.testing.assert_array_equal(
        found["sem_seg"][0, :, 0, 0], [[1, 2, 3], [4, 5, 6], [7, 8, 9]] @ sums
    )
    np.testing.assert_array_equal(found["rest"][0, :, 0, 0], sums / 2 + 1)


def test_copy_in_bfloat16_is_computed_so_and_other_files_are_not(tmp_path, monkeypatch):
    openvino = pytest.importorskip("openvino")
    for package in ("onnx", "onnxruntime"):
        pytest.importorskip(package)
    path = write_onnx(tmp_path / "model.onnx")
    (copy,) = write_copies(path, "bf16", ["openvino"])
    assert copy.name == "model_bf16.xml"
    assert not (tmp_path / "model_bf16.onnx").exists()
    (plain,) = write_copies(path, "fp16", ["openvino"])
    hints = []
    compile_model = openvino.Core.compile_model

    def recorded(core, model, device, settings):
        hints.append(settings["INFERENCE_PRECISION_HINT"])
        return compile_model(core, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", recorded)
    assert ExportedPredictor(copy).metadata.document["precision"] == "bfloat16"
    ExportedPredictor(plain)
    assert hints == ["bf16", "f32"]


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
