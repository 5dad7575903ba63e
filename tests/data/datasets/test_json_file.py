import json
import os

import pytest

from detkit.data.datasets.json_file import (
    DataFolder,
    by_id,
    read_json,
    section,
)
from detkit.utils.errors import DataError


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none\.json does not exist"):
        read_json(str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff\xfe{}", b"not json", b"[" * 100_000, b"1" * 5000]
)
def test_invalid_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(str(tmp_path / "a.json"))


def test_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(DataError, match=r"annotation file .*a\.json is not a regular file"):
        read_json(str(tmp_path / "a.json"))


def test_results_file_is_recognised(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"image_id": 1, "score": 0.5}]))
    with pytest.raises(ValueError, match=r"it holds a list\. A list is COCO's format for results"):
        read_json(str(tmp_path / "a.json"))


def test_content_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"images": [{"id": 1}]}')
    assert section(read_json(str(tmp_path / "a.json")), "images", "a.json") == [{"id": 1}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            {"imags": []},
            r"a\.json has no 'images', only \['imags'\]\. Did you mean 'imags'",
            id="absent",
        ),
        pytest.param(
            {"images": {}},
            r"'images' of annotation file a\.json must be a list of objects",
            id="no list",
        ),
        pytest.param(
            {"images": [1]},
            r"'images' of annotation file a\.json must be a list of objects",
            id="no objects",
        ),
    ],
)
def test_section_that_is_none_is_an_error(content, message):
    with pytest.raises(ValueError, match=message):
        section(content, "images", "a.json")


@pytest.mark.parametrize("ids", [[3, 1], ["b", "a"], []], ids=["numbers", "text", "none"])
def test_entries_come_by_their_id(ids):
    assert by_id([{"id": i} for i in ids], "image", "a.json") == {i: {"id": i} for i in ids}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        pytest.param(
            [{"id": 1}, {"name": "x"}],
            r"image number 1 \(from 0\) of a\.json has no id: \{'name'",
            id="none",
        ),
        pytest.param(
            [{"id": 1}, {"id": "1"}],
            "image ids that are all integers, or all text: {'id': '1'}",
            id="mixed",
        ),
        pytest.param(
            [{"id": True}], "image ids that are all integers, or all text", id="truth value"
        ),
        pytest.param(
            [{"id": 1}, {"id": 1}], r"a\.json uses image ids more than once: 1$", id="twice"
        ),
    ],
)
def test_entries_without_an_id_of_their_own_are_refused(entries, message):
    with pytest.raises(ValueError, match=message):
        by_id(entries, "image", "a.json")


@pytest.mark.parametrize(
    ("root", "name", "path"),
    [
        pytest.param("images", "a/b.jpg", "images/a/b.jpg", id="plain"),
        pytest.param("images", "a/../b.jpg", "images/a/../b.jpg", id="up and down within"),
        pytest.param("images", "a..b:c.jpg", "images/a..b:c.jpg", id="odd"),
        pytest.param("", "b.jpg", "b.jpg", id="here"),
        pytest.param("/data", "/data/b.jpg", "/data/b.jpg", id="absolute below"),
        pytest.param("/", "/any/b.jpg", "/any/b.jpg", id="anywhere"),
        pytest.param("s3://bucket/images", "b.jpg", "s3://bucket/images/b.jpg", id="address"),
    ],
)
def test_name_in_the_folder_gives_its_path(root, name, path):
    assert DataFolder(root, "a.json").path_of(name) == path


@pytest.mark.parametrize(
    ("root", "name"),
    [
        pytest.param("images", "../b.jpg", id="up"),
        pytest.param("images", "a/../../b.jpg", id="down and up"),
        pytest.param("images", "/etc/passwd", id="absolute"),
        pytest.param("/data", "/database/b.jpg", id="sibling with the same start"),
        pytest.param("", "../b.jpg", id="up from here"),
        pytest.param(".", "/b.jpg", id="absolute from here"),
        pytest.param("/", "a\0.jpg", id="null byte"),
    ],
)
def test_name_that_leads_out_is_refused_with_file_and_folder(root, name):
    with pytest.raises(
        ValueError, match=r"a\.json names the image .*, which lies outside of the image folder"
    ) as error:
        DataFolder(root, "a.json").path_of(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_windows_are_read(tmp_path, encoding):
    (tmp_path / "a.json").write_bytes('{"name": "żółw"}'.encode(encoding))
    assert read_json(str(tmp_path / "a.json")) == {"name": "żółw"}


def test_ids_whose_hashes_are_equal_are_refused_at_once():
    entries = [{"id": number * (2**61 - 1)} for number in range(200_000)]
    with pytest.raises(
        ValueError, match=r"a\.json has the image id 11529215046068469755, .* 64 bits"
    ):
        by_id(entries, "image", "a.json")


def test_ids_of_64_bits_are_read():
    assert len(by_id([{"id": 2**63 - 1}, {"id": -(2**63)}, {"id": 0}], "image", "a.json")) == 3
