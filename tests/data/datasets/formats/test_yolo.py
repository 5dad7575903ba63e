"""Layouts of YOLO's data sets, kinds of rows, and rows that are refused by file and line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.formats.yolo import read_yolo
from detkit.utils.errors import DataError, MissingFileError


def _write(root, layout="images/train", rows="1 0.5 0.5 0.2 0.4\n", **content):
    """One image of 40 x 20 with rows, one without a text file, and a data.yaml."""
    folder = root / layout
    folder.mkdir(parents=True)
    for name in ("a.jpg", "b.JPG"):
        Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(folder / name)
    labels = Path(*["labels" if part == "images" else part for part in folder.parts])
    labels.mkdir(parents=True, exist_ok=True)
    (labels / "a.txt").write_text(rows)
    lines = {"train": layout, "names": "[cat, dog]", **content}
    text = "".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None)
    (root / "data.yaml").write_text(text)
    return str(root / "data.yaml")


def _list(root):
    (root / "train.txt").write_text("./images/train/a.jpg\nimages/train/b.JPG\n\n")
    return "train.txt"


@pytest.mark.parametrize(
    ("layout", "content"),
    [
        pytest.param("images/train", {}, id="relative-to-yaml"),
        pytest.param("set/images/train", {"path": "set", "train": "images/train"}, id="root"),
        pytest.param("train/images", {"train": "../train/images"}, id="roboflow"),
        pytest.param("images/train", {"train": "[images/train]"}, id="list-of-folders"),
        pytest.param("images/train", {"train": "train.txt"}, id="text-file"),
        pytest.param("train", {}, id="labels-beside-images"),
        pytest.param("images/train", {"names": "{0: cat, 1: dog}", "nc": 2}, id="names-by-number"),
    ],
)
def test_layouts(layout, content, tmp_path, declare, contents):
    _list(tmp_path)
    data = _write(tmp_path, layout, **content)
    name = declare({"format": "yolo", "data": data})
    assert contents(name) == {"a": (20, 40, [("dog", (16, 6, 24, 14))]), "b": (20, 40, [])}
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]


def test_root_may_be_below_the_folder_of_data_sets(tmp_path, monkeypatch, declare, contents):
    monkeypatch.setenv("DETKIT_DATASETS", str(tmp_path / "data"))
    data = _write(tmp_path / "data" / "set", path="set")
    moved = (tmp_path / "data" / "set" / "data.yaml").rename(tmp_path / "data.yaml")
    assert str(moved) != data
    assert list(contents(declare({"format": "yolo", "data": str(moved)}))) == ["a", "b"]


def test_folders_without_data_yaml(tmp_path, declare, contents):
    _write(tmp_path)
    entry = {"format": "yolo", "images": str(tmp_path / "images"), "classes": ["cat", "dog"]}
    found = contents(declare(entry))
    assert found["a"] == (20, 40, [("dog", (16, 6, 24, 14))])
    (tmp_path / "labels").rename(tmp_path / "text")
    assert contents(declare({**entry, "annotations": str(tmp_path / "text")})) == found


def test_corners_are_a_mask_and_its_hull(tmp_path, declare, contents):
    rows = "0 0.5 0.1 0.9 0.5 0.5 0.9 0.1 0.5\n1 0.5 0.5 0.2 0.4\n"
    name = declare({"format": "yolo", "data": _write(tmp_path, rows=rows)})
    assert contents(name)["a"][2] == [("cat", (4, 2, 36, 18)), ("dog", (16, 6, 24, 14))]
    turned, upright = DatasetCatalog.get(name)[0]["annotations"]
    assert turned["segmentation"] == [[20, 2, 36, 10, 20, 18, 4, 10]]
    assert "segmentation" not in upright


@pytest.mark.parametrize(
    ("values", "row", "expected"),
    [
        pytest.param(3, "0.25 0.5 2 0 0 0", [10.5, 10.5, 2, 0, 0, 0], id="visibility"),
        pytest.param(2, "0.25 0.5 0 0", [10.5, 10.5, 2, 0, 0, 0], id="without"),
    ],
)
def test_keypoints(values, row, expected, tmp_path, declare):
    data = _write(tmp_path, rows=f"0 0.5 0.5 0.2 0.4 {row}\n", kpt_shape=f"[2, {values}]")
    name = declare({"format": "yolo", "data": data})
    found = DatasetCatalog.get(name)[0]["annotations"][0]["keypoints"]
    assert [v * (found[k - k % 3 + 2] > 0) for k, v in enumerate(found)] == expected


@pytest.mark.parametrize(
    ("row", "content", "message"),
    [
        pytest.param("2 0.5 0.5 0.2 0.4", {}, "class 2, need 0 to 1", id="class"),
        pytest.param("dog 0.5 0.5 0.2 0.4", {}, "'dog', need a number", id="name"),
        pytest.param("1 0.5 nan 0.2 0.4", {}, "'nan', need a number", id="nan"),
        pytest.param("1 0.5 0.5 0.2", {}, "4 numbers, need 5", id="short"),
        pytest.param("1 0.5 0.5 0.2 0.4 0.9", {}, "score of a prediction", id="score"),
        pytest.param("1 312 0.5 0.2 0.4", {}, "has 312, need shares", id="pixels"),
        pytest.param("1 0.5 0.5 -0.2 0.4", {}, "right or lower side comes first", id="negative"),
        pytest.param("1 .1 .1 .2 .2 .5 .5", {"kpt_shape": "[2, 3]"}, "need 11", id="keypoints"),
    ],
)
def test_wrong_row_is_named_by_file_and_line(row, content, message, tmp_path):
    data = _write(tmp_path, rows=f"1 0.5 0.5 0.2 0.4\n\n{row}\n", **content)
    with pytest.raises(DataError, match=rf"labels/train/a.txt:3 .*{message}"):
        read_yolo(data, "train")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"names": None}, "needs names", id="no-names"),
        pytest.param({"names": "{0: cat, 2: dog}"}, "without gaps", id="gap"),
        pytest.param({"names": "[yes, dog]"}, "put it in quotes", id="boolean"),
        pytest.param({"names": "[dog, dog]"}, "repeats dog", id="twice"),
        pytest.param({"nc": 3}, "nc: 3, but 2 names", id="nc"),
        pytest.param({"kpt_shape": "[17]"}, "kpt_shape", id="kpt_shape"),
        pytest.param({"train": None, "val": "images"}, "no split 'train', only val", id="split"),
        pytest.param({"train": "photos"}, "photos, which does not exist; looked for", id="folder"),
        pytest.param({"train": "[unclosed"}, "not valid YAML: line [0-9]+: ", id="yaml"),
        pytest.param({"train": "2001-99-99"}, "not valid YAML: month must be", id="date"),
        pytest.param({"nc": "9" * 5000}, "not valid YAML", id="digits"),
        pytest.param({"nc": "!!bool maybe"}, "not valid YAML", id="bool"),
        pytest.param({"nc": "!!timestamp maybe"}, "not valid YAML", id="timestamp"),
        pytest.param({"train": "data.yaml"}, "must be a folder of images", id="file"),
    ],
)
def test_wrong_data_yaml_is_named(content, message, tmp_path):
    data = _write(tmp_path, **content)
    with pytest.raises((DataError, MissingFileError), match=message) as caught:
        read_yolo(data, "train")
    assert "data.yaml" in str(caught.value)


@pytest.mark.parametrize(
    "top", ["names: *a40", "<<: [*a40, *a40]"], ids=["lists", "merged mappings"]
)
def test_aliases_that_multiply_are_refused(top, tmp_path):
    first = "a0: &a0 {x: 1}\n" if "<<" in top else "a0: &a0 [x]\n"
    double = "{{<<: [*a{k}, *a{k}]}}" if "<<" in top else "[*a{k}, *a{k}]"
    lines = [f"a{k + 1}: &a{k + 1} {double.format(k=k)}\n" for k in range(40)]
    (tmp_path / "data.yaml").write_text(first + "".join(lines) + f"{top}\ntrain: images\n")
    with pytest.raises(DataError, match="too large, with its aliases written out"):
        read_yolo(str(tmp_path / "data.yaml"), "train")


def test_an_alias_is_read(tmp_path):
    data = _write(tmp_path, train="&train images/train", val="*train")
    assert read_yolo(data, "val").names == ["cat", "dog"]


def test_no_text_file_at_all_is_an_error(tmp_path):
    data = _write(tmp_path)
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    with pytest.raises(
        MissingFileError, match=r"none of the 2 images .* looked for .*labels/train/a.txt"
    ):
        read_yolo(data, "train")


def test_wrong_line_of_a_list_is_named(tmp_path):
    (tmp_path / "train.txt").write_text("images/train/a.jpg\nimages/train/a\n")
    data = _write(tmp_path, train="train.txt")
    with pytest.raises(DataError, match=r"train.txt:2 has 'images/train/a'"):
        read_yolo(data, "train")
