import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from detkit.cli import export, main
from detkit.export.formats import require
from detkit.export.quantize import calibration_images

_CONFIG = ["--config-file", "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"]


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Stand-ins for what takes minutes: the model, its files and their scores; what int8 was given."""
    given = []
    scores = {
        "model.onnx": 50.0,
        "model.xml": 50.01,
        "model_bf16.xml": 48.5,
        "model_int8.onnx": 49.5,
        "model_int8.xml": 49.0,
    }

    def write(model, metadata, cfg, formats, folder, **_) -> list[Path]:
        names = {"onnx": "model.onnx", "openvino": "model.xml", "torch_export": "model.pt2"}
        (tmp_path / "model.onnx").write_bytes(b"x" * 2_000_000)
        (tmp_path / "model.bin").write_bytes(b"x" * 1_000_000)
        (tmp_path / "model.xml").touch()
        return [tmp_path / names[name] for name in formats]

    def write_copies(path, option, formats, images) -> list[Path]:
        given.append((path, option, formats, list(images)))
        (tmp_path / f"model_{option}.bin").write_bytes(b"x" * 500_000)
        endings = {"onnx": ".onnx", "openvino": ".xml"}
        files = [tmp_path / f"model_{option}{endings[name]}" for name in formats]
        for file in files:
            file.touch()
        return files

    def evaluate(path, cfg):
        assert Path(cfg.OUTPUT_DIR) == tmp_path / "eval"
        return {"a_val": {"bbox": {"AP": scores[path.name], "AP50": 0}}}

    monkeypatch.setattr(
        export, "DefaultPredictor", lambda cfg: SimpleNamespace(model=None, metadata=None, cfg=cfg)
    )
    monkeypatch.setattr(export, "export_model", write)
    monkeypatch.setattr(export, "write_copies", write_copies)
    for module in ("detkit.export.model", "detkit.cli.export"):
        monkeypatch.setattr(f"{module}.require", lambda package, extra: None)
    monkeypatch.setattr(export, "calibration_images", lambda cfg, name: [name])
    monkeypatch.setattr(export, "ExportedPredictor", lambda path: path)
    monkeypatch.setattr(export, "evaluate_exported", evaluate)
    monkeypatch.setattr(
        export.DefaultTrainer, "test", lambda cfg, model: {"bbox": {"AP": 50.04, "AP50": 0}}
    )
    return given


def _export(tmp_path, *words):
    return main(["export", *_CONFIG, "--output", str(tmp_path), *words])


def test_scores_of_the_files_stand_beside_those_of_the_model(parts, tmp_path, capsys):
    formats = ["--format", "openvino", "--format", "onnx", "--format", "torch_export"]
    assert _export(tmp_path, *formats, "--int8", "--calibrate", "a_train", "--bf16") == 0
    assert parts == [
        (tmp_path / "model.onnx", "int8", ["openvino", "onnx"], ["a_train"]),
        (tmp_path / "model.onnx", "bf16", ["openvino"], []),
    ]
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert rows[0] == ["file", "MB", "bbox AP"]
    assert rows[2:] == [
        ["eager", "", "50.04"],
        ["model.xml", "1.00", "50.01"],
        ["model.onnx", "2.00", "50.00"],
        ["model_int8.xml", "0.50", "49.00"],
        ["model_int8.onnx", "0.00", "49.50"],
        ["model_bf16.xml", "0.50", "48.50"],
    ]


def test_nothing_is_evaluated_unless_asked_for(parts, tmp_path, capsys):
    assert _export(tmp_path) == 0
    assert "|" not in capsys.readouterr().out
    assert parts == []
    assert _export(tmp_path, "--eval") == 0
    assert "| model.onnx | 2.00 |     50.00 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--int8"], "--calibrate DATASET need each other", id="without images"),
        pytest.param(["--calibrate", "x"], "--calibrate DATASET need each other", id="for nothing"),
        pytest.param(
            ["--int8", "--calibrate", "x", "--format", "openvino"], "add --format onnx", id="no onnx"
        ),
        pytest.param(
            ["--bf16"],
            "--bf16: onnx cannot do that; there is --int8 of onnx and openvino, --fp16 of onnx and"
            " openvino, --bf16 of openvino",
            id="not in this format",
        ),
        pytest.param(["--fp16", "--format", "torch_export"], "--fp16: torch_export", id="torch"),
    ],
)  # fmt: skip
def test_options_of_copies_are_checked_before_the_model_is_built(
    parts, tmp_path, capsys, words, message
):
    assert _export(tmp_path, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


def test_missing_package_is_named_before_the_model_is_built(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace())
    assert _export(tmp_path / "out") == 2
    message = "the export needs onnxscript, which is not installed: pip install"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_set_of_int8_is_looked_up_before_the_export(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "calibration_images", calibration_images)
    assert _export(tmp_path, "--int8", "--calibrate", "shapes_vall") == 2
    assert "shapes_vall" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()


def test_package_that_scores_is_asked_for_before_the_export(parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "require", require)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert _export(tmp_path, "--fp16") == 2
    assert "needs onnxruntime, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "model.onnx").exists()
