import json
import os
from pathlib import Path

import pytest
import yaml
from PIL import Image

from detkit.cli import main
from detkit.data import DatasetCatalog, MetadataCatalog


@pytest.fixture(autouse=True)
def _catalogs_as_before():
    loaders, metadata = dict(DatasetCatalog.data), dict(MetadataCatalog.data)
    yield
    DatasetCatalog.data.clear()
    DatasetCatalog.data.update(loaders)
    MetadataCatalog.data.clear()
    MetadataCatalog.data.update(metadata)


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


def test_folder_that_is_not_empty_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-dataset", str(tmp_path), str(tmp_path.parent), "--to", "coco"]) == 2
    assert "is not empty: name another folder" in capsys.readouterr().err
