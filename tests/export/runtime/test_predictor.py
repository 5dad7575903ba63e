import json

import numpy as np
import pytest

from detkit.export.runtime import ExportedPredictor, ModelFileError
from detkit.export.runtime.model_file import read_metadata
from tests.export.runtime.fakes import COUNT, SCORES, metadata, outputs_of, write_onnx

_PANOPTIC = {"overlap_threshold": 0.5, "stuff_area_limit": 1, "instances_score_threshold": 0.5}
_ALL = ["boxes", "scores", "classes", "num_detections", "masks", "sem_seg"]


@pytest.fixture
def make(monkeypatch):
    """Makes a predictor of a model that is a function, and keeps what the function was given."""

    def make_predictor(run=outputs_of, score_threshold=None, **changes):
        read = read_metadata(json.dumps(metadata(**changes)), "m.onnx")
        given = []

        def model(arrays):
            given.append(arrays)
            return run(arrays["images"], arrays["image_sizes"])

        monkeypatch.setattr(
            "detkit.export.runtime.predictor.open_model", lambda path, threads: (read, model)
        )
        predictor = ExportedPredictor("m.onnx", score_threshold=score_threshold)
        predictor.given = given
        return predictor

    return make_predictor


def _image(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_images_of_unlike_size_are_padded_and_reordered(make, order):
    predictor = make(outputs=_ALL, input={"format": order, "channels": 3, "dtype": "uint8"})
    small, large = _image(20, 50), _image(40, 30)
    found = predictor.predict([small, large])
    (given,) = predictor.given
    assert given["images"].shape == (2, 3, 40, 50)
    assert given["images"].dtype == np.uint8
    assert given["image_sizes"].tolist() == [[20, 50], [40, 30]]
    expected = small[:, :, ::-1] if order == "RGB" else small
    assert np.array_equal(given["images"][0, :, :20].transpose(1, 2, 0), expected)
    assert not given["images"][0, :, 20:].any()
    assert not given["images"][1, :, :, 30:].any()
    assert found[1]["instances"].pred_boxes[0].tolist() == [7.5, 5, 22.5, 20]
    assert found[1]["instances"].pred_classes.tolist() == [1, 0]
    assert len(found[0]["instances"]) == COUNT
    assert np.array_equal(found[0]["sem_seg"].transpose(1, 2, 0), expected)
    assert predictor.predict([]) == []


def test_outputs_are_scaled_back_to_the_image(make):
    resize = {"rule": "detectron2", "min_size": 80, "max_size": 1000}
    predictor = make(outputs=_ALL, resize=resize, panoptic=_PANOPTIC, stuff_classes=["things", "a"])
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :, 1] = 200
    found = predictor(image)
    assert predictor.given[0]["images"].shape == (1, 3, 80, 160)
    assert np.allclose(found["instances"].pred_boxes, [[10, 2.5, 30, 10], [20, 10, 40, 20]])
    assert found["instances"].pred_masks.shape == (2, 20, 40)
    assert found["instances"].pred_masks[1, 15, 30]
    assert not found["instances"].pred_masks[1, :10].any()
    assert found["sem_seg"].shape == (3, 20, 40)
    segments, infos = found["panoptic_seg"]
    assert [(info["isthing"], info["category_id"]) for info in infos] == [(True, 1), (False, 1)]
    assert np.unique(segments).tolist() == [1, 2]


def test_score_threshold_holds_for_objects_and_for_merging(make):
    predictor = make(outputs=_ALL, panoptic=_PANOPTIC, score_threshold=0.3)
    found = predictor(_image(20, 40))
    assert len(found["instances"]) == 2
    assert sum(info["isthing"] for info in found["panoptic_seg"][1]) == 2
    predictor.score_threshold = 0.95
    assert len(predictor(_image(20, 40))["instances"]) == 0


def test_threshold_below_that_of_the_file_is_warned_of(make, caplog):
    make(score_threshold=0.05)
    assert caplog.text == ""
    make(score_threshold=0.01)
    assert "m.onnx was exported to find nothing below a score of 0.05" in caplog.text


def test_fractions_reach_a_model_of_floats(make):
    resize = {"rule": "torchvision", "min_size": 33, "max_size": 50}
    predictor = make(resize=resize, input={"format": "BGR", "channels": 3, "dtype": "float32"})
    predictor(_image(20, 20))
    images = predictor.given[0]["images"]
    assert images.dtype == np.float32
    assert (images % 1 != 0).any()


def test_rows_past_the_count_are_no_objects(make):
    def run(images, image_sizes):
        outputs = outputs_of(images, image_sizes)
        outputs["boxes"][:, COUNT:] = [1, 1, 9, 9]
        return outputs

    assert len(make(run)(_image(20, 40))["instances"]) == COUNT


def test_proposals_have_no_classes(make):
    predictor = make(outputs=["boxes", "scores", "num_detections"])
    found = predictor(_image(20, 40))
    assert found.keys() == {"proposals"}
    assert found["proposals"].scores.tolist() == SCORES[:COUNT].tolist()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        pytest.param([[0]], "an image must be an .* got list", id="list"),
        pytest.param(np.zeros((4, 4, 3)), "got float64", id="float64"),
        pytest.param(np.zeros((4, 4), np.uint8), r"must have shape \(H, W, 3\), got", id="grey"),
        pytest.param(np.zeros((0, 4, 3), np.uint8), r"must have shape", id="empty"),
    ],
)
def test_wrong_image_is_named(make, image, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()(image)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        pytest.param("boxes", lambda x: x[:, :, :3], "'boxes' is float32 of shape", id="boxes"),
        pytest.param("scores", lambda x: x[:, :1], "'scores' is float32 of shape", id="scores"),
        pytest.param("num_detections", lambda x: x + 9, "num_detections is", id="more than rows"),
        pytest.param("num_detections", lambda x: x - 9, "num_detections is", id="below 0"),
        pytest.param("classes", lambda x: x - 1, "a class below 0", id="classes"),
        pytest.param("classes", lambda x: x + 0.5, "'classes' is float64", id="fractions"),
        pytest.param(
            "sem_seg", lambda x: x[:, :, 1:], "'sem_seg' is float32 of shape", id="pixels"
        ),
        pytest.param(
            "sem_seg", lambda x: x[:, :0], "'sem_seg' is float32 of shape", id="no class of pixels"
        ),
        pytest.param("masks", lambda x: x[..., :0], "'masks' is float32 of shape", id="no cells"),
    ],
)
def test_outputs_that_break_the_rules_are_refused(make, name, change, message):
    def run(images, image_sizes):
        outputs = outputs_of(images, image_sizes)
        return outputs | {name: change(outputs[name])}

    with pytest.raises(ModelFileError, match=message):
        make(run, outputs=_ALL)(_image(20, 40))


def test_more_objects_than_announced_are_refused(make):
    assert len(make(max_detections=3)(_image(20, 40))["instances"]) == COUNT  # of 3 rows
    with pytest.raises(
        ModelFileError, match="it returns 3 objects per image, more than the 2 that"
    ):
        make(max_detections=2)(_image(20, 40))


def test_failure_of_the_library_is_told(make):
    def run(images, image_sizes):
        raise RuntimeError("Conv:\n  wrong shape\n")

    with pytest.raises(ModelFileError, match=r"m\.onnx fails at a batch of .*Conv: wrong shape$"):
        make(run)(_image(20, 40))


def test_file_is_run_by_onnxruntime(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    predictor = ExportedPredictor(write_onnx(tmp_path / "m.onnx"), num_threads=1)
    first, second = predictor.predict([_image(20, 40), _image(40, 80)])
    assert first["instances"].pred_boxes.tolist() == [[10, 2.5, 30, 10], [20, 10, 40, 20]]
    assert (second["instances"].pred_boxes == 2 * first["instances"].pred_boxes).all()
    assert second["instances"].scores.tolist() == SCORES[:COUNT].tolist()


def test_file_is_run_by_openvino(tmp_path):
    pytest.importorskip("onnx")
    openvino = pytest.importorskip("openvino")
    model = openvino.convert_model(write_onnx(tmp_path / "m.onnx"))
    model.set_rt_info(json.dumps(metadata()), ["detkit"])
    openvino.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    found = ExportedPredictor(tmp_path / "m.xml", num_threads=1)(_image(20, 40))
    assert found["instances"].pred_boxes.tolist() == [[10, 2.5, 30, 10], [20, 10, 40, 20]]
    assert found["instances"].pred_classes.tolist() == [1, 0]
