import io
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.config import get_cfg
from detkit.engine import DefaultPredictor, DefaultTrainer, Predictor
from detkit.engine.predictor import config_of_checkpoint
from detkit.modeling import build_model
from detkit.utils.errors import ConfigError, DataError, MissingFileError, UserError
from detkit.utils.media_file import Video, VideoWriter


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A Faster R-CNN of random weights that finds something everywhere."""
    cfg = get_cfg()
    cfg.merge_from_file("detkit://quick_start/faster_rcnn_R_18_FPN_shapes.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = "cpu", 0.0
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (), ()
    cfg.MODEL.WEIGHTS = ""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "model.pth"
    torch.save({"model": build_model(cfg).state_dict(), "config": cfg.dump()}, path)
    return str(path)


@pytest.fixture
def detector_cfg(weights):
    return config_of_checkpoint(weights)


def _pictures(count, seed=0):
    """RGB pictures of two shapes, in turns."""
    rng = np.random.default_rng(seed)
    shapes = [(60, 80, 3), (80, 60, 3), (62, 80, 3)]
    return [rng.integers(0, 255, shapes[i % 3], dtype=np.uint8) for i in range(count)]


def _found(prediction):
    instances = prediction["instances"]
    return torch.cat([instances.pred_boxes.tensor, instances.scores[:, None]], dim=1)


def test_checkpoint_needs_nothing_else(tiny_cfg):
    DefaultTrainer(tiny_cfg).train()
    predictor = Predictor(f"{tiny_cfg.OUTPUT_DIR}/model_final.pth", threshold=0.3)
    assert predictor.metadata.thing_classes == ["red", "green"]
    assert predictor.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.3
    assert len(predictor(np.zeros((40, 48, 3), np.uint8), input="rgb").instances) == 1


def test_best_checkpoint_holds_the_config(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD, tiny_cfg.BEST_METRIC = 3, "bbox/AP"
    DefaultTrainer(tiny_cfg).train()
    assert config_of_checkpoint(f"{tiny_cfg.OUTPUT_DIR}/model_best.pth").SEED == tiny_cfg.SEED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("SEED: [" * 70, "nested more than 64 deep", id="deep"),
        pytest.param("a: &a [*a]", "contains itself", id="circle"),
        pytest.param("SEED: 2001-99-99", "unreadable value", id="date"),
        pytest.param("A: !!python/name:os.system", "configs run no code", id="code"),
        pytest.param("SOLVER: {NEW_KEY: 1}", r":1: unknown config key SOLVER.NEW_KEY", id="key"),
    ],
)
def test_config_in_a_checkpoint_is_read_like_a_file(text, message, tmp_path):
    path = tmp_path / "any.pth"
    torch.save({"model": {"weight": torch.zeros(1)}, "config": text}, path)
    with pytest.raises(UserError, match=f"any.pth.*{message}"):
        config_of_checkpoint(str(path))


@pytest.mark.parametrize(
    ("output_dir", "expected"),
    [
        pytest.param("runs/first", "runs/first", id="its own"),
        pytest.param("{tmp_path}/runs/first", "runs/first", id="its own, absolute"),
        pytest.param("runs/second", "runs/second", id="below"),
        pytest.param("runs/../..", "output", id="above"),
        pytest.param("/etc", "output", id="of the system"),
        pytest.param("{tmp_path}2", "output", id="beside"),
    ],
)
def test_checkpoint_does_not_choose_any_folder_to_write_to(
    output_dir, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = Path("runs/first/model.pth")
    path.parent.mkdir(parents=True)
    config = f"OUTPUT_DIR: '{output_dir.format(tmp_path=tmp_path)}'"
    torch.save({"model": {"weight": torch.zeros(1)}, "config": config}, path)
    assert Path(config_of_checkpoint(str(path)).OUTPUT_DIR).absolute() == tmp_path / expected
    (tmp_path / "config.yaml").write_text("OUTPUT_DIR: /chosen")
    assert config_of_checkpoint("any.pth", str(tmp_path / "config.yaml")).OUTPUT_DIR == "/chosen"


@pytest.mark.parametrize(
    ("trained_on", "device"), [("cuda:1", None), ("auto", None), ("cpu", "cpu")]
)
def test_gpu_of_the_machine_that_trained_is_not_asked_for(tmp_path, trained_on, device):
    path = tmp_path / "model.pth"
    torch.save(
        {"model": {"weight": torch.zeros(1)}, "config": f"MODEL: {{DEVICE: {trained_on}}}"}, path
    )
    found = config_of_checkpoint(str(path)).MODEL.DEVICE
    assert found == (device or get_cfg().MODEL.DEVICE)


def test_folder_of_a_checkpoint_elsewhere_is_written_to(tmp_path, monkeypatch):
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    for folder, expected in ((tmp_path, str(tmp_path)), (tmp_path / "run", "./output")):
        state = {"model": {"weight": torch.zeros(1)}, "config": f"OUTPUT_DIR: '{folder}'"}
        torch.save(state, tmp_path / "model.pth")
        cfg = config_of_checkpoint(str(tmp_path / "model.pth"))
        assert str(cfg.OUTPUT_DIR) == expected


@pytest.mark.parametrize("is_beside", [False, True])
def test_checkpoint_runs_no_modules(detector_cfg, is_beside, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hostile_module.py").write_text("raise RuntimeError('was run')")
    detector_cfg.IMPORTS = ["hostile_module"]
    state = {"model": build_model(detector_cfg).state_dict()}
    if is_beside:
        (tmp_path / "config.yaml").write_text(detector_cfg.dump())
    else:
        state["config"] = detector_cfg.dump()
    torch.save(state, "hostile.pth")
    assert Predictor("hostile.pth").cfg.IMPORTS == []
    assert "asks to run the modules 'hostile_module'" in caplog.text
    (tmp_path / "trusted.yaml").write_text(detector_cfg.dump())
    with pytest.raises(RuntimeError, match="was run"):
        Predictor("hostile.pth", config_file="trusted.yaml")


_BOMB = "".join(
    f"x{n}: &x{n} [{', '.join([f'*x{n - 1}' if n else '1'] * 10)}]\n" for n in range(10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("SEED: [1", "is not valid YAML", id="no-yaml"),
        pytest.param("SEED: !!python/object/apply:os.getpid []", "configs run no code", id="tag"),
        pytest.param("1: 2", "must be a string", id="number-as-key"),
        pytest.param("[" * 5000, "nested more than", id="deep"),
        pytest.param(f"{_BOMB}MODEL: {{CUSTOM: {{A: *x9}}}}", "through aliases", id="bomb"),
        pytest.param("MODEL: 5", "MODEL is a group of keys", id="no-group"),
        pytest.param("NOPE: 5", "unknown config key NOPE", id="unknown-key"),
    ],
)
def test_config_in_a_checkpoint_is_read_as_that_of_a_file(tmp_path, text, message):
    torch.save({"model": {"weight": torch.zeros(1)}, "config": text}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=rf"bad\.pth.*{message}"):
        config_of_checkpoint(str(tmp_path / "bad.pth"))


def test_config_beside_the_weights_or_named_is_taken(detector_cfg, tmp_path):
    torch.save(build_model(detector_cfg).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"bare\.pth holds no config, and there is no .*config\."):
        Predictor(tmp_path / "bare.pth")
    (tmp_path / "named.yaml").write_text(detector_cfg.dump())
    named = Predictor(tmp_path / "bare.pth", config_file=str(tmp_path / "named.yaml"))
    (tmp_path / "config.yaml").write_text(detector_cfg.dump())
    beside = Predictor(tmp_path / "bare.pth")
    (image,) = _pictures(1)
    assert torch.equal(_found(named(image, input="rgb")), _found(beside(image, input="rgb")))
    with pytest.raises(MissingFileError, match="no checkpoint at"):
        Predictor(tmp_path / "none.pth")


def test_every_kind_of_input_gives_the_same(detector_cfg, tmp_path):
    predictor = Predictor(detector_cfg)
    rgb = _pictures(1)[0]
    picture = Image.fromarray(rgb)
    (tmp_path / "photos").mkdir()
    file = tmp_path / "photos" / "a.png"
    picture.save(file)
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    given = {
        "path": predictor(file),
        "text": predictor(str(file)),
        "bytes": predictor(file.read_bytes()),
        "pil": predictor(picture),
        "rgb": predictor(rgb, input="rgb"),
        "bgr": predictor(np.ascontiguousarray(rgb[:, :, ::-1]), input="bgr"),
        "tensor": predictor(tensor, input="rgb"),
        "tensor of bgr": predictor(tensor.flip(0), input="bgr"),
        "list": predictor([file])[0],
        "iterator": next(predictor(iter([rgb]), input="rgb")),
        "folder": next(predictor(tmp_path / "photos")),
        "pattern": next(predictor(f"{tmp_path}/photos/*.png")),
    }
    expected = DefaultPredictor(detector_cfg)(rgb[:, :, ::-1])
    assert len(expected["instances"]) == 5
    for kind, prediction in given.items():
        assert torch.equal(_found(prediction), _found(expected)), kind
        assert np.array_equal(prediction.image, rgb), kind
    assert given["path"].source == given["folder"].source == str(file)
    buffer = io.BytesIO()
    picture.transpose(Image.Transpose.ROTATE_90).save(buffer, "PNG", exif=_turned_exif())
    assert torch.equal(_found(predictor(Image.open(buffer))), _found(expected))


def _turned_exif():
    exif = Image.Exif()
    exif[0x0112] = 6  # turned clockwise when shown
    return exif


def test_batches_equal_one_by_one_in_order(detector_cfg):
    predictor, images = Predictor(detector_cfg), _pictures(11)
    sizes = []
    model = predictor.model
    model.register_forward_pre_hook(lambda _, batch: sizes.append(len(batch[0])))
    one_by_one = list(predictor.stream(images, input="rgb"))
    assert sizes == [1] * 11
    sizes.clear()
    batched = list(predictor.stream(images, input="rgb", batch_size=4, workers=3))
    # Of the first 8, 5 are padded to 64 x 96 and 3 to 96 x 64; of the other 3, 2 and 1.
    assert sizes == [4, 1, 3, 2, 1]
    assert [p.source for p in batched] == [f"image {i}" for i in range(11)]
    for one, other, image in zip(one_by_one, batched, images, strict=True):
        assert np.array_equal(other.image, image)
        torch.testing.assert_close(_found(other), _found(one), atol=1e-4, rtol=0)


def test_eight_threads_share_a_predictor(detector_cfg):
    predictor, images = Predictor(detector_cfg), _pictures(8)
    expected = [_found(predictor(image, input="rgb")) for image in images]
    fresh = Predictor(detector_cfg)  # nothing prepared: the first passes run at once
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: _found(fresh(image, input="rgb")), images))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_stream_is_lazy_and_reads_little_ahead(detector_cfg):
    taken = []

    def images():
        for i, image in enumerate(_pictures(40)):
            taken.append(i)
            yield image

    stream = Predictor(detector_cfg).stream(images(), input="rgb", workers=2)
    assert not taken
    next(stream)
    assert len(taken) <= 4
    stream.close()


def test_video_gives_its_frames(detector_cfg, tmp_path):
    pytest.importorskip("av", reason="PyAV is not installed")
    frames = _pictures(1) * 3
    with VideoWriter(tmp_path / "v.mp4", Fraction(5)) as writer:
        for frame in frames:
            writer.write(frame)
    found = list(Predictor(detector_cfg)(str(tmp_path / "v.mp4")))
    assert [(p.frame, p.seconds) for p in found] == [(0, 0.0), (1, 0.2), (2, 0.4)]
    assert [p.image.shape for p in found] == [(60, 80, 3)] * 3
    assert Video(str(tmp_path / "v.mp4")).num_frames == 3
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"bad\.mp4 cannot be read as a video"):
        list(Predictor(detector_cfg)(str(tmp_path / "bad.mp4")))


def test_image_that_cannot_be_read_ends_the_stream_or_is_told(detector_cfg, tmp_path):
    (tmp_path / "bad.jpg").write_text("no picture")
    inputs = [_pictures(1)[0], str(tmp_path / "bad.jpg"), *_pictures(2)]
    predictor, failed = Predictor(detector_cfg), []
    found = list(
        predictor.stream(
            inputs, input="rgb", batch_size=2, on_error=lambda s, e: failed.append((s.name, e))
        )
    )
    assert len(found) == 3
    assert failed[0][0].endswith("bad.jpg")
    with pytest.raises(DataError, match="is not an image that can be read"):
        list(predictor.stream(inputs, input="rgb"))


@pytest.fixture(scope="module")
def any_predictor(weights):
    return Predictor(weights)


@pytest.mark.parametrize(
    ("bad", "order", "error", "message"),
    [
        pytest.param(
            np.zeros((4, 4, 3), np.uint8), None, ValueError, "give input='bgr'", id="no order"
        ),
        pytest.param(
            np.zeros((4, 4, 3), np.uint8), "grb", ValueError, "must be 'bgr' or 'rgb'", id="order"
        ),
        pytest.param(np.zeros((4, 4), np.uint8), "rgb", ValueError, r"\(H, W, 3\)", id="grey"),
        pytest.param(torch.zeros(3, 4, 4), "rgb", TypeError, "uint8", id="float tensor"),
        pytest.param(3.5, None, TypeError, "got a float", id="number"),
        pytest.param(
            "nowhere.jpg", None, MissingFileError, "nowhere.jpg does not exist", id="file"
        ),
        pytest.param("no/*.jpg", None, MissingFileError, "no such file", id="pattern"),
        pytest.param(b"xx", None, DataError, "not an image", id="bytes"),
    ],
)
def test_what_is_no_image_is_named(any_predictor, bad, order, error, message):
    with pytest.raises(error, match=message):
        next(any_predictor.stream(bad, input=order))
