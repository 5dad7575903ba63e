import json
import os
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from PIL import Image

from detkit.cli import main
from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.structures import ImageRecord

pytestmark = pytest.mark.usefixtures("catalogs_as_before")


def _convert(source: Path | str, output: Path, target: str, *options: str) -> None:
    assert main(["convert-dataset", str(source), str(output), "--to", target, *options]) == 0


def test_bccd_comes_back_unchanged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bccd = Path(os.environ.get("DETKIT_DATASETS", "datasets")) / "bccd"
    if not bccd.is_dir():
        pytest.skip(f"no BCCD in {bccd}")
    source = tmp_path / "bccd"
    (source / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main/test.txt"):
        (source / name).symlink_to((bccd / name).resolve())
    chain = [("a", "coco"), ("b", "yolo"), ("c", "voc"), ("d", "coco")]
    for folder, target in chain:
        _convert(source, tmp_path / folder, target, "--link")
        source = tmp_path / folder
    assert "lost" not in capsys.readouterr().out
    first, last = (
        json.loads((tmp_path / folder / "annotations" / "test.json").read_text())
        for folder in ("a", "d")
    )
    assert first == last
    assert (len(first["images"]), len(first["annotations"])) == (72, 945)


def test_printed_lines_declare_what_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _convert("shapes_val", tmp_path / "out", "yolo", "--link")
    printed = capsys.readouterr().out
    assert "lost: " in printed
    (entry,) = yaml.safe_load(printed.partition("\n\n")[2])["DATASETS"]["REGISTER"]
    assert entry["format"] == "yolo"
    assert Path(entry["data"]).is_file()


def test_splits_without_a_list_of_classes_get_the_same_numbers(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for split, label in (("train", "dog"), ("val", "cat")):
        row = f"image,class,xmin,ymin,xmax,ymax\na.png,{label},1,1,5,5\n"
        (tmp_path / f"{split}.csv").write_text(row)
    _convert(tmp_path, tmp_path / "out", "coco")
    for split, number in (("train", 1), ("val", 0)):
        content = json.loads((tmp_path / "out" / "annotations" / f"{split}.json").read_text())
        assert [(c["id"], c["name"]) for c in content["categories"]] == [(0, "cat"), (1, "dog")]
        assert content["annotations"][0]["category_id"] == number


def test_what_a_reader_leaves_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    shapes = [
        {"label": "cat", "points": [[1, 1], [5, 5]], "shape_type": kind}
        for kind in ("rectangle", "line")
    ]
    content = {"imagePath": "a.png", "imageWidth": 9, "imageHeight": 9, "shapes": shapes}
    (tmp_path / "a.json").write_text(json.dumps(content))
    _convert(tmp_path, tmp_path / "out", "coco")
    assert re.search(r"left out.*line", capsys.readouterr().out)


def test_folder_that_is_not_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-dataset", str(tmp_path), str(tmp_path.parent), "--to", "coco"]) == 2
    assert "is not empty: name another folder" in capsys.readouterr().err


def test_nothing_is_left_of_a_conversion_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "a.bmp"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    rows = [f"{name},cat,1,1,5,5\n" for name in ("a.png", "a.bmp")]
    for split, row in zip(("train", "val"), rows, strict=True):
        (tmp_path / f"{split}.csv").write_text(f"image,class,xmin,ymin,xmax,ymax\n{row}")
    out = tmp_path / "out"
    out.mkdir()
    assert main(["convert-dataset", str(tmp_path), str(out), "--to", "voc"]) == 2
    printed = capsys.readouterr()
    assert "wrote train" in printed.out
    assert "a.xml, of another split, has other objects" in printed.err
    assert not any(out.iterdir())
    (tmp_path / "val.csv").unlink()
    _convert(tmp_path, out, "voc")


@pytest.mark.parametrize("name", ["../../x", "a/b"])
def test_data_set_of_any_name_is_written_below_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    record: ImageRecord = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "annotations": [],
    }
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).thing_classes = ["cat"]
    output = tmp_path / "deep" / "er" / "out"
    _convert(name, output, "coco")
    assert [path.parent for path in tmp_path.rglob("*.json")] == [output / "annotations"]
    assert len(list((output / "images").rglob("*.png"))) == 1


def test_folder_in_the_home_folder_and_the_working_one_are_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "all.csv").write_text("image,class,xmin,ymin,xmax,ymax\na.png,cat,1,1,5,5\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(work)
    _convert("~/all.csv", Path("."), "yolo")
    assert "name: work_all" in capsys.readouterr().out
    _convert("~/all.csv", Path("~/out"), "yolo")
    assert (tmp_path / "out" / "data.yaml").is_file()
    assert not (work / "~").exists()


def test_missing_images_are_all_counted_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "0.png")
    images = [{"id": k, "file_name": f"{k}.png", "width": 9, "height": 9} for k in range(3)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    out = tmp_path / "out"
    assert main(["convert-dataset", str(tmp_path / "x.json"), str(out), "--to", "coco"]) == 2
    assert "2 of 3 images of data set" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(
            {"classes.txt": b"cat\xff\n", "labels/a.txt": b""},
            r"classes.txt must be text",
            id="classes",
        ),
        pytest.param({"data.yaml": b"[" * 5000}, "no known format", id="deep-yaml"),
        pytest.param(
            {"metadata.jsonl": b"[" * 5000}, r"metadata.jsonl:1 is not valid", id="deep-json"
        ),
        pytest.param(
            {"b.csv": b"image,class,xmin,ymin,xmax,ymax,iscrowd\na.png,cat,1,1,5,5,perhaps\n"},
            r"b.csv:2: a flag is 0 or 1, got 'perhaps'",
            id="flag",
        ),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, bytes], message: str
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "a.png")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert main(["convert-dataset", str(tmp_path), str(tmp_path / "out"), "--to", "coco"]) == 2
    assert message in capsys.readouterr().err


def test_pixels_of_voc_count_from_1_and_the_last_is_included(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "all.csv").write_text("image,class,xmin,ymin,xmax,ymax\na.png,cat,1,2,5,7\n")
    _convert(tmp_path / "all.csv", tmp_path / "out", "voc")
    root = ElementTree.parse(tmp_path / "out" / "Annotations" / "a.xml")
    assert [e.text for e in root.iterfind("object/bndbox/*")] == ["2", "3", "5", "7"]
