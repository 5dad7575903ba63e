"""What users get wrong, and what they are told: one message, exit status 2, no traceback."""

import json
from pathlib import Path

import pytest
import torch

from detkit.cli import predict, train

Captured = pytest.CaptureFixture[str]


def _error(capsys: Captured) -> str:
    """The message of the last command, which must be all that it said on standard error."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (message,) = [line for line in text.splitlines() if line.startswith("error: ")]
    return message


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        pytest.param(
            ["SOLVER.BASE_LRR", "1"], ["SOLVER.BASE_LRR", "'SOLVER.BASE_LR'"], id="misspelt key"
        ),
        pytest.param(
            ["SOLVER.MAX_ITER", "many"],
            ["SOLVER.MAX_ITER must be an int", "'many'"],
            id="wrong type",
        ),
        pytest.param(["SOLVER.MAX_ITER"], ["pairs KEY VALUE"], id="key without value"),
        pytest.param(
            ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbon"],
            ["BACKBONE", "'build_resnet_fpn_backbone'"],
            id="unknown registered name",
        ),
        pytest.param(
            ["DATASETS.TRAIN", "('shapes_trian',)"],
            ["'shapes_trian'", "'shapes_train'"],
            id="unknown data set",
        ),
        pytest.param(
            ["MODEL.ROI_HEADS.NUM_CLASSES", "3"],
            ["shapes_train", "MODEL.ROI_HEADS.NUM_CLASSES"],
            id="classes",
        ),
        pytest.param(["MODEL.WEIGHTS", "none.pth"], ["none.pth"], id="missing weights"),
        pytest.param(
            ["IMPORTS", "['not_there']"], ["IMPORTS names 'not_there'"], id="missing module"
        ),
        pytest.param(["MODEL.DEVICE", "gpu"], ["MODEL.DEVICE", "'gpu'"], id="unknown device"),
    ],
)
def test_wrong_setting_is_explained(
    settings: list[str], parts: list[str], workplace: Path, capsys: Captured
) -> None:
    assert train.main(["--config-file", "tiny.yaml", *settings]) == 2
    message = _error(capsys)
    assert all(part in message for part in parts), message


def test_missing_config_file_is_named_with_the_packaged_one_that_was_meant(
    workplace: Path, capsys: Captured
) -> None:
    assert train.main(["--config-file", "faster_rcnn_R_18_FPN_shape.yaml"]) == 2
    message = _error(capsys)
    assert "faster_rcnn_R_18_FPN_shape.yaml" in message
    assert "faster_rcnn_R_18_FPN_shapes.yaml" in message


def test_no_config_file_is_asked_for(workplace: Path, capsys: Captured) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["SOLVER.MAX_ITER", "2"])
    assert "--config-file is needed" in capsys.readouterr().err


def test_bases_in_a_circle_are_shown(workplace: Path, capsys: Captured) -> None:
    (workplace / "a.yaml").write_text("_BASE_: b.yaml\n")
    (workplace / "b.yaml").write_text("_BASE_: a.yaml\n")
    assert train.main(["--config-file", "a.yaml"]) == 2
    message = _error(capsys)
    assert "circle" in message
    assert "a.yaml" in message
    assert "b.yaml" in message


def test_misspelt_key_in_a_file_is_named_with_its_line(workplace: Path, capsys: Captured) -> None:
    (workplace / "bad.yaml").write_text("_BASE_: tiny.yaml\nSOLVER:\n  MAX_ITERS: 5\n")
    assert train.main(["--config-file", "bad.yaml"]) == 2
    message = _error(capsys)
    assert "bad.yaml:3" in message
    assert "'SOLVER.MAX_ITER'" in message


def test_weights_of_another_model_are_refused(workplace: Path, capsys: Captured) -> None:
    torch.save({"model": {"encoder.weight": torch.zeros(3)}}, workplace / "other.pth")
    assert train.main(["--config-file", "tiny.yaml", "MODEL.WEIGHTS", "other.pth"]) == 2
    message = _error(capsys)
    assert "other.pth" in message
    assert "another model" in message


@pytest.mark.parametrize("command", ["evaluation", "prediction"])
def test_weights_that_fill_a_part_of_the_model_are_refused(
    command: str, trained: Path, workplace: Path, capsys: Captured, datasets: Path
) -> None:
    weights = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    torch.save(
        {"model": {k: v for k, v in weights.items() if "box_predictor" not in k}},
        workplace / "part.pth",
    )
    image = str(datasets / "shapes" / "JPEGImages" / "val_000000.jpg")
    options = (
        ["--eval-only"] if command == "evaluation" else ["--input", image, "--output", "found"]
    )
    main = train.main if command == "evaluation" else predict.main
    assert main(["--config-file", "tiny.yaml", *options, "MODEL.WEIGHTS", "part.pth"]) == 2
    message = _error(capsys)
    assert "box_predictor" in message
    assert "--allow-partial" in message
    assert (
        main(
            ["--config-file", "tiny.yaml", "--allow-partial", *options, "MODEL.WEIGHTS", "part.pth"]
        )
        == 0
    )


def test_evaluation_that_misses_the_expected_results_fails(
    trained: Path, workplace: Path, capsys: Captured
) -> None:
    argv = [
        "--config-file",
        "tiny.yaml",
        "--eval-only",
        "MODEL.WEIGHTS",
        str(trained / "model_final.pth"),
    ]
    assert train.main([*argv, "TEST.EXPECTED_RESULTS", "[['bbox', 'AP', 99.0, 0.5]]"]) == 2
    assert "expected 99.0 +- 0.5" in _error(capsys)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_unreadable_image_is_named(
    workers: str, workplace: Path, datasets: Path, capsys: Captured
) -> None:
    _declare_copy(workplace, datasets, name=f"end_to_end_truncated_{workers}")
    (workplace / "images" / "train_000000.jpg").write_bytes(b"\xff\xd8\xff")
    assert (
        train.main(
            ["--config-file", "own.yaml", "DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", "5"]
        )
        == 2
    )
    assert "train_000000.jpg" in _error(capsys)


def test_data_set_without_images_is_named(
    workplace: Path, datasets: Path, capsys: Captured
) -> None:
    _declare_copy(workplace, datasets, name="end_to_end_empty", images=[], annotations=[])
    assert train.main(["--config-file", "own.yaml"]) == 2
    assert "end_to_end_empty" in _error(capsys)


def _declare_copy(workplace: Path, datasets: Path, name: str, **replaced: list) -> None:
    """Write `own.yaml`, which trains on a copy of the generated data with parts of its json replaced."""
    (workplace / "images").mkdir()
    for path in (datasets / "shapes" / "JPEGImages").glob("train_*.jpg"):
        (workplace / "images" / path.name).write_bytes(path.read_bytes())
    content = json.loads((datasets / "shapes" / "instances_train.json").read_text())
    (workplace / "copy.json").write_text(json.dumps({**content, **replaced}))
    (workplace / "own.yaml").write_text(
        "_BASE_: tiny.yaml\nDATASETS:\n"
        f"  REGISTER: [{{name: {name}, format: coco, images: images, annotations: copy.json}}]\n"
        f"  TRAIN: [{name}]\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            ["--input", "nothing.jpg"], "--input nothing.jpg: no such file", id="missing image"
        ),
        pytest.param(
            ["--input", "photos"], "--input photos: no image in this folder", id="empty folder"
        ),
        pytest.param(
            ["--input", "*.png"], r"--input *.png: no such file", id="pattern without files"
        ),
        pytest.param(
            ["--input", "tiny.yaml", "--confidence-threshold", "50"],
            "(--confidence-threshold) must lie between 0 and 1, got 50.0",
            id="threshold in percent",
        ),
    ],
)
def test_wrong_input_of_a_prediction_is_explained(
    options: list[str], message: str, workplace: Path, capsys: Captured
) -> None:
    (workplace / "photos").mkdir()
    assert predict.main(["--config-file", "tiny.yaml", *options, "--output", "found"]) == 2
    assert message in _error(capsys)


def test_prediction_without_weights_is_refused(workplace: Path, capsys: Captured) -> None:
    assert (
        predict.main(["--config-file", "tiny.yaml", "--input", "tiny.yaml", "--output", "found"])
        == 2
    )
    assert "MODEL.WEIGHTS" in _error(capsys)
