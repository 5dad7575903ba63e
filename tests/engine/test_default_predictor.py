import numpy as np
import pytest
import torch

from detkit.checkpoint import CheckpointError
from detkit.engine import DefaultPredictor, DefaultTrainer
from detkit.engine.default_predictor import _metadata
from detkit.layers.cpu.prepared_weights import prepared
from detkit.modeling import build_model


@pytest.fixture
def trained_cfg(tiny_cfg):
    """The tiny config after its training, with its weights."""
    tiny_cfg.DATASETS.TEST = ()
    DefaultTrainer(tiny_cfg).train()
    tiny_cfg.MODEL.WEIGHTS = f"{tiny_cfg.OUTPUT_DIR}/model_final.pth"
    return tiny_cfg


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)


def test_predicts_in_pixels_of_the_given_image(trained_cfg, image):
    instances = DefaultPredictor(trained_cfg)(image)["instances"]
    assert instances.image_size == (60, 80)
    assert instances.pred_boxes.tensor.tolist() == [[1, 1, 79, 59]]
    assert not instances.scores.requires_grad


def spy_on_inputs(predictor):
    seen = []
    model = predictor.model
    predictor.model = lambda batch: seen.append(batch[0]) or model(batch)
    return seen


def test_image_is_resized_as_in_testing(trained_cfg, image):
    trained_cfg.INPUT.MIN_SIZE_TEST, trained_cfg.INPUT.MAX_SIZE_TEST = 30, 100
    predictor = DefaultPredictor(trained_cfg)
    seen = spy_on_inputs(predictor)
    predictor(image)
    assert seen[0]["image"].shape == (3, 30, 40)
    assert seen[0]["image"].dtype == torch.uint8
    assert (seen[0]["height"], seen[0]["width"]) == (60, 80)
    # Scripts that stop half-way through a model resize by themselves, some under the older name.
    for resize in (predictor.aug, predictor.transform_gen):
        assert resize.get_transform(image).apply_image(image).shape == (30, 40, 3)


def test_weights_are_prepared_once_for_all_images(trained_cfg, image):
    predictor = DefaultPredictor(trained_cfg)
    layer, computed = torch.nn.Identity(), []

    def model(batch):
        prepared(layer, "number", [], lambda: computed.append(1))
        return batch

    predictor.model = model
    for _ in range(3):
        predictor(image)
    assert len(computed) == 1


@pytest.mark.parametrize(("input_format", "channel"), [("BGR", 0), ("RGB", 2)])
def test_bgr_image_reaches_the_model_in_its_own_order(trained_cfg, input_format, channel):
    trained_cfg.INPUT.FORMAT = input_format
    predictor = DefaultPredictor(trained_cfg)
    seen = spy_on_inputs(predictor)
    blue = np.zeros((40, 40, 3), dtype=np.uint8)
    blue[:, :, 0] = 200
    predictor(blue)
    assert seen[0]["image"].float().mean((1, 2)).argmax() == channel


def test_given_image_and_config_are_not_changed(trained_cfg, image):
    trained_cfg.freeze()
    before = image.copy()
    DefaultPredictor(trained_cfg)(image)
    assert (image == before).all()


def test_checkpoint_alone_names_the_classes(trained_cfg):
    trained_cfg.DATASETS.TRAIN = ()
    assert DefaultPredictor(trained_cfg).metadata.thing_classes == ["red", "green"]


def test_classes_of_the_checkpoint_win_over_those_of_the_test_set(trained_cfg):
    trained_cfg.DATASETS.TEST = ("coco_2017_val",)
    assert DefaultPredictor(trained_cfg).metadata.thing_classes == ["red", "green"]


def test_bare_weights_take_the_names_of_the_test_set(trained_cfg, tmp_path):
    torch.save(build_model(trained_cfg).state_dict(), tmp_path / "w.pth")
    trained_cfg.MODEL.WEIGHTS, trained_cfg.DATASETS.TEST = (
        str(tmp_path / "w.pth"),
        ("coco_2017_val",),
    )
    assert DefaultPredictor(trained_cfg).metadata.thing_classes[0] == "person"


def test_bare_weights_without_test_set_have_no_names(trained_cfg, tmp_path, caplog):
    torch.save(build_model(trained_cfg).state_dict(), tmp_path / "w.pth")
    trained_cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    assert DefaultPredictor(trained_cfg).metadata.get("thing_classes") is None
    assert "shown by number" in caplog.text


def test_random_weights_are_refused(tiny_cfg):
    with pytest.raises(ValueError, match=r"set MODEL\.WEIGHTS"):
        DefaultPredictor(tiny_cfg)


def test_partial_weights_are_refused_unless_allowed(trained_cfg, image):
    trained_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(CheckpointError, match=r"re-initialised: head\.\*"):
        DefaultPredictor(trained_cfg)
    assert len(DefaultPredictor(trained_cfg, allow_partial=True)(image)["instances"]) == 1


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        pytest.param("a.jpg", TypeError, "as read_image gives it; got a str", id="path"),
        pytest.param(np.zeros((4, 4, 3)), TypeError, "got an array of float64", id="float"),
        pytest.param(
            np.zeros((4, 4), np.uint8), ValueError, r"\(H, W, 3\), got \(4, 4\)", id="grey"
        ),
        pytest.param(
            np.zeros((3, 4, 4), np.uint8),
            ValueError,
            r"\(H, W, 3\), got \(3, 4, 4\)",
            id="channels-first",
        ),
        pytest.param(np.zeros((0, 4, 3), np.uint8), ValueError, r"got \(0, 4, 3\)", id="empty"),
    ],
)
def test_what_is_no_image_is_named(trained_cfg, bad, error, message):
    with pytest.raises(error, match=message):
        DefaultPredictor(trained_cfg)(bad)


def test_metadata_that_are_named_as_attributes_of_their_table_are_left_out(trained_cfg):
    own = {"thing_classes": ["a", "b"], "name": "x", "self": 1, "get": 2, "__class__": 3}
    metadata = _metadata(own, trained_cfg)
    assert metadata.name == trained_cfg.MODEL.WEIGHTS
    assert metadata.get("thing_classes") == ["a", "b"]


def test_half_precision_is_that_of_convolutions_alone(trained_cfg, image):
    full = DefaultPredictor(trained_cfg)(image)["instances"]
    trained_cfg.TEST.AMP.ENABLED = True
    predictor = DefaultPredictor(trained_cfg)
    seen = []
    predictor.model.conv.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    half = predictor(image)["instances"]
    assert seen == [torch.bfloat16]
    torch.testing.assert_close(half.scores.float(), full.scores, atol=0.01, rtol=0.0)
    assert not torch.is_autocast_enabled("cpu")


def test_float16_without_cuda_is_an_error(trained_cfg):
    trained_cfg.TEST.AMP.ENABLED, trained_cfg.TEST.AMP.DTYPE = True, "fp16"
    with pytest.raises(
        ValueError, match=r"TEST\.AMP\.DTYPE fp16 needs MODEL\.DEVICE cuda, .* on cpu: use bf16"
    ):
        DefaultPredictor(trained_cfg)
