"""From a YAML file to AP and pictures, through the commands as users call them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from detkit.cli import predict, train
from detkit.config import default_trainer_settings
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import load_coco_json
from detkit.data.datasets.shapes import register
from detkit.structures import ImageRecord

TOOLS = Path(__file__).parents[2] / "tools"


def _detections(output: Path) -> list[dict]:
    return json.loads((output / "inference" / "coco_instances_results.json").read_text())


def _metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_training_leaves_weights_metrics_results_and_pictures(trained: Path) -> None:
    names = {path.relative_to(trained).as_posix() for path in trained.rglob("*")}
    assert {"model_final.pth", "metrics.json", "config.yaml", "log.txt", "last_checkpoint"} <= names
    assert "inference/coco_instances_results.json" in names
    assert sorted(n for n in names if n.startswith("pictures/")) == [
        f"pictures/shapes_val_val_00000{i}.jpg" for i in range(3)
    ]


def test_picture_shows_truth_and_prediction_side_by_side(trained: Path, datasets: Path) -> None:
    with Image.open(datasets / "shapes/JPEGImages/val_000000.jpg") as image:
        width, height = image.size
    with Image.open(trained / "pictures/shapes_val_val_000000.jpg") as picture:
        assert picture.width > 2 * picture.height * width / height * 0.8
        assert picture.width > 2 * width


def test_evaluating_saved_weights_repeats_the_results_and_prints_the_folder_of_pictures_last(
    trained: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--config-file",
        "tiny.yaml",
        "--eval-only",
        "MODEL.WEIGHTS",
        str(trained / "model_final.pth"),
    ]
    assert train.main(argv) == 0
    assert _detections(workplace / "out") == _detections(trained)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(workplace / "out" / "pictures")
    assert any((workplace / "out" / "pictures").iterdir())
    heads = [[cell.strip() for cell in line.split("|")][1:-1] for line in lines]
    assert heads.count(["AP", "AP50", "AP75", "APs", "APm", "APl"]) == 1


def test_test_data_are_read_once_per_run(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counting(json_file: str, *args: str) -> list[ImageRecord]:
        read.append(Path(json_file).name)
        return load_coco_json(json_file, *args)

    monkeypatch.setattr(register, "load_coco_json", counting)
    assert train.main(["--config-file", "tiny.yaml", "TEST.EVAL_PERIOD", "1"]) == 0
    assert sorted(read) == ["instances_train.json", "instances_val.json"]


def test_resumed_run_goes_on_where_the_last_one_ended(workplace: Path) -> None:
    assert train.main(["--config-file", "tiny.yaml", "SOLVER.MAX_ITER", "1"]) == 0
    assert train.main(["--config-file", "tiny.yaml", "--resume", "SOLVER.MAX_ITER", "3"]) == 0
    assert "training from iteration 1 to 3" in (workplace / "out" / "log.txt").read_text()
    checkpoint = torch.load(workplace / "out" / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 2


def test_prediction_writes_pictures_and_one_json_file(
    trained: Path, workplace: Path, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = datasets / "shapes" / "JPEGImages"
    argv = [
        "--config-file",
        "tiny.yaml",
        "--input",
        str(pictures / "val_*.jpg"),
        "--output",
        "found",
    ]
    argv += ["--confidence-threshold", "0.05", "MODEL.WEIGHTS", str(trained / "model_final.pth")]
    assert predict.main(argv) == 0
    names = [f"val_00000{i}.jpg" for i in range(3)]
    assert sorted(path.name for path in (workplace / "found").iterdir()) == [
        "predictions.json",
        *names,
    ]
    entries = json.loads((workplace / "found" / "predictions.json").read_text())
    assert [entry["picture"] for entry in entries] == names
    for entry in entries:
        assert {"file", "height", "width", "instances"} <= entry.keys()
        for instance in entry["instances"]:
            x, y, width, height = instance["bbox"]
            assert instance["score"] >= 0.05
            assert instance["category"] in MetadataCatalog.get("shapes_val").thing_classes
            assert x >= 0
            assert y >= 0
            assert x + width <= entry["width"] + 0.02
            assert y + height <= entry["height"] + 0.02
    assert sum(len(entry["instances"]) for entry in entries) > 0
    assert capsys.readouterr().out.splitlines()[-1] == str(workplace / "found")


def test_unreadable_input_is_named_and_the_others_are_written(
    trained: Path, workplace: Path, datasets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "notes.jpg").write_text("no picture")
    good = datasets / "shapes" / "JPEGImages" / "val_000000.jpg"
    argv = ["--config-file", "tiny.yaml", "--input", "notes.jpg", str(good), "--output", "found"]
    assert predict.main([*argv, "MODEL.WEIGHTS", str(trained / "model_final.pth")]) == 2
    assert (
        "1 of 2 inputs could not be read: notes.jpg. The results of the others"
        in capsys.readouterr().err
    )
    assert (workplace / "found" / "val_000000.jpg").is_file()


def test_voc_tree_trains_and_is_scored_by_voc_ap(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config-file", "tiny.yaml", "SOLVER.MAX_ITER", "1"]
    argv += ["DATASETS.TRAIN", "('shapes_voc_train',)", "DATASETS.TEST", "('shapes_voc_val',)"]
    assert train.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert heads.count(["", "AP", "AP50", "AP75", ""]) == 1


def test_voc_and_coco_train_alike(trained: Path, workplace: Path) -> None:
    argv = ["--config-file", "tiny.yaml", "DATASETS.TRAIN", "('shapes_voc_train',)"]
    assert train.main(argv) == 0
    assert _detections(workplace / "out") == _detections(trained)


def test_data_set_declared_in_yaml_trains(workplace: Path, datasets: Path) -> None:
    (workplace / "own.yaml").write_text(
        "_BASE_: tiny.yaml\n"
        "DATASETS:\n"
        "  REGISTER:\n"
        "    - {name: end_to_end_coco, format: coco, images: shapes/JPEGImages, annotations: shapes/instances_train.json}\n"
        "    - {name: end_to_end_voc, format: voc, root: shapes, split: val, classes: [circle, square, triangle, star, ring]}\n"
        "  TRAIN: [end_to_end_coco]\n"
        "  TEST: [end_to_end_voc]\n"
    )
    try:
        assert train.main(["--config-file", "own.yaml", "SOLVER.MAX_ITER", "1"]) == 0
    finally:
        for name in ("end_to_end_coco", "end_to_end_voc"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    assert {d["category_id"] for d in _detections(workplace / "out")} <= set(range(6))


def test_loop_written_out_trains_like_the_trainer(
    trained: Path,
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["plain_train_net.py", "--config-file", "tiny.yaml"])
    main = runpy.run_path(str(TOOLS / "plain_train_net.py"))["main"]
    assert main() == 0
    losses, expected = _metrics(workplace / "out")[-1], _metrics(trained)
    assert losses["loss_cls"] == pytest.approx(
        next(m for m in expected if "loss_cls" in m)["loss_cls"], rel=1e-4
    )
    assert (workplace / "out" / "model_final.pth").is_file()
    assert "| bbox " not in capsys.readouterr().out  # the evaluator shows the scores


def test_loop_written_out_resumes(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(TOOLS / "plain_train_net.py"))["main"]
    for options, max_iter in (([], "1"), (["--resume"], "2")):
        argv = [
            "plain_train_net.py",
            "--config-file",
            "tiny.yaml",
            *options,
            "SOLVER.MAX_ITER",
            max_iter,
        ]
        monkeypatch.setattr(sys, "argv", [*argv, "DATASETS.TEST", "()"])
        assert main() == 0
    assert "training from iteration 1 to 2" in (workplace / "out" / "log.txt").read_text()


def test_loop_written_out_repeats_no_metrics(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(TOOLS / "plain_train_net.py"))["main"]
    argv = ["plain_train_net.py", "--config-file", "tiny.yaml", "--resume", "DATASETS.TEST", "()"]
    for max_iter in ("1", "2", "2"):
        monkeypatch.setattr(
            sys, "argv", [*argv, "SOLVER.MAX_ITER", max_iter, "SOLVER.CHECKPOINT_PERIOD", "1"]
        )
        assert main() == 0
        (workplace / "out" / "last_checkpoint").write_text("model_0000000.pth")  # killed behind it
    assert [line["iteration"] for line in _metrics(workplace / "out")] == [0, 1]


def test_loop_written_out_refuses_what_it_does_not_do(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(TOOLS / "plain_train_net.py"))
    left_out = default_trainer_settings()
    asking = {key: 7 if isinstance(idle, int) else "bbox/AP" for key, idle in left_out.items()}
    asking.update({key: "True" for key, idle in left_out.items() if isinstance(idle, bool)})
    asking["TEST.EXPECTED_RESULTS"] = "[['bbox', 'AP', 1, 1]]"
    asking["SOLVER.DDP.COMPRESSION"] = "fp16"
    settings = [str(word) for pair in asking.items() for word in pair]
    monkeypatch.setattr(
        sys, "argv", ["plain_train_net.py", "--config-file", "tiny.yaml", *settings]
    )
    assert script["main"]() == 2
    message = capsys.readouterr().err
    assert all(f"{key}=" in message for key in asking), message
    assert not (workplace / "out").exists()


@pytest.mark.parametrize(("script", "command"), [("train_net", "train"), ("demo", "predict")])
def test_script_is_the_command(script: str, command: str) -> None:
    main = runpy.run_path(str(TOOLS / f"{script}.py"))["main"]
    assert main.__module__ == f"detkit.cli.{command}"


def test_script_prepares_the_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    argv = [
        "prepare_shapes.py",
        "--output",
        str(tmp_path / "shapes"),
        "--num-train",
        "2",
        "--num-val",
        "1",
    ]
    main = runpy.run_path(str(TOOLS.parent / "datasets" / "prepare_shapes.py"))["main"]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert (tmp_path / "shapes" / "instances_val.json").is_file()
    assert "2 + 1 images" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*argv, "--seed", "-1"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "seed >= 0" in capsys.readouterr().err


def test_screen_of_a_run_is_short_and_says_everything_once(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "out").mkdir(exist_ok=True)
    assert train.main(["--config-file", "tiny.yaml", "SOLVER.MAX_ITER", "2"]) == 0
    screen = capsys.readouterr().out
    log = (workplace / "out" / "log.txt").read_text()
    for once in (
        "| shapes_train ",
        "| shapes_val ",
        "average precision of boxes on",
        "iter: 1/2  epoch: ",
    ):
        assert screen.count(once) == 1, once
    for in_file_only in ("Namespace(", "(backbone): ", "copypaste", "detkit.engine", "lr x"):
        assert in_file_only in log
        assert in_file_only not in screen
    assert len(screen.splitlines()) < 60
    assert max(map(len, screen.replace("WARNING: ", "\n").splitlines())) < 300
