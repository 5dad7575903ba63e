"""Data sets in the form of Hugging Face: a folder of images with metadata, or parquet files.

    ROOT/metadata.jsonl     a line per image: {"file_name": "1.jpg", "objects": {"bbox": [[x, y,
                            width, height], ...], "categories": [0, ...]}}
    ROOT/*.parquet          the same, with the bytes of the images in a column `image`

Format: https://huggingface.co/docs/datasets/image_dataset
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from detkit.data.datasets.faults import collect
from detkit.data.datasets.formats.collected import Collected, image_sizes, numbers_of
from detkit.data.datasets.json_file import as_number
from detkit.utils.download import cache_root
from detkit.utils.errors import ConfigError, DataError, MissingFileError
from detkit.utils.file_io import read_text
from detkit.utils.text import shortened

METADATA = "metadata.jsonl"
_LABELS = ("categories", "category", "labels", "label")


def read_hugging_face(
    root: str, *, split: str | None = None, classes: Sequence[str] | None = None
) -> Collected:
    """Read a folder with `metadata.jsonl`, or one of parquet files.

    Args:
        root: The folder.
        split: A folder in it, or how the names of its parquet files begin.
        classes: Class names, where the files have numbers and do not name them.

    Raises:
        MissingFileError: The folder has no metadata, or images are missing.
        DataError: A line, named by file and line, or a row, cannot be used.
        ConfigError: The files are parquet, and pyarrow is not installed; or they have numbers for
            classes, and no names.
    """
    folder = Path(root)
    if split is not None and (folder / split).is_dir():
        folder = folder / split
    file = folder / METADATA
    rows: list[tuple[str, dict[str, Any]]]
    if file.is_file():
        rows, named = list(_lines(str(file))), None
    else:
        pattern = "*.parquet" if split is None or folder.name == split else f"{split}*.parquet"
        files = sorted({*folder.glob(pattern), *(folder / "data").glob(pattern)})
        if not files:
            raise MissingFileError(f"folder {folder} holds neither {METADATA} nor {pattern}")
        rows, named = _parquet_rows(files)
        folder = Path("/")
    found = Collected(str(folder if file.is_file() else root), str(folder))
    # `classes` may select some of the names in the files.
    numbered = classes if named is None and _has_numbers(rows) else named
    found.names = list(numbered or ()) or None
    paths = [os.path.join(folder, row["file_name"]) for _, row in rows]
    for (where, row), size in zip(rows, image_sizes(paths, found.source), strict=True):
        image = found.add_image(row["file_name"], size)
        try:
            for box, label in _objects(row.get("objects"), where):
                x, y, width, height = numbers_of(box, where)
                corners = (x, y, x + width, y + height)
                found.add_object(image, _label(label, found.names, where), where, box=corners)
        except DataError as error:
            collect(error, "broken-row", file=os.path.join(folder, row["file_name"]))
    return found


def _lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path, "metadata").split("\n"), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{where} has no file_name: {shortened(row)}")
        yield where, row


def _objects(objects: Any, where: str) -> list[tuple[list[Any], Any]]:
    """Return box and class of the objects of a row, which are a table or a list."""
    if isinstance(objects, Mapping):
        columns = {key: value for key, value in objects.items() if isinstance(value, list)}
        sizes = {len(columns.get(key, ())) for key in ("bbox", *_LABELS) if key in objects}
        if len(sizes) > 1:
            raise DataError(f"{where} needs as many boxes as classes: {shortened(objects)}")
        count = sizes.pop() if sizes else 0
        objects = [
            {key: v[k] for key, v in columns.items() if len(v) == count} for k in range(count)
        ]
    if objects is None:
        return []
    pairs = []
    for entry in objects if isinstance(objects, list) else [objects]:
        key = next((k for k in _LABELS if isinstance(entry, Mapping) and k in entry), None)
        box = None if key is None else entry.get("bbox")
        if key is None or not isinstance(box, list) or len(box) != 4:
            raise DataError(
                f"{where} needs objects with a bbox [x, y, width, height] and categories, has"
                f" {shortened(entry, 80)}"
            )
        pairs.append((box, entry[key]))
    return pairs


def _has_numbers(rows: Sequence[tuple[str, dict[str, Any]]]) -> bool:
    for where, row in rows:
        with contextlib.suppress(DataError):  # told when the row is read
            for _, label in _objects(row.get("objects"), where):
                return isinstance(label, int)
    return False


def _label(label: Any, names: Sequence[str] | None, where: str) -> str:
    if isinstance(label, str):
        return label
    number = as_number(label)
    if names is None:
        raise ConfigError(
            f"{where} has numbers for classes, {label!r}, and their names are nowhere: give"
            " `classes: [...]` in the entry under DATASETS.REGISTER"
        )
    if not isinstance(number, int) or not 0 <= number < len(names):
        raise DataError(f"{where} has class {label!r}, need 0 to {len(names) - 1}")
    return names[number]


def _parquet_rows(
    files: Sequence[Path],
) -> tuple[list[tuple[str, dict[str, Any]]], list[str] | None]:
    """Return the rows, with images as files in the cache, and the class names in the schema."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{files[0]} needs pyarrow: pip install pyarrow") from error
    rows, named = [], None
    for file in files:
        state = file.stat()
        key = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
        cache = cache_root() / "parquet" / hashlib.sha256(key.encode()).hexdigest()[:16]
        cache.mkdir(parents=True, exist_ok=True)
        try:
            table = parquet.ParquetFile(file)
            metadata = table.schema_arrow.metadata or {}
            named = named or _class_names(json.loads(metadata.get(b"huggingface", b"{}")))
            # In batches: the images of a file fill gigabytes.
            for batch in table.iter_batches(batch_size=64):
                for row in batch.to_pylist():
                    number = len(rows)
                    where = f"row {number} of {file}"
                    image = row.pop("image", None)
                    data = image.get("bytes") if isinstance(image, dict) else None
                    if not data:
                        raise DataError(f"{where} has no image with bytes")
                    ending = Path(image.get("path") or "x.jpg").suffix
                    path = cache / f"{number}{ending}"
                    if not path.is_file() or path.stat().st_size != len(data):
                        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
                        partial.write_bytes(data)
                        partial.replace(path)
                    rows.append((where, {**row, "file_name": str(path)}))
        except (ValueError, OSError) as error:  # pyarrow's errors are kinds of these
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} cannot be read: {error}") from error
    return rows, named


def _class_names(features: Any) -> list[str] | None:
    """Return the names of the first ClassLabel in the description of the columns."""
    if not isinstance(features, dict | list):
        return None
    if isinstance(features, dict) and features.get("_type") == "ClassLabel":
        return features.get("names")
    parts = features.values() if isinstance(features, dict) else features
    return next((names for part in parts if (names := _class_names(part))), None)
