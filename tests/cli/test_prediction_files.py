import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from detkit.cli.prediction_files import FORMATS, PredictionLog, write_json
from detkit.data.datasets import load_coco_json
from detkit.data.datasets.formats.drawing_tools import read_labelme
from detkit.data.datasets.formats.yolo import read_yolo_folders
from detkit.structures import bitmask_to_rle
from detkit.utils.errors import ConfigError

CLASSES = ["cat", "dog"]


def _entry(name: str, *instances: dict, **more) -> dict:
    return {
        "file": name,
        "name": Path(name).stem,
        "height": 40,
        "width": 60,
        "instances": list(instances),
        **more,
    }


def _object(category: int, bbox: list, **more) -> dict:
    return {
        "category": CLASSES[category],
        "category_id": category,
        "score": 0.9,
        "bbox": bbox,
        **more,
    }


def _log(folder: Path, *entries) -> PredictionLog:
    log = PredictionLog(folder)
    log.start({}, resume=False)
    with log.opened(0):
        for number, entry in enumerate(entries):
            log.add(number, entry)
    return log


def test_entries_of_all_processes_come_back_in_order(tmp_path: Path) -> None:
    log = PredictionLog(tmp_path)
    log.start({}, resume=False)
    with log.opened(1):
        log.add(3, _entry("d"))
        log.add(1, _entry("b1", frame=1), frame=1)
        log.add(1, _entry("b0", frame=0), frame=0)
        log.add(1, None)
    with log.opened(0):
        log.add(0, _entry("a"))
        log.add(2, "it cannot be read")
    assert [entry["file"] for entry in log.entries()] == ["a", "b0", "b1", "d"]
    assert log.failed == {2}
    log.remove()
    assert not list(tmp_path.iterdir())


def test_what_was_half_written_is_not_done(tmp_path: Path) -> None:
    log = _log(tmp_path, _entry("a"), _entry("b"))
    with log.opened(1):
        log.add(2, _entry("v", frame=0), frame=0)  # a video that has not ended
    path = tmp_path / ".predictions_0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    again = PredictionLog(tmp_path)
    assert again.start({}, resume=True) == {0}
    with again.opened(0):
        again.add(1, _entry("B"))
    assert [entry["file"] for entry in again.entries()] == ["a", "B", "v"]


def test_other_options_are_refused_for_a_resumed_run(tmp_path: Path) -> None:
    PredictionLog(tmp_path).start({"--classes": ["cat"], "n": (1,)}, resume=False)
    assert PredictionLog(tmp_path).start({"--classes": ["cat"], "n": (1,)}, resume=True) == set()
    with pytest.raises(ConfigError, match=r"had another --classes\. Give the same options"):
        PredictionLog(tmp_path).start({"--classes": ["dog"], "n": (1,)}, resume=True)


def test_json_has_an_entry_a_line(tmp_path: Path) -> None:
    write_json(_log(tmp_path, _entry("a"), _entry("b")).entries(), tmp_path / "p.json")
    assert len((tmp_path / "p.json").read_text().splitlines()) == 4
    assert [entry["file"] for entry in json.loads((tmp_path / "p.json").read_text())] == ["a", "b"]
    write_json([], tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text()) == []


MASK = np.zeros((40, 60), dtype=np.uint8)
MASK[5:15, 10:30] = 1
MASK[20:30, 40:50] = 1
BOXES = [_object(1, [10, 5, 20, 10]), _object(0, [0, 0, 60, 40])]


def _written(kind: str, folder: Path, *entries) -> None:
    FORMATS[kind](_log(folder, *entries), folder, CLASSES)


def test_coco_is_read_back(tmp_path: Path) -> None:
    masked = _object(1, [10, 5, 40, 25], segmentation=bitmask_to_rle(MASK))
    _written("coco", tmp_path, _entry("a.jpg", *BOXES), _entry("b.jpg"), _entry("c.jpg", masked))
    records = load_coco_json(str(tmp_path / "coco.json"), "", "predictions_read_back")
    found = [[(a["category_id"], list(a["bbox"])) for a in r["annotations"]] for r in records]
    assert found == [[(1, [10, 5, 20, 10]), (0, [0, 0, 60, 40])], [], [(1, [10, 5, 40, 25])]]
    annotations = json.loads((tmp_path / "coco.json").read_text())["annotations"]
    assert [a["area"] for a in annotations] == [200, 2400, 300]
    assert annotations[0]["score"] == 0.9


def test_coco_keypoints_number_pixels(tmp_path: Path) -> None:
    _written("coco", tmp_path, _entry("a.jpg", _object(0, [0, 0, 9, 9], keypoints=[3.5, 4, 0.2])))
    (annotation,) = json.loads((tmp_path / "coco.json").read_text())["annotations"]
    assert (annotation["keypoints"], annotation["num_keypoints"]) == ([3, 3.5, 2], 1)


def test_csv_has_a_row_per_box_and_one_for_no_box(tmp_path: Path) -> None:
    turned = _object(0, [30, 20, 10, 4, 30.5])
    _written(
        "csv", tmp_path, _entry("a.jpg", *BOXES), _entry("v.mp4", frame=3), _entry("c", turned)
    )
    rows = list(csv.reader((tmp_path / "predictions.csv").open(newline="")))
    assert rows[1:] == [
        ["a.jpg", "", "dog", "0.9", "10", "5", "30", "15", ""],
        ["a.jpg", "", "cat", "0.9", "0", "0", "60", "40", ""],
        ["v.mp4", "3", *[""] * 7],
        ["c", "", "cat", "0.9", "25.0", "18.0", "35.0", "22.0", "30.5"],
    ]


def test_yolo_is_read_back(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40)).save(tmp_path / "images" / f"{name}.png")
    masked = _object(1, [10, 5, 20, 10], segmentation=bitmask_to_rle(MASK * (np.arange(60) < 35)))
    _written("yolo", tmp_path, _entry("images/a.png", *BOXES), _entry("images/b.png", masked))
    assert yaml.safe_load((tmp_path / "data.yaml").read_text())["names"] == {0: "cat", 1: "dog"}
    read = read_yolo_folders(str(tmp_path / "images"), CLASSES)
    boxes = [
        [(o["category_id"], *np.round(o["bbox"], 3)) for o in r["annotations"]]
        for r in read.records()
    ]
    assert boxes == [[(1, 10, 5, 20, 10), (0, 0, 0, 60, 40)], [(1, 10, 5, 20, 10)]]


def test_labelme_is_read_back(tmp_path: Path) -> None:
    masked = _object(1, [10, 5, 40, 25], segmentation=bitmask_to_rle(MASK))
    turned = _object(0, [30, 20, 10, 4, 90.0])
    _written(
        "labelme", tmp_path, _entry("photos/a.jpg", *BOXES, masked, turned), _entry("v", frame=0)
    )
    assert [path.name for path in (tmp_path / "labelme").iterdir()] == ["a.json"]
    shapes = json.loads((tmp_path / "labelme/a.json").read_text())["shapes"]
    assert [s["group_id"] for s in shapes] == [None, None, 2, 2, None]
    corners = torch.tensor(shapes[-1]["points"])
    assert corners.amin(0).tolist() == pytest.approx([28, 15], abs=1e-4)
    assert corners.amax(0).tolist() == pytest.approx([32, 25], abs=1e-4)
    read = read_labelme(str(tmp_path / "labelme"), str(tmp_path))
    assert len(read.records()[0]["annotations"]) == 4
