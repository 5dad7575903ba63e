from pathlib import Path

import pytest

from detkit.utils.media_file import find_images


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
def test_pattern_gives_what_fits(
    pattern: str, names: list[str], photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _names(find_images([str(photos / pattern)]), photos) == names
    monkeypatch.chdir(photos)
    assert [path.as_posix() for path in find_images([pattern])] == names


def test_what_is_left_out_of_a_folder_is_counted_and_named(photos: Path, caplog) -> None:
    (photos / "._a.jpg").touch()
    (photos / ".ipynb_checkpoints").mkdir()
    (photos / ".ipynb_checkpoints/a.jpg").touch()
    with caplog.at_level("INFO", logger="detkit"):
        assert _names(find_images([str(photos)]), photos) == ["a.PNG", "b.jpg"]
    assert "2 hidden: ._a.jpg, .ipynb_checkpoints" in caplog.text
    assert "1 not looked into (`PATH/**/*` reads the folders, too): deep" in caplog.text
    assert "1 without the suffix of an image: notes.txt" in caplog.text
    assert _names(find_images([str(photos / "**/*")]), photos) == ["a.PNG", "b.jpg", "deep/c.jpg"]
    hidden = [str(photos / "._a.jpg"), str(photos / ".ipynb_checkpoints")]
    assert _names(find_images(hidden), photos) == ["._a.jpg", ".ipynb_checkpoints/a.jpg"]


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
