from pathlib import Path

import pytest
import torch

from detkit.cli.predict import _entry, _picture_names, find_images
from detkit.data import Metadata
from detkit.structures import Boxes, Instances


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("b.jpg", "a.PNG", "notes.txt", "deep/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def _names(paths: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


def test_folder_gives_its_images_in_order(photos: Path) -> None:
    assert _names(find_images([str(photos)]), photos) == ["a.PNG", "b.jpg"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        pytest.param("*.jpg", ["b.jpg"], id="one folder"),
        pytest.param("*", ["a.PNG", "b.jpg"], id="images only"),
        pytest.param("**/*.jpg", ["b.jpg", "deep/c.jpg"], id="all folders below"),
        pytest.param("d??p/*", ["deep/c.jpg"], id="pattern of a folder"),
    ],
)
def test_pattern_gives_what_fits(pattern: str, names: list[str], photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _names(find_images([str(photos / pattern)]), photos) == names
    monkeypatch.chdir(photos)
    assert [path.as_posix() for path in find_images([pattern])] == names


def test_named_file_is_given_whatever_it_is(photos: Path) -> None:
    assert _names(find_images([str(photos / "notes.txt")]), photos) == ["notes.txt"]


def test_file_named_twice_is_given_once(photos: Path) -> None:
    assert _names(find_images([str(photos / "b.jpg"), str(photos)]), photos) == ["b.jpg", "a.PNG"]


def test_file_with_brackets_in_its_name_is_no_pattern(photos: Path) -> None:
    (photos / "[1].jpg").touch()
    assert _names(find_images([str(photos / "[1].jpg")]), photos) == ["[1].jpg"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("none.jpg", "no such file", id="missing file"),
        pytest.param("*.gif", "no such file", id="pattern that nothing fits"),
        pytest.param("empty", "no image in this folder", id="folder without images"),
    ],
)
def test_input_without_images_is_named(name: str, message: str, photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=message):
        find_images([str(photos / name)])


def test_equal_names_from_different_folders_are_numbered() -> None:
    paths = [Path(p) for p in ("a/x.jpg", "b/x.jpg", "c/x.tif", "c/x_2.jpg", "d/X.png")]
    names = _picture_names(paths)
    assert names == ["x.jpg", "x_2.jpg", "x_3.jpg", "x_2_2.jpg", "X.png"]
    assert len(set(names)) == len(paths)


def test_entry_holds_names_scores_and_boxes_as_coco_has_them() -> None:
    instances = Instances((40, 60))
    instances.pred_boxes = Boxes(torch.tensor([[10.0, 5, 30, 25.5], [0, 0, 60, 40]]))
    instances.scores = torch.tensor([0.98765432, 0.5])
    instances.pred_classes = torch.tensor([1, 7])
    entry = _entry(Path("in/a.tif"), "a.jpg", instances, Metadata("x").set(thing_classes=["cat", "dog"]))
    assert (entry["file"], entry["picture"], entry["height"], entry["width"]) == ("in/a.tif", "a.jpg", 40, 60)
    assert entry["instances"] == [
        {"category": "dog", "category_id": 1, "score": 0.9877, "bbox": [10, 5, 20, 20.5]},
        {"category": "7", "category_id": 7, "score": 0.5, "bbox": [0, 0, 60, 40]},
    ]
