import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.cli import main
from detkit.cli.exported_stream import ExportedStream
from detkit.export.runtime.model_file import read_metadata
from detkit.utils.media_file import Video, VideoFrame
from tests.export.runtime.fakes import metadata, outputs_of

_ALL = ["boxes", "scores", "classes", "num_detections", "masks", "sem_seg"]
_PANOPTIC = {"overlap_threshold": 0.5, "stuff_area_limit": 1, "instances_score_threshold": 0.5}
_EVERYTHING = {"outputs": _ALL, "panoptic": _PANOPTIC, "stuff_classes": ["things", "sea", "sky"]}

_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it raises an ImportError
import detkit.export.runtime.predictor as predictor
from detkit.cli import main
from detkit.export.runtime.model_file import read_metadata
from tests.export.runtime.fakes import outputs_of

run = lambda arrays: outputs_of(arrays["images"], arrays["image_sizes"])
predictor.open_model = lambda path, threads: (read_metadata(sys.argv[1], path), run)
sys.exit(main(["predict", "--model", "m.onnx", *sys.argv[2:]]))
"""


@pytest.fixture
def fake(monkeypatch):
    """Puts the model that `fakes` describes in the place of every file."""

    def set_model(**changes):
        read = read_metadata(json.dumps(metadata(**changes)), "m.onnx")
        given = []

        def run(arrays):
            given.append(arrays["images"])
            return outputs_of(arrays["images"], arrays["image_sizes"])

        monkeypatch.setattr(
            "detkit.export.runtime.predictor.open_model", lambda path, threads: (read, run)
        )
        return given

    return set_model


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("a.jpg", (40, 20)), ("b.png", (40, 30))):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "in" / name)
    return tmp_path / "in"


def _predict(photos, *words):
    out = photos.parent / "out"
    status = main(
        ["predict", "--model", "m.onnx", "--input", str(photos), "--output", str(out), *words]
    )
    results = out / "predictions.json"
    return status, json.loads(results.read_text()) if results.exists() else None


def test_exported_model_predicts_where_torch_cannot_be_imported(photos):
    document = json.dumps(metadata(**_EVERYTHING))
    words = [
        "--input",
        str(photos),
        "--output",
        str(photos.parent / "out"),
        "--save",
        "pictures",
        "coco",
    ]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, document, *words],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads((photos.parent / "out/predictions.json").read_text())
    assert second["height"] == 30
    (found,) = first["instances"]  # the other one has a score below 0.5
    assert (found["category"], found["score"], found["bbox"]) == ("dog", 0.9, [10, 2.5, 20, 7.5])
    assert found["segmentation"]["size"] == [20, 40]
    assert [s["category"] for s in first["segments"]] == ["dog", "sky"]  # red is the last of BGR
    labels = np.asarray(Image.open(photos.parent / "out" / first["sem_seg"]))
    assert (labels == 2).all()
    assert Image.open(photos.parent / "out/a.jpg").size == (640, 320)
    assert len(json.loads((photos.parent / "out/coco.json").read_text())["annotations"]) == 2


def test_images_run_in_batches_and_unreadable_ones_are_named(fake, photos, capsys):
    given = fake()
    (photos / "c.jpg").write_bytes(b"no image")
    words = ["--batch-size", "2", "--save", "coco", "--confidence-threshold", "0.2"]
    status, results = _predict(photos, *words)
    assert status == 2
    assert "1 of 3 inputs could not be read" in capsys.readouterr().err
    assert [len(entry["instances"]) for entry in results] == [2, 2]
    assert [images.shape for images in given] == [(2, 3, 30, 40)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["SEED", "1"], "has its settings in the file: SEED has no effect", id="setting"),
        pytest.param(["--config-file", "x"], "--config-file has no effect", id="config"),
        pytest.param(["--confidence-threshold", "2"], "between 0 and 1, got 2.0", id="threshold"),
        pytest.param(["--classes", "horse"], "the model has no class 'horse'", id="class"),
    ],
)  # fmt: skip
def test_what_an_exported_model_does_not_take_is_refused(fake, photos, capsys, words, message):
    fake()
    status, _ = _predict(photos, *words)
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "eval"])
def test_file_that_torch_runs_is_not_taken_for_a_checkpoint(photos, tmp_path, capsys, command):
    words = {"predict": ["--input", str(photos), "--output", str(tmp_path / "found")], "eval": []}
    assert main([command, "--model", str(tmp_path / "model.pt2"), *words[command]]) == 2
    assert "model.pt2: torch runs that, see docs/deploy.md" in capsys.readouterr().err


def test_exported_model_is_not_shared_out(fake, photos, monkeypatch, capsys):
    fake()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _predict(photos)[0] == 2
    assert "runs in one process" in capsys.readouterr().err


def test_proposals_alone_are_refused(fake, photos, capsys):
    fake(outputs=["boxes", "scores", "num_detections"])
    assert _predict(photos)[0] == 2
    assert "need a model that finds instances" in capsys.readouterr().err


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_frames_of_a_video_reach_the_model_in_its_order(fake, order):
    class TwoFrames(Video):
        def __init__(self):
            self.name = "v.mp4"

        def __iter__(self):
            for i in range(2):
                yield VideoFrame(i, i / 25, np.full((20, 40, 3), (9, 5, i), np.uint8))

    given = fake(input={"format": order, "channels": 3, "dtype": "uint8"})
    stream = ExportedStream("m.onnx", score_threshold=0.5, show_labels=True)
    found = list(stream.stream(TwoFrames()))
    assert [(f.source, f.frame, f.seconds) for f in found] == [("v.mp4", 0, 0), ("v.mp4", 1, 0.04)]
    expected = [9, 5, 1] if order == "RGB" else [1, 5, 9]
    assert given[1][0, :, 0, 0].tolist() == expected
    assert found[1].image[0, 0].tolist() == [9, 5, 1]
    assert found[0].image_size == (20, 40)
