"""Rotated boxes as text: both formats give the boxes that they were written from, and what is refused."""

import pytest
import torch

from detkit.data import DatasetCatalog, MetadataCatalog, register_declared_datasets
from detkit.data.datasets.formats.oriented_text import load_dota, load_yolo_obb
from detkit.structures import BoxMode, rotated_box_corners
from detkit.utils.errors import DataError, MissingFileError

BOXES = torch.tensor([[12.0, 10, 14, 6, 30], [20, 12, 9, 4, -80]], dtype=torch.float64)
CLASSES = ("plane", "small-vehicle")


@pytest.fixture
def write(tmp_path, write_image):
    """Write two pictures of 24 x 32 pixels, and text beside them; gives the two folders."""

    def run(*texts):
        for k, text in enumerate(texts):
            write_image(f"images/{k}.png")
            if text is not None:
                path = tmp_path / "labels" / f"{k}.txt"
                path.parent.mkdir(exist_ok=True)
                path.write_text(text)
        return str(tmp_path / "images"), str(tmp_path / "labels")

    return run


def corners(scale=(1.0, 1.0)):
    points = rotated_box_corners(BOXES) / torch.tensor(scale)
    return [" ".join(map(str, p.flatten().tolist())) for p in points]


def dota_text():
    first, second = corners()
    return f"imagesource:GoogleEarth\ngsd:0.15\n{first} plane 0\n\n{second} small-vehicle 1\n"


def yolo_text():
    first, second = corners((32, 24))
    return f"0 {first}\n1 {second}\n"


def check(record):
    assert (record["height"], record["width"]) == (24, 32)
    boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
    torch.testing.assert_close(boxes, BOXES.float(), atol=1e-4, rtol=0)
    assert {a["bbox_mode"] for a in record["annotations"]} == {BoxMode.XYWHA_ABS}
    assert [a["category_id"] for a in record["annotations"]] == [0, 1]


def test_dota_gives_the_boxes(write):
    records = load_dota(*write(dota_text(), "imagesource:x\n", None), CLASSES)
    check(records[0])
    assert [a["difficult"] for a in records[0]["annotations"]] == [0, 1]
    assert [r["image_id"] for r in records] == ["0", "1"]
    assert records[1]["annotations"] == []


def test_yolo_gives_the_boxes_and_background_without_a_file(write):
    records = load_yolo_obb(*write(yolo_text(), "", None), CLASSES)
    check(records[0])
    assert [len(r["annotations"]) for r in records] == [2, 0, 0]


@pytest.mark.parametrize(
    ("entry", "text"),
    [({"format": "dota"}, dota_text()), ({"format": "yolo_obb"}, yolo_text())],
    ids=["dota", "yolo_obb"],
)
def test_declared_in_yaml(entry, text, write, tmp_path, monkeypatch):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path))
    write(text)
    entry = {"name": f"my_{entry['format']}", **entry, "images": "images", "annotations": "labels"}
    register_declared_datasets([{**entry, "classes": list(CLASSES)}])
    check(DatasetCatalog.get(entry["name"])[0])
    assert MetadataCatalog.get(entry["name"]).thing_classes == list(CLASSES)


@pytest.mark.parametrize(
    ("load", "text", "message"),
    [
        (load_dota, "1 2 3 4 plane 0", r"line 1 of .*0\.txt: needs 8 coordinates, .* has 6 words"),
        (load_dota, "\n1 2 3 4 5 6 7 8 plain 0", "line 2 .*unknown category 'plain'.*'plane'"),
        (load_dota, "1 2 3 4 5 6 7 x plane 0", "line 1 of .*could not convert"),
        (load_dota, "1 2 3 4 5 6 7 nan plane 0", "needs pixels, has nan"),
        (load_yolo_obb, "0 0.1 0.2 0.3 0.4", "needs a class and 8 coordinates, has 5 words"),
        (load_yolo_obb, "2 0 0 0 1 1 1 1 0", "has class 2, needs a number below 2"),
        (load_yolo_obb, "0 0 0 0 10 10 10 10 0", "needs shares of the image's sides, has 10"),
    ],
)
def test_line_that_cannot_be_meant_is_named(load, text, message, write):
    with pytest.raises(DataError, match=message):
        load(*write(text), CLASSES)


def test_text_without_its_image_is_named(write, tmp_path):
    folders = write(dota_text())
    (tmp_path / "labels" / "lost.txt").write_text("")
    with pytest.raises(MissingFileError, match="1 of 2 images annotated in .* are not in .*lost"):
        load_dota(*folders, CLASSES)
