import json

import pytest
import yaml
from PIL import Image

from detkit.cli import main
from detkit.cli.parsers import PARSERS
from detkit.cli.report import write_reports
from detkit.config import get_cfg
from detkit.engine import prepare
from detkit.evaluation.report import ReportOptions


@pytest.fixture
def run_folder(tmp_path):
    """A function that makes the folder of a run with detections of so many of its two objects."""

    # Each test declares a data set of its own.
    dataset = f"report_{tmp_path.name}"

    def make(name, num_found):
        folder = tmp_path / name
        (folder / "inference").mkdir(parents=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
        boxes = [[10, 10, 20, 20], [35, 10, 20, 20]]
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
            "annotations": [
                {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": 400, "iscrowd": 0}
                for n, box in enumerate(boxes, start=1)
            ],
            "categories": [{"id": 1, "name": "square"}],
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        declared = {
            "name": dataset,
            "format": "coco",
            "images": str(tmp_path),
            "annotations": str(tmp_path / "a.json"),
        }
        settings = {"DATASETS": {"REGISTER": [declared], "TEST": [dataset]}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        found = [
            {"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9}
            for box in boxes[:num_found]
        ]
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
        return folder

    return make


def read(folder):
    return json.loads((folder / "report.json").read_text())


def test_report_of_a_run_and_of_its_files_are_the_same(run_folder, tmp_path, capsys):
    run = run_folder("first", 1)
    assert main(["report", "--run", str(run), "--samples", "3"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "report.html")
    report = read(run / "report")
    assert report["tasks"]["bbox"]["classes"][0]["recall"] == 0.5
    file = run / "inference" / "coco_instances_results.json"
    words = [
        "--dataset",
        report["dataset"],
        "--config-file",
        str(run / "config.yaml"),
        "--samples",
        "3",
    ]
    assert (
        main(["report", "--predictions", str(file), *words, "--output", str(tmp_path / "o")]) == 0
    )
    assert read(tmp_path / "o") == {**report, "names": {"first": str(file)}}


def test_comparison_of_runs(run_folder):
    first, second = run_folder("first", 1), run_folder("second", 2)
    words = ["--compare", str(second), "--samples", "3", "--max-images", "0"]
    assert main(["report", "--run", str(first), *words]) == 0
    report = read(first / "report")
    assert report["names"] == {"first": str(first), "second": str(second)}
    compare = report["tasks"]["bbox"]["compare"]
    assert compare["classes"][1]["name"] == "square"
    # One image: it is all that resampling can draw.
    for key in ("difference", "low", "high"):
        assert compare["classes"][1][key] == pytest.approx(100 - 100 * 51 / 101)
    assert [(image["image_id"], image["change"]) for image in compare["images"]] == [(1, -1)]


def test_report_at_the_end_of_a_run(run_folder, caplog):
    run = run_folder("first", 1)
    cfg = get_cfg()
    cfg.merge_from_file(str(run / "config.yaml"))
    cfg.OUTPUT_DIR = str(run)
    prepare(cfg)
    write_reports(cfg)
    assert read(run / "report")["dataset"] == cfg.DATASETS.TEST[0]
    (run / "inference" / "coco_instances_results.json").unlink()
    write_reports(cfg)
    assert (
        f"no error report of {cfg.DATASETS.TEST[0]}: its evaluator writes no coco_inst"
        in caplog.text
    )
    for command in ("train", "eval"):
        assert PARSERS[command](None).parse_args(["--report"]).report


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["--run", "{}/nowhere"], "nowhere: no such folder", id="no-run"),
        pytest.param(["--run", "{}"], "no config.yaml in it", id="no-config"),
        pytest.param(["--run", "{}/first", "--compare", "{}/nowhere.json"], "nowhere.json does not exist", id="no-file"),
        pytest.param(["--run", "{}/first", "--dataset", "nothing_val"], "--dataset nothing_val: the run evaluates on report_", id="no-data-set"),
        pytest.param(["--run", "{}/first", "--compare", "{}"], "has no detections of 'report_", id="no-detections"),
        pytest.param(["--run", "{}/first", "--confidence-threshold", "7"], "must lie between 0 and 1, got 7", id="score"),
        pytest.param(["--run", "{}/first", "--max-images", "-1"], "--max-images must be at least 0, got -1", id="images"),
        pytest.param(["--predictions", "x.json"], "--predictions needs --dataset", id="dataset-needed"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, message, run_folder, tmp_path, capsys):
    run_folder("first", 1)
    assert main(["report", *(word.format(tmp_path) for word in words)]) == 2
    assert message in capsys.readouterr().err


def test_defaults_of_the_command_are_those_of_the_options():
    args = PARSERS["report"](None).parse_args(["--run", "x"])
    given = (args.confidence_threshold, args.max_images, args.image_size, args.samples)
    assert ReportOptions(*given) == ReportOptions()
