import re
from pathlib import Path

import pytest

from detkit.utils import file_io
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import (
    PathManager,
    dataset_root,
    packaged_configs,
    read_file,
    read_text,
)


def test_dataset_root_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DETKIT_DATASETS", raising=False)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    assert dataset_root() == Path("datasets")
    monkeypatch.setenv("DETECTRON2_DATASETS", "/of_detectron2")
    assert dataset_root() == Path("/of_detectron2")
    monkeypatch.setenv("DETKIT_DATASETS", "/data")
    assert dataset_root() == Path("/data")


def test_packaged_configs_are_found():
    assert (packaged_configs() / "Base-RCNN-FPN.yaml").is_file()


def test_zoo_address_becomes_the_download_address(monkeypatch, tmp_path):
    asked = []
    handler = file_io.Detectron2Handler()
    monkeypatch.setattr(file_io, "fetch", lambda url: asked.append(url) or tmp_path / "f")
    (tmp_path / "f").write_text("weights")
    assert handler._open("detectron2://a/b.pkl").read() == "weights"
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/a/b.pkl"]


def test_addresses_are_opened_where_they_were_downloaded(monkeypatch, tmp_path):
    (tmp_path / "f").write_text("weights")
    monkeypatch.setattr(file_io, "fetch", lambda url: tmp_path / "f")
    with PathManager.open("https://x.org/f", "r") as file:
        assert file.read() == "weights"


@pytest.mark.parametrize("address", ["detectron2://x", "catalog://x", "https://x.org/y"])
@pytest.mark.parametrize("mode", ["w", "ab", "r+"])
def test_downloads_are_read_only(address, mode):
    with pytest.raises(OSError, match="can only be read"):
        PathManager.open(address, mode)


@pytest.mark.parametrize(
    "name", [pytest.param("a\0.jpg", id="zero"), pytest.param("\ud800.jpg", id="half a character")]
)
def test_a_name_that_no_file_can_have_is_a_missing_file(name: str) -> None:
    with pytest.raises(MissingFileError, match=f"image {name} does not exist"):
        read_file(name, "image")


@pytest.mark.parametrize("address", ["http://x.org/w.pth", "ftp://x.org/w.pth"])
def test_only_https_is_fetched(address):
    with pytest.raises(ValueError, match=f"{address} is not fetched: only https is"):
        PathManager.get_local_path(address)


def test_offline_names_the_place_of_a_zoo_file(monkeypatch, tmp_path):
    monkeypatch.setenv("DETKIT_OFFLINE", "1")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    place = tmp_path / "detectron2" / "ImageNetPretrained" / "MSRA" / "R-50.pkl"
    with pytest.raises(OSError, match=f"place it as {place}$"):
        PathManager.get_local_path("detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    place.parent.mkdir(parents=True)
    place.write_text("weights")
    assert PathManager.get_local_path("detectron2://ImageNetPretrained/MSRA/R-50.pkl") == str(place)


def test_every_catalog_address_of_the_zoo_is_known(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(file_io, "fetch", lambda url: asked.append(url) or tmp_path / "f")
    text = "".join(path.read_text() for path in sorted(packaged_configs().rglob("*.yaml")))
    addresses = set(re.findall(r"catalog://\S+", text))
    for address in addresses:
        PathManager.get_local_path(address)
    assert len(asked) == len(addresses) == 3
    assert all(
        re.fullmatch(r"https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/\S+\.pkl", a)
        for a in asked
    )


def test_unknown_catalog_address_has_near_misses():
    with pytest.raises(
        FileNotFoundError,
        match=r"catalog://ImageNetPretrained/FAIR/R-50-NG .*Did you mean .*R-50-GN",
    ):
        PathManager.get_local_path("catalog://ImageNetPretrained/FAIR/R-50-NG")


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("content")
    assert PathManager.get_local_path("~/a.txt") == str(tmp_path / "a.txt")
    assert PathManager.exists("~/a.txt")
    with PathManager.open("~/a.txt") as file:
        assert file.read() == "content"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_text_of_the_encodings_of_windows_is_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "classes.txt").write_bytes("größe\r\nkatze".encode(encoding))
    assert read_text(str(tmp_path / "classes.txt")) == "größe\r\nkatze"


def test_text_in_another_encoding_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(DataError, match=r"list .*classes\.txt must be text in UTF-8"):
        read_text(str(tmp_path / "classes.txt"), "list")
