import json
import os
import signal
import sys
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detkit.cli.parsers import PARSERS
from detkit.cli.predict import (
    _picture_names,
    _setup,
    describe_output,
    main,
    write_maps,
)
from detkit.cli.prediction_files import PredictionLog
from detkit.config import declare_architecture, get_cfg
from detkit.data import Metadata
from detkit.data.transforms.build import build_test_resize
from detkit.engine import Predictor
from detkit.layers import PreparedWeights
from detkit.model_zoo import get_checkpoint_url
from detkit.modeling import build_model
from detkit.structures import Boxes, Instances, RotatedBoxes, rle_to_bitmask
from detkit.utils.colormap import rgb2id
from detkit.utils.media_file import Video, VideoWriter
from tests.processes import end_of, fork, together


def test_equal_names_from_different_folders_are_numbered() -> None:
    paths = ["a/x.jpg", "b/x.jpg", "c/x.tif", "c/x_2.jpg", "d/X.png"]
    names = _picture_names(paths)
    assert names == ["x.jpg", "x_2.jpg", "x_3.jpg", "x_2_2.jpg", "X.png"]
    assert _picture_names(["001.jpg", "001.png"]) == ["001.jpg", "001.png"]
    assert _picture_names(["a.jpg", "b/A.JPG"]) == ["a.jpg", "A_2.JPG"]
    assert len(set(names)) == len(paths)


class Segmentor(nn.Module):
    """Left half class 1, right half class 0, whatever the image."""

    def forward(self, batch):
        scores = torch.zeros(2, batch[0]["height"], batch[0]["width"])
        scores[1, :, : batch[0]["width"] // 2] = 1.0
        return [{"sem_seg": scores}]


class Proposer(nn.Module):
    def forward(self, batch):
        return [{"proposals": Instances((1, 1))}]


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command on one picture with a model in place of the one that the config names."""
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg")
    (tmp_path / "c.yaml").write_text("SEED: 1\n")

    def run(model: nn.Module, output: str = "out") -> int:
        class Fake(Predictor):
            def __init__(self, cfg, allow_partial):
                self.cfg, self.model, self.aug = cfg, model, build_test_resize(cfg)
                self.metadata = Metadata("x").set(stuff_classes=["sky", "sea"])
                self.input_format, self._num_channels = "BGR", 3
                self._precision, self._prepared_weights = nullcontext, PreparedWeights()

        monkeypatch.setattr("detkit.engine.Predictor", Fake)
        words = ["--config-file", str(tmp_path / "c.yaml"), "--input", str(tmp_path / "a.jpg")]
        return main([*words, "--output", str(tmp_path / output)])

    return run


def test_classes_of_pixels_are_drawn_and_written(predict, tmp_path: Path) -> None:
    assert predict(Segmentor()) == 0
    (entry,) = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert entry == {
        "file": str(tmp_path / "a.jpg"),
        "picture": "a.jpg",
        "height": 30,
        "width": 40,
        "sem_seg": "sem_seg/a.jpg.png",
    }
    labels = np.asarray(Image.open(tmp_path / "out" / entry["sem_seg"]))
    assert labels.tolist() == [[1] * 20 + [0] * 20] * 30
    assert np.asarray(Image.open(tmp_path / "out" / "a.jpg")).max() > 50


@pytest.mark.parametrize("output", [".", "link"])
def test_folder_of_the_inputs_is_refused_for_the_output(
    predict, tmp_path: Path, capsys, output: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    original = (tmp_path / "a.jpg").read_bytes()
    assert predict(Segmentor(), output) == 2
    assert "is the folder of the inputs" in capsys.readouterr().err
    assert (tmp_path / "a.jpg").read_bytes() == original


def test_pictures_that_no_prediction_wrote_are_not_overwritten(
    predict, tmp_path: Path, capsys
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jpg").write_bytes(b"mine")
    assert predict(Segmentor()) == 2
    expected = "already holds 1 name that would be written, such as a.jpg, and no"
    assert expected in capsys.readouterr().err
    assert (tmp_path / "out/a.jpg").read_bytes() == b"mine"
    (tmp_path / "out/a.jpg").unlink()
    for _ in range(2):  # the second one overwrites the pictures of the first
        assert predict(Segmentor()) == 0


def test_interrupted_prediction_may_be_repeated(predict, tmp_path: Path, capsys) -> None:
    class Interrupted(Segmentor):
        def forward(self, batch):
            raise KeyboardInterrupt

    assert predict(Interrupted()) == 130
    (tmp_path / "out/a.jpg").touch()
    assert predict(Segmentor()) == 0


def test_model_that_only_proposes_is_refused(predict, capsys) -> None:
    assert predict(Proposer()) == 2
    assert (
        "need a model that finds instances or classifies pixels; the one of this config gives proposals"
        in (capsys.readouterr().err)
    )


def test_threshold_goes_to_the_keys_that_the_model_declares(tmp_path: Path) -> None:
    @declare_architecture(score_thresholds=["MODEL.CUSTOM.THRESH"])
    class DeclaredForPredict: ...

    config = tmp_path / "a.yaml"
    config.write_text("MODEL: {META_ARCHITECTURE: DeclaredForPredict, CUSTOM: {THRESH: 0.1}}\n")
    words = ["--config-file", str(config), "--input", "x", "--output", "y"]
    cfg = _setup(PARSERS["predict"](None).parse_args([*words, "--confidence-threshold", "0.7"]))
    assert cfg.MODEL.CUSTOM.THRESH == 0.7
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.05
    cfg = _setup(PARSERS["predict"](None).parse_args([*words, "MODEL.CUSTOM.THRESH", "0.3"]))
    assert cfg.MODEL.CUSTOM.THRESH == 0.3  # the user's own wins


def test_labels_are_hidden_by_option_and_key() -> None:
    words = ["--config-file", "Base-RetinaNet.yaml", "--input", "x", "--output", "y"]
    assert _setup(PARSERS["predict"](None).parse_args(words)).VIS_LABELS
    assert not _setup(PARSERS["predict"](None).parse_args([*words, "--hide-labels"])).VIS_LABELS
    assert not _setup(
        PARSERS["predict"](None).parse_args([*words, "VIS_LABELS", "False"])
    ).VIS_LABELS


def test_nothing_is_said_of_others_where_no_input_could_be_read(predict, tmp_path, capsys) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    assert predict(Segmentor()) == 2
    assert "1 of 1 input could not be read: " in (error := capsys.readouterr().err)
    assert "The results of" not in error


METADATA = SimpleNamespace(thing_classes=["cat", "dog"], stuff_classes=["things", "sky"])


def instances(**fields):
    return Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[10.0, 5, 30, 25.5], [0, 0, 60, 40]])),
        scores=torch.tensor([0.98765432, 0.5]),
        pred_classes=torch.tensor([1, 7]),
        **fields,
    )


def test_entry_holds_names_scores_and_boxes_as_coco_has_them() -> None:
    assert describe_output({"instances": instances()}, METADATA) == {
        "instances": [
            {"category": "dog", "category_id": 1, "score": 0.9877, "bbox": [10, 5, 20, 20.5]},
            {"category": "7", "category_id": 7, "score": 0.5, "bbox": [0, 0, 60, 40]},
        ]
    }


def test_rotated_boxes_have_five_numbers() -> None:
    found = instances()
    found.pred_boxes = RotatedBoxes([[10, 5, 20, 8, 30.126], [0, 0, 60, 40, -90]])
    described = describe_output({"instances": found}, METADATA)["instances"]
    assert [x["bbox"] for x in described] == [[10, 5, 20, 8, 30.13], [0, 0, 60, 40, -90]]


def test_masks_come_back_from_their_run_lengths() -> None:
    masks = torch.rand(2, 40, 60) > 0.5
    described = describe_output({"instances": instances(pred_masks=masks)}, METADATA)
    found = json.loads(json.dumps(described))["instances"]
    for entry, mask in zip(found, masks.numpy(), strict=True):
        assert np.array_equal(rle_to_bitmask(entry["segmentation"]), mask)


def test_keypoints_are_a_flat_list() -> None:
    keypoints = torch.tensor([[[1.0, 2, 0.5], [3, 4, 0.25]], [[5, 6, 1], [7, 8, 0]]])
    found = describe_output({"instances": instances(pred_keypoints=keypoints)}, METADATA)[
        "instances"
    ]
    assert [entry["keypoints"] for entry in found] == [[1, 2, 0.5, 3, 4, 0.25], [5, 6, 1, 7, 8, 0]]


def test_nothing_found_is_an_empty_list() -> None:
    nothing = instances(pred_masks=torch.zeros(2, 40, 60), pred_keypoints=torch.zeros(2, 3, 3))[:0]
    assert describe_output({"instances": nothing}, METADATA) == {"instances": []}


SEGMENTS = [
    {"id": 1, "isthing": True, "score": 0.912345, "category_id": 1, "instance_id": 0},
    {"id": 300, "isthing": False, "category_id": 1, "area": 12},
]


def test_segments_are_named_as_things_or_stuff() -> None:
    described = describe_output({"panoptic_seg": (torch.zeros(4, 6).int(), SEGMENTS)}, METADATA)
    assert described["segments"] == [
        {
            "category": "dog",
            "id": 1,
            "isthing": True,
            "score": 0.9123,
            "category_id": 1,
            "instance_id": 0,
        },
        {"category": "sky", "id": 300, "isthing": False, "category_id": 1, "area": 12},
    ]


def test_segment_ids_come_back_from_their_colours(tmp_path) -> None:
    ids = torch.tensor([[0, 1], [300, 70000]], dtype=torch.int32)
    files = write_maps({"panoptic_seg": (ids, SEGMENTS)}, tmp_path, "a.jpg")
    assert files == {"panoptic": "panoptic/a.jpg.png"}
    assert rgb2id(np.asarray(Image.open(tmp_path / files["panoptic"]))).tolist() == ids.tolist()


@pytest.mark.parametrize("num_classes", [3, 300])
def test_classes_of_pixels_come_back_however_many(tmp_path, num_classes: int) -> None:
    labels = torch.tensor([[0, 1], [num_classes - 1, 2]])
    scores = torch.nn.functional.one_hot(labels, num_classes).permute(2, 0, 1)
    files = write_maps({"sem_seg": scores}, tmp_path, "a.jpg")
    assert np.asarray(Image.open(tmp_path / files["sem_seg"])).tolist() == labels.tolist()


def test_instances_alone_write_no_map(tmp_path) -> None:
    assert write_maps({"instances": instances()}, tmp_path, "a.jpg") == {}
    assert list(tmp_path.iterdir()) == []


def _weights(config_file: str, *opts: str) -> str:
    argv = ["--config-file", config_file, "--input", "a.jpg", "--output", "out", *opts]
    return _setup(PARSERS["predict"](None).parse_args(argv)).MODEL.WEIGHTS


def test_packaged_config_predicts_with_its_published_weights(tmp_path: Path) -> None:
    name = "COCO-Detection/faster_rcnn_R_50_FPN_3x"
    assert _weights("faster_rcnn_R_50_FPN_3x") == get_checkpoint_url(name)
    assert _weights(name, "MODEL.WEIGHTS", "mine.pth") == "mine.pth"
    assert _weights(name, "MODEL.WEIGHTS", "") == ""
    (tmp_path / "own.yaml").write_text(f"_BASE_: detkit://{name}.yaml\n")
    assert "R-50.pkl" in _weights(str(tmp_path / "own.yaml"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> str:
    """A checkpoint of a Faster R-CNN of random weights, which finds six objects everywhere."""
    cfg = get_cfg()
    cfg.merge_from_file("detkit://quick_start/faster_rcnn_R_18_FPN_shapes.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.TEST.DETECTIONS_PER_IMAGE = 6
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 96
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [], (), ()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("detector") / "model.pth"
    metadata = {"thing_classes": [f"class {k}" for k in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]}
    weights = build_model(cfg).state_dict()
    scores = weights["roi_heads.box_predictor.cls_score.weight"]
    for k in range(1, len(scores) - 1):  # all classes are found everywhere
        scores[k] = scores[0] * (1 + k / 1000)
    torch.save({"model": weights, "config": cfg.dump(), "metadata": metadata}, path)
    return str(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures of two shapes."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(7):
        size = (60, 80, 3) if i % 3 else (80, 60, 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(
            tmp_path / f"photos/{i}.png"
        )
    return tmp_path


def _predict(detector: str, folder: Path, output: str, *options: str) -> int:
    words = [
        "--model",
        detector,
        "--input",
        str(folder / "photos"),
        "--output",
        str(folder / output),
    ]
    return main([*words, "--confidence-threshold", "0.0", *options])


def _results(folder: Path) -> str:
    return (folder / "predictions.json").read_text()


def test_checkpoint_alone_predicts_chosen_classes_of_chosen_images(
    detector: str, pictures: Path
) -> None:
    assert _predict(detector, pictures, "all", "--max-images", "3") == 0
    entries = json.loads(_results(pictures / "all"))
    assert [Path(entry["file"]).name for entry in entries] == ["0.png", "1.png", "2.png"]
    found = {o["category"] for entry in entries for o in entry["instances"]}
    assert len(found) > 1
    chosen = min(found)
    options = ["--max-images", "3", "--classes", chosen, "--save", "csv", "coco"]
    assert _predict(detector, pictures, "some", *options) == 0
    some = json.loads(_results(pictures / "some"))
    for entry, all_of_it in zip(some, entries, strict=True):
        assert entry["instances"] == [o for o in all_of_it["instances"] if o["category"] == chosen]
    names = sorted(path.name for path in (pictures / "some").iterdir())
    assert names == ["coco.json", "predictions.csv", "predictions.json"]


def test_labels_of_a_data_set_are_not_overwritten(
    detector: str, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "labels").mkdir()
    for options in (["--save", "yolo"], ["--save", "csv", "yolo"]):
        assert _predict(detector, pictures, ".", *options) == 2
        assert "such as labels, and no predictions.json" in capsys.readouterr().err
    assert not list((pictures / "labels").iterdir())
    assert _predict(detector, pictures, ".", "--save", "csv") == 0  # another name


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_that_are_not_utf8_are_written(detector: str, pictures: Path) -> None:
    (pictures / "photos/0.png").rename(os.fsdecode(bytes(pictures / "photos") + b"/\xe9.png"))
    every = ["--save", "pictures", "coco", "csv", "yolo", "labelme"]
    assert _predict(detector, pictures, "out", *every) == 0
    assert b"/\xe9.png," in (pictures / "out/predictions.csv").read_bytes()
    files = {os.fsencode(p.name) for p in (pictures / "out").rglob("*")}
    assert {b"\xe9.png", b"\xe9.txt", b"\xe9.json"} <= files


def test_two_processes_write_what_one_writes(detector: str, pictures: Path) -> None:
    options = ["--batch-size", "2", "--save", "pictures", "csv"]
    assert _predict(detector, pictures, "one", *options) == 0
    assert together(_predict, detector, pictures, "two", *options, folder=pictures) == [0, 0]
    one, two = pictures / "one", pictures / "two"
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def _killed(detector: str, folder: Path, output: str, *options: str) -> None:
    """Predict until the fourth entry is written, and half of the next."""
    add = PredictionLog.add

    def kill(self, number, *args):
        if number == 4:
            self._file.write('[4, null, {"file"')
            self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, number, *args)

    PredictionLog.add = kill
    _predict(detector, folder, output, *options)


def test_killed_prediction_goes_on_where_it_was(
    detector: str, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (pictures / "photos/1.png").write_text("no picture")
    options = ["--batch-size", "1", "--save", "coco"]
    assert _predict(detector, pictures, "whole", *options) == 2
    child = fork(_killed, detector, pictures, "killed", *options, output=pictures / "log.txt")
    assert end_of(child) == -signal.SIGKILL
    assert json.loads(_results(pictures / "killed")) == []
    assert (
        _predict(detector, pictures, "killed", "--resume", "--classes", "class 0", "--save", "coco")
        == 2
    )
    assert "had another --classes" in capsys.readouterr().err
    predicted: list[Any] = []
    run = Predictor._run
    monkeypatch.setattr(Predictor, "_run", lambda self, x: predicted.append(x) or run(self, x))
    assert _predict(detector, pictures, "killed", "--resume", *options) == 2
    assert len(predicted) == 3  # of seven, three were predicted, and one cannot be read
    assert "1 of 7 inputs could not be read" in capsys.readouterr().err
    for name in ("predictions.json", "coco.json"):
        assert (pictures / "whole" / name).read_bytes() == (pictures / "killed" / name).read_bytes()
    assert not list((pictures / "killed").glob(".*"))


def test_video_is_predicted_frame_by_frame_and_drawn(detector: str, tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    with VideoWriter(tmp_path / "v.mp4", Fraction(5)) as writer:
        for _ in range(4):
            writer.write(np.full((60, 80, 3), 100, dtype=np.uint8))
    words = [
        "--model",
        detector,
        "--input",
        str(tmp_path / "v.mp4"),
        "--output",
        str(tmp_path / "o"),
    ]
    words += ["--confidence-threshold", "0.0", "--save", "pictures", "yolo", "--max-images", "3"]
    assert main(words) == 0
    entries = json.loads(_results(tmp_path / "o"))
    assert [(e["frame"], e["seconds"], e["picture"]) for e in entries] == [
        (0, 0, "v.mp4"),
        (1, 0.2, "v.mp4"),
        (2, 0.4, "v.mp4"),
    ]
    frames = list(Video(str(tmp_path / "o" / "v.mp4")))
    assert [frame.pixels.shape for frame in frames] == [(60, 80, 3)] * 3
    assert frames[0].pixels.std() > 5
    labels = sorted(path.name for path in (tmp_path / "o/labels").iterdir())
    assert labels == ["v_000000.txt", "v_000001.txt", "v_000002.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--classes", "clas 0"], "no class 'clas 0'. Did you mean 'class 0'", id="class"
        ),
        pytest.param(["--model", "none.pth"], "no checkpoint at none.pth", id="model"),
        pytest.param(["--input", "no.mp4"], "--input no.mp4: no such file", id="video"),
    ],
)
def test_wrong_options_are_named(
    detector: str, pictures: Path, options: list[str], message: str, capsys
) -> None:
    assert _predict(detector, pictures, "out", *options) == 2
    assert message in capsys.readouterr().err


def test_neither_model_nor_config_is_an_error(capsys) -> None:
    assert main(["--input", "x", "--output", "y"]) == 2
    assert (
        "give --model, a checkpoint or an exported model, or --config-file"
        in capsys.readouterr().err
    )


def test_damaged_video_is_named_and_the_others_are_written(
    detector: str, pictures: Path, capsys
) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    (pictures / "bad.mp4").write_bytes(b"no video")
    options = ["--input", str(pictures / "bad.mp4"), str(pictures / "photos/0.png")]
    assert _predict(detector, pictures, "out", *options) == 2
    assert "1 of 2 inputs could not be read" in capsys.readouterr().err
    assert len(json.loads(_results(pictures / "out"))) == 1
