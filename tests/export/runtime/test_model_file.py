import json
import sys

import pytest

from detkit.export.runtime.model_file import ModelFileError, open_model, read_metadata
from detkit.utils.errors import MissingFileError, MissingPackageError
from tests.export.runtime.fakes import metadata, write_onnx

_PANOPTIC = {"overlap_threshold": 0.5, "stuff_area_limit": 4096, "instances_score_threshold": 0.5}
_ALL = ["boxes", "scores", "classes", "num_detections", "masks", "sem_seg"]


def _read(**changes):
    return read_metadata(json.dumps(metadata(**changes)), "m.onnx")


def test_metadata_is_read_into_fields():
    read = _read(
        outputs=_ALL,
        panoptic=_PANOPTIC,
        stuff_classes=["things", "sky"],
        thing_colors=[[1, 2, 3], [4, 5, 6]],
        keypoint_connection_rules=[["nose", "eye", [0, 0, 255]]],
        weights_sha256="abc",
    )
    assert read.thing_classes == ("cat", "dog")
    assert read.panoptic == _PANOPTIC
    assert read.thing_colors == ((1, 2, 3), (4, 5, 6))
    assert read.keypoint_connection_rules == (("nose", "eye", (0, 0, 255)),)
    assert (read.input_format, read.channels, read.dtype) == ("BGR", 3, "uint8")
    assert (read.score_threshold, read.mask_threshold, read.mask_pasted) == (0.05, 0.5, False)
    assert read.document["weights_sha256"] == "abc"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"format": 2}, "version 2, this detkit reads version 1", id="version"),
        pytest.param({"format": None}, "'format', must be a number", id="no version"),
        pytest.param({"format": True}, "'format', must be a number", id="bool for a number"),
        pytest.param({"input": None}, "'input', must be an object", id="no input"),
        pytest.param(
            {"input": {"format": "XYZ", "channels": 3, "dtype": "uint8"}},
            "'input.format', must be one of BGR.*is 'XYZ'",
            id="order of channels",
        ),
        pytest.param(
            {"input": {"format": "BGR", "channels": 10**9, "dtype": "uint8"}},
            "'input.channels', must be a number from 1 to 1000",
            id="channels",
        ),
        pytest.param(
            {"input": {"format": "BGR", "channels": 3, "dtype": "float64"}},
            "'input.dtype', must be one of uint8, float32",
            id="type of pixels",
        ),
        pytest.param(
            {"resize": {"rule": "torchvision", "min_size": 8, "max_size": 9}},
            "'input.dtype', must be float32",
            id="fractions for uint8",
        ),
        pytest.param(
            {"resize": {"rule": "detectron2", "min_size": 1e99, "max_size": 9}},
            "'resize.min_size', must be a number from 0 to 100000",
            id="size",
        ),
        pytest.param(
            {"resize": {"rule": "detectron2", "min_size": 8.5, "max_size": 9}},
            "'resize.min_size', must be a whole number",
            id="fraction of a pixel",
        ),
        pytest.param({"outputs": []}, "'outputs', must be some of", id="no outputs"),
        pytest.param({"outputs": ["boxes", "x"]}, "'outputs', must be some of", id="unknown output"),
        pytest.param(
            {"outputs": ["boxes"]}, "'outputs', must be with num_detections, scores", id="boxes alone"
        ),
        pytest.param(
            {"panoptic": _PANOPTIC}, "with classes, masks and sem_seg", id="nothing to merge"
        ),
        pytest.param(
            {"outputs": _ALL, "panoptic": {}}, "'panoptic.overlap_threshold', must", id="thresholds"
        ),
        pytest.param({"thing_classes": [1]}, "'thing_classes', must be text", id="number for a name"),
        pytest.param({"thing_classes": "cat"}, "'thing_classes', must be a list", id="text for a list"),
        pytest.param({"thing_classes": ["x" * 2000]}, "at most 1000 characters", id="long name"),
        pytest.param({"thing_colors": [[0, 0, 256]]}, "'thing_colors', must be colours", id="colour"),
        pytest.param(
            {"keypoint_connection_rules": [["a"]]}, "lists of two names", id="connection of one"
        ),
        pytest.param({"score_threshold": float("nan")}, "'score_threshold', must", id="nan"),
        pytest.param(
            {"max_detections": 10_001}, "'max_detections', must be a number from 1 to 10000", id="objects"
        ),
        pytest.param({"max_detections": 0}, "'max_detections', must be a number", id="no objects"),
        pytest.param({"architecture": 3}, "'architecture', must be text", id="architecture"),
    ],
)  # fmt: skip
def test_wrong_metadata_is_named(changes, message):
    with pytest.raises(ModelFileError, match=rf"^m\.onnx.*{message}"):
        _read(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("{", "is no JSON", id="half"),
        pytest.param("[" * 100_000, "is no JSON", id="deep"),
        pytest.param("[]", "its metadata must be an object", id="list"),
        pytest.param(" " * 17_000_000, "17000000 characters, which is too many", id="long"),
    ],
)
def test_what_is_no_metadata_is_refused(text, message):
    with pytest.raises(ModelFileError, match=message):
        read_metadata(text, "m.onnx")


def test_file_of_another_kind_is_refused(tmp_path):
    for name, message in (("m.pt2", "got .*m.pt2: torch runs that"), ("m.txt", "got .*m.txt$")):
        (tmp_path / name).touch()
        with pytest.raises(ModelFileError, match=message):
            open_model(tmp_path / name)
    with pytest.raises(MissingFileError, match=r"no such model file: .*none\.onnx"):
        open_model(tmp_path / "none.onnx")


@pytest.mark.parametrize(("ending", "package"), [("onnx", "onnxruntime"), ("xml", "openvino")])
def test_missing_library_is_named(tmp_path, monkeypatch, ending, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"m.{ending}").touch()
    with pytest.raises(MissingPackageError, match=rf"needs {package}: pip install 'detkit-vision"):
        open_model(tmp_path / f"m.{ending}")


def test_file_that_is_no_model_is_refused(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "m.onnx").write_bytes(b"no model" * 100)
    with pytest.raises(ModelFileError, match=r"m\.onnx is no model that onnxruntime can run: "):
        open_model(tmp_path / "m.onnx")


def test_page_of_the_web_is_refused_without_words_of_other_readers(tmp_path, capfd):
    pytest.importorskip("openvino")
    (tmp_path / "m.xml").write_text("<html>not found</html>")
    with pytest.raises(ModelFileError, match=r"m\.xml is no model that openvino can run: "):
        open_model(tmp_path / "m.xml")
    assert capfd.readouterr() == ("", "")


def test_metadata_of_other_bytes_than_text_are_refused(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "m.onnx", text="@@")
    path.write_bytes(path.read_bytes().replace(b"@@", b"\xff\xfe"))
    with pytest.raises(ModelFileError, match=r"m\.onnx is no model .*'utf-8' codec"):
        open_model(path)
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(write_onnx(tmp_path / "m.onnx"))
    model.set_rt_info("@@", ["detkit"])
    openvino.save_model(model, tmp_path / "m.xml")
    content = (tmp_path / "m.xml").read_bytes()
    (tmp_path / "m.xml").write_bytes(content.replace(b"@@", b"\xff\xfe"))
    with pytest.raises(ModelFileError, match=r"m\.xml is no model .*'utf-8' codec"):
        open_model(tmp_path / "m.xml")


def test_model_of_another_program_is_refused(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ModelFileError, match=r"m\.onnx has no metadata of detkit"):
        open_model(write_onnx(tmp_path / "m.onnx", text=""))
    values = metadata(outputs=_ALL)
    with pytest.raises(ModelFileError, match="but the model has no masks, sem_seg"):
        open_model(write_onnx(tmp_path / "m.onnx", values))
