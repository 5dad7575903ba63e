import json

import pytest

from detkit.data.datasets.formats.hugging_face import read_hugging_face
from detkit.utils.errors import ConfigError, DataError, MissingFileError

BOX = {"bbox": [[1, 2, 3, 4]], "categories": [0]}


def _read(root, *lines, **options):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (root / "images" / "metadata.jsonl").write_text(text)
    return read_hugging_face(str(root / "images"), **options)


def test_objects_as_a_list_with_names(toy, tmp_path):
    objects = [{"bbox": [1, 2, 3, 4], "category": "dog"}]
    record, other = _read(
        tmp_path, {"file_name": "a.png", "objects": objects}, {"file_name": "b.png"}
    ).records()
    assert record["annotations"][0]["bbox"] == [1, 2, 3, 4]
    assert (other["annotations"], other["height"], other["width"]) == ([], 17, 40)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pytest.param("{", ":2 is not valid JSON", id="json"),
        pytest.param({"objects": BOX}, ":2 has no file_name", id="file_name"),
        pytest.param({"file_name": "a.png", "objects": {**BOX, "categories": [5]}}, ":2 has class 5", id="class"),
        pytest.param({"file_name": "a.png", "objects": {**BOX, "categories": []}}, ":2 needs as many", id="count"),
        pytest.param({"file_name": "a.png", "objects": {**BOX, "bbox": [[1]]}}, ":2 needs objects", id="box"),
        pytest.param({"file_name": "a.png", "objects": {**BOX, "bbox": [[1, 2, 3, "x"]]}}, ":2 has 'x'", id="text"),
    ],
)  # fmt: skip
def test_wrong_line_is_named(line, message, toy, tmp_path):
    with pytest.raises(DataError, match=f"metadata.jsonl{message}"):
        _read(tmp_path, {"file_name": "b.png", "objects": BOX}, line, classes=["cat"]).records()


def test_numbers_without_names(toy, tmp_path):
    with pytest.raises(ConfigError, match=r"metadata.jsonl:1 has numbers for classes.*`classes"):
        _read(tmp_path, {"file_name": "a.png", "objects": BOX})


def test_folder_with_neither(tmp_path):
    with pytest.raises(MissingFileError, match=r"neither metadata.jsonl nor \*.parquet"):
        read_hugging_face(str(tmp_path))


def test_parquet_with_images_and_names(toy, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    rows = [
        {
            "image": {"bytes": (tmp_path / "images" / f"{name}.png").read_bytes(), "path": "x.png"},
            "objects": {
                "bbox": [[float(x0), y0, x1 - x0, y1 - y0] for _, (x0, y0, x1, y1) in objects],
                "category": [["cat", "dog"].index(label) for label, _ in objects],
            },
        }
        for name, (_, _, objects) in toy.items()
    ]
    label = {"feature": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    features = {"info": {"features": {"objects": {"category": label}}}}
    table = pyarrow.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    found = read_hugging_face(str(tmp_path), split="train")
    assert found.names == ["cat", "dog"]
    sizes = [(r["height"], r["width"], len(r["annotations"])) for r in found.records()]
    assert sizes == [(h, w, len(objects)) for h, w, objects in toy.values()]
    assert found.records()[0]["annotations"][0]["bbox"] == [2, 3, 10, 12]


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match=r"a.parquet cannot be read"):
        read_hugging_face(str(tmp_path))
