from pathlib import Path

import pytest

from detkit.utils import file_io
from detkit.utils.file_io import PathManager, dataset_root, packaged_configs


def test_dataset_root_follows_the_environment(monkeypatch):
    monkeypatch.delenv("DETKIT_DATASETS", raising=False)
    assert dataset_root() == Path("datasets")
    monkeypatch.setenv("DETKIT_DATASETS", "/data")
    assert dataset_root() == Path("/data")


def test_packaged_configs_are_found():
    assert (packaged_configs() / "Base-RCNN-FPN.yaml").is_file()


def test_zoo_address_becomes_the_download_address(monkeypatch, tmp_path):
    asked = []
    handler = file_io.Detectron2Handler()
    monkeypatch.setattr(PathManager, "get_local_path", lambda path, **kw: asked.append(path) or str(tmp_path / "f"))
    (tmp_path / "f").write_text("weights")
    assert handler._open("detectron2://a/b.pkl").read() == "weights"
    assert asked == ["https://dl.fbaipublicfiles.com/detectron2/a/b.pkl"]


def test_zoo_is_read_only():
    with pytest.raises(OSError, match="can only be read"):
        file_io.Detectron2Handler()._open("detectron2://x", "w")
