"""What is said of files before a run: missing, damaged, of another size, with unknown labels."""

import numpy as np
import pytest
from PIL import Image

from detkit.data.record_files import check_images, check_label_maps, require_files, spread
from detkit.utils.errors import DataError, MissingFileError


def record(path, **more):
    return {"file_name": str(path), "image_id": 0, **more}


def test_missing_files_are_counted_and_named(write_image, tmp_path):
    there = write_image("images/a.jpg")
    records = [record(there), record(tmp_path / "images/b.jpg"), record(tmp_path / "no/c.jpg")]
    with pytest.raises(MissingFileError, match=r"2 of 3 images of data set 'x' .*b.jpg, .*c.jpg$"):
        require_files("x", records)
    require_files("x", records[:1])
    require_files("x", [record("s3://bucket/a.jpg")])


@pytest.mark.parametrize("key", ["sem_seg_file_name", "pan_seg_file_name"])
def test_missing_ground_truth_is_found(write_image, key, tmp_path):
    records = [record(write_image(), **{key: str(tmp_path / "none.png")})]
    with pytest.raises(MissingFileError, match="1 of 1 (label maps|panoptic png) of data set 'x'"):
        require_files("x", records)


def test_backslashes_are_pointed_out(tmp_path):
    with pytest.raises(MissingFileError, match="names have backslashes, as Windows writes paths"):
        require_files("x", [record(tmp_path / "images\\a.jpg")])


def test_images_that_cannot_be_used_are_named(write_image, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    wide = write_image("wide.jpg", height=24, width=32)
    records = [record(tmp_path / "empty.jpg"), record(wide, height=32, width=24), record(wide)]
    with pytest.raises(DataError, match=r"2 of 3 images .*empty.jpg is empty.*sides are exchanged"):
        check_images("x", records)
    check_images("x", [record(wide, height=24, width=32)])


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.tif"])
def test_image_that_is_not_whole_is_named(name, tmp_path):
    path = tmp_path / name
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    check_images("x", [record(path)])
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(DataError, match=f"1 of 1 images .*{name} is damaged or truncated"):
        check_images("x", [record(path)])


def test_bytes_behind_the_end_of_an_image_do_not_matter(write_image):
    path = write_image("a.jpg")
    with open(path, "ab") as file:
        file.write(b"a comment of the camera")
    check_images("x", [record(path)])


def test_image_of_more_pixels_than_allowed_is_named(write_image):
    with pytest.raises(DataError, match=r"more than the 100 pixels that INPUT.MAX_IMAGE_PIXELS"):
        check_images("x", [record(write_image("a.jpg"))], max_pixels=100)


@pytest.fixture
def labelled(write_image, tmp_path):
    def write(*values, shape=(24, 32)):
        labels = np.resize(np.array(values, dtype=np.uint8), shape)
        Image.fromarray(labels).save(tmp_path / "labels.png")
        return [record(write_image(), sem_seg_file_name=str(tmp_path / "labels.png"))]

    return write


def check(records, num_classes=2, ignore_label=255):
    check_label_maps("x", records, num_classes, ignore_label, 10_000)


def test_known_labels_pass(labelled, caplog):
    check(labelled(0, 1, 255))
    check(labelled(0, 255), num_classes=1)
    check(labelled(0, 255), ignore_label=0, num_classes=256)
    assert not caplog.text


def test_unknown_labels_are_named_with_the_remedy(labelled):
    with pytest.raises(
        DataError, match=r"the values 2, 7 \(first in .*labels.png\).*number the cl"
    ):
        check(labelled(0, 2, 7, 255))


def test_label_maps_of_0_and_255_are_pointed_out(labelled, caplog):
    check(labelled(0, 255))
    assert "hold 0 and 255 alone, and 255 is its ignore_label" in caplog.text


def test_label_map_of_another_size_is_refused(labelled):
    with pytest.raises(DataError, match=r"labels.png is \(12, 16\), its image .* \(24, 32\)"):
        check(labelled(0, 1, shape=(12, 16)))


@pytest.mark.parametrize(
    ("count", "limit"), [(0, 5), (4, 5), (5, 5), (6, 5), (1000, 50), (1001, 50)]
)
def test_few_are_spread_over_all(count, limit):
    chosen = list(spread(range(count), limit))
    assert len(chosen) <= limit
    assert chosen == sorted(set(chosen))
    assert len(chosen) == count or chosen[-1] >= count * 0.6
