"""Images and label maps of the same name."""

from pathlib import Path

import pytest
from PIL import Image

from detkit.data import DatasetCatalog, MetadataCatalog
from detkit.data.datasets import load_sem_seg, register_sem_seg


@pytest.fixture
def folders(tmp_path):
    for name in (
        "images/a.jpg",
        "images/sub/b.jpg",
        "images/c.jpg",
        "labels/a.png",
        "labels/sub/b.png",
        "labels/d.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 3)).save(path)
    return str(tmp_path / "labels"), str(tmp_path / "images")


def test_pairs_are_found_in_folders_too(folders, caplog):
    labels, images = folders
    records = load_sem_seg(labels, images)
    assert [record["image_id"] for record in records] == ["a", "sub/b"]
    assert records[1] == {
        "file_name": f"{images}/sub/b.jpg",
        "image_id": "sub/b",
        "sem_seg_file_name": f"{labels}/sub/b.png",
    }
    assert f"no label map in {labels}: c" in caplog.text
    assert f"no image in {images}: d" in caplog.text


def test_pairs_come_in_the_order_of_their_names(tmp_path):
    names = [f"{(37 * i) % 50:02d}" for i in range(50)]
    for folder, ending in (("labels", "png"), ("images", "jpg")):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.{ending}").touch()
    records = load_sem_seg(str(tmp_path / "labels"), str(tmp_path / "images"))
    assert [record["image_id"] for record in records] == sorted(names)


def test_no_pair_is_an_error_with_both_folders(folders):
    labels, images = folders
    with pytest.raises(
        ValueError,
        match=r"no image .tif in .*images \(0 of them\) has a label map .png .* \(3 of them\)",
    ):
        load_sem_seg(labels, images, image_ext="tif")


def test_hidden_files_are_left_out_and_endings_may_be_capital(folders, caplog):
    labels, images = folders
    for root, ending in ((labels, "png"), (images, "jpg")):
        for name in (f"._a.{ending}", f".ipynb_checkpoints/a.{ending}", f"E.{ending.upper()}"):
            path = Path(root) / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
    with caplog.at_level("INFO", logger="detkit"):
        records = load_sem_seg(labels, images)
    assert [r["image_id"] for r in records] == ["E", "a", "sub/b"]
    assert records[0]["file_name"].endswith("E.JPG")
    assert "2 that are hidden: ._a.png, .ipynb_checkpoints/" in caplog.text


def test_absent_folder_is_named(folders):
    with pytest.raises(FileNotFoundError, match="folder nowhere of label maps does not exist"):
        load_sem_seg("nowhere", folders[1])


def test_registered_data_set_loads(folders):
    labels, images = folders
    register_sem_seg("roads", {"stuff_classes": ["road", "rest"]}, images, labels)
    assert len(DatasetCatalog.get("roads")) == 2
    metadata = MetadataCatalog.get("roads")
    assert (metadata.evaluator_type, metadata.ignore_label) == ("sem_seg", 255)
