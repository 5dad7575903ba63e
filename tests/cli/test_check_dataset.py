"""The command: its exit status, its reports and its cleaned copy."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from detkit.cli import main

pytestmark = pytest.mark.usefixtures("catalogs_as_before")


def write_config(folder: Path, box: Sequence[float], file_name: str = "a.jpg") -> str:
    """Write a training set of one image with one object, and its config."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 48), 0).save(folder / "a.jpg")
    image = {"id": 1, "file_name": file_name, "height": 48, "width": 64}
    annotation = {"id": 5, "image_id": 1, "category_id": 1, "bbox": list(box)}
    categories = [{"id": 1, "name": "square"}]
    content = {"images": [image], "annotations": [annotation], "categories": categories}
    (folder / "a.json").write_text(json.dumps(content))
    declared = {"name": "squares", "format": "coco", "images": ".", "annotations": "a.json"}
    settings: dict[str, Any] = {
        "_BASE_": "detkit://quick_start/faster_rcnn_R_18_FPN_shapes.yaml",
        "DATASETS": {"REGISTER": [declared], "TRAIN": ["squares"], "TEST": []},
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 1}, "WEIGHTS": ""},
        "INPUT": {"MIN_SIZE_TEST": 48},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "config.yaml")


GOOD, FLAT, NOT_FINITE = [10, 8, 30, 30], [10, 8, 0, 30], [10, 8, float("nan"), 30]


@pytest.mark.parametrize(
    ("box", "options", "status"),
    [
        pytest.param(GOOD, ["--strict"], 0, id="nothing"),
        pytest.param(FLAT, [], 0, id="a warning"),
        pytest.param(FLAT, ["--strict"], 1, id="a warning, strict"),
        pytest.param(NOT_FINITE, [], 1, id="an error"),
    ],
)
def test_exit_status(box: Sequence[float], options: list[str], status: int, tmp_path: Path) -> None:
    config = write_config(tmp_path, box)
    words = ["check-dataset", "--config-file", config, "--workers", "0", *options]
    assert main(words) == status


def test_findings_are_printed_and_written(tmp_path: Path, capsys: Any) -> None:
    config, report = write_config(tmp_path, FLAT), tmp_path / "deep" / "report.json"
    page = tmp_path / "page.html"
    files = ["--json", str(report), "--html", str(page)]
    assert main(["check-dataset", "--config-file", config, *files, "--workers", "2"]) == 0
    printed = capsys.readouterr().out
    assert "squares: 1 image, 1 annotation" in printed
    assert "[box-without-area] in squares" in printed
    assert f"{tmp_path}/a.jpg: annotation 5" in printed
    assert "0 errors, 1 warning, 0 notes" in printed
    assert "Data of config.yaml" in page.read_text()
    content = json.loads(report.read_text())
    assert content["counts"] == {"error": 0, "warning": 1, "note": 0}
    assert content["datasets"]["squares"]["objects_per_class"] == {"square": 1}
    (finding,) = content["findings"]
    assert (finding["code"], finding["count"]) == ("box-without-area", 1)
    example = {"file": f"{tmp_path}/a.jpg", "annotation": 5, "detail": "", "box": [10, 8, 10, 38]}
    example |= {"other": ""}
    assert finding["examples"] == [example]


def test_cleaned_copy_is_written_and_declared(tmp_path: Path, capsys: Any) -> None:
    config, output = write_config(tmp_path, [50, 10, 20, 20]), tmp_path / "clean"
    assert main(["check-dataset", "--config-file", config, "--fix", str(output)]) == 0
    settings = yaml.safe_load(capsys.readouterr().out.partition("DATASETS:")[2])
    assert settings["TRAIN"] == ["squares_clean"]
    (entry,) = settings["REGISTER"]
    (annotation,) = json.loads(Path(entry["annotations"]).read_text())["annotations"]
    assert annotation["bbox"] == [50, 10, 14, 20]
    (change,) = json.loads((output / "changes.json").read_text())
    assert (change["code"], change["annotation"]) == ("box-sticks-out", 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--workers", "-1"], "--workers must be at least 0", id="workers"),
        pytest.param(["--json", "."], ". is a folder", id="report a folder"),
        pytest.param(
            ["--json", "a.jpg/b.json"],
            "a.jpg is a file, and a folder is needed",
            id="report below a file",
        ),
        pytest.param(["--fix", "a.jpg/b"], "a.jpg/b: Not a directory", id="copy below a file"),
        pytest.param(["MODEL.WEIGHTS", "lost.pth"], "no checkpoint at lost.pth", id="weights"),
        pytest.param(["--fix", "."], "exists and is not empty", id="full folder"),
        pytest.param(["DATASETS.TRAIN", "[]"], "there is nothing to check", id="no data"),
        pytest.param(["DATASETS.TRAIN", "['squers']"], "'squers' is not registered", id="name"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    config = write_config(tmp_path, GOOD)
    monkeypatch.chdir(tmp_path)
    assert main(["check-dataset", "--config-file", config, *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out  # before the data are looked at


def test_report_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    config, report = write_config(tmp_path, GOOD), str(tmp_path / "report.html")
    # The rights of files do not bind root.
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    assert main(["check-dataset", "--config-file", config, "--html", report]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {report} cannot be written: no permission\n"
    assert not printed.out


def test_nothing_is_left_of_a_copy_that_is_interrupted(tmp_path: Path, monkeypatch: Any) -> None:
    config, output = write_config(tmp_path, GOOD), tmp_path / "clean"

    def interrupted(source: str, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfile", interrupted)
    assert main(["check-dataset", "--config-file", config, "--fix", str(output)]) == 130
    assert not any(output.iterdir())


def test_classes_are_compared_with_those_of_the_weights(tmp_path: Path, capsys: Any) -> None:
    config, weights = write_config(tmp_path, GOOD), str(tmp_path / "model.pth")
    torch.save({"model": {"w": torch.zeros(1)}, "metadata": {"thing_classes": ["circle"]}}, weights)
    assert main(["check-dataset", "--config-file", config, "MODEL.WEIGHTS", weights]) == 0
    printed = capsys.readouterr().out
    assert "[checkpoint-classes] in squares" in printed
    assert "checkpoint: circle; squares: square" in printed
