"""Data sets in tables: CSV with a box per row, and Open Images.

Format: https://storage.googleapis.com/openimages/web/download_v7.html
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from detkit.data.datasets.faults import collect
from detkit.data.datasets.formats.collected import (
    Collected,
    image_file_of,
    image_sizes,
    numbers_of,
    require_shares,
)
from detkit.structures import as_flag
from detkit.utils.errors import DataError
from detkit.utils.file_io import read_text
from detkit.utils.text import did_you_mean

# What a column means -> its usual names, in small letters and without `_`. `width` and `height` are
# those of the box only where there is no xmax.
_USUAL = {
    "image": ("image", "filename", "imagepath", "imagename", "path", "file", "imageid"),
    "label": ("label", "class", "classname", "labelname", "category", "name"),
    "xmin": ("xmin", "x1", "left", "x", "bboxx"),
    "ymin": ("ymin", "y1", "top", "y", "bboxy"),
    "xmax": ("xmax", "x2", "right"),
    "ymax": ("ymax", "y2", "bottom"),
    "width": ("width", "w", "bboxwidth", "bboxw"),
    "height": ("height", "h", "bboxheight", "bboxh"),
    "crowd": ("isgroupof", "iscrowd"),
    "difficult": ("difficult",),
}
COLUMNS = tuple(_USUAL)
_FLAGS = {"crowd": "iscrowd", "difficult": "difficult"}
_REQUIRED = ("image", "label", "xmin", "ymin")


def read_csv(
    annotations: str,
    images: str,
    *,
    columns: Mapping[str, str] | Sequence[str] | None = None,
    normalized: bool = False,
    descriptions: str | None = None,
) -> Collected:
    """Read a table with a box per row; a row without box lists an image without object.

    Args:
        annotations: The file, separated by commas, semicolons or tabs.
        images: Folder that the names of images are relative to; their ending may be missing.
        columns: Meaning (a key of `COLUMNS`) -> name of the column; or, for a file without a line
            of names, the meanings in the order of the columns, "" for one to ignore. None takes
            usual names.
        normalized: Whether coordinates are shares of the image's sides.
        descriptions: Table of two columns without names: class, and what to call it.

    Raises:
        MissingFileError: A file does not exist.
        DataError: A column is missing, or a row, named by file and line, has no usable box.
    """
    rows = _rows(annotations)
    if isinstance(columns, Mapping) or columns is None:
        line, header = next(rows, (1, []))
        meaning = _meaning(header, columns or {}, f"{annotations}:{line}")
    else:
        meaning = {key: k for k, key in enumerate(columns) if key}
    corners = ("xmax", "ymax") if "xmax" in meaning else ("width", "height")
    missing = [key for key in (*_REQUIRED, *corners) if key not in meaning]
    if missing:
        raise DataError(
            f"{annotations} has no column for {', '.join(missing)}; name it in `columns`, as"
            f" {{{missing[0]}: NAME}}"
        )
    named = {} if descriptions is None else _descriptions(descriptions)
    found = Collected(annotations, images)
    listed: dict[str, list[tuple[int, list[str]]]] = {}
    for line, row in rows:
        if len(row) <= max(meaning.values()):
            raise DataError(
                f"{annotations}:{line} has {len(row)} columns, need {max(meaning.values()) + 1}"
            )
        listed.setdefault(row[meaning["image"]].strip(), []).append((line, row))
    names = [image_file_of(name, images) for name in listed]
    sizes = image_sizes([str(PurePath(images) / name) for name in names], annotations)
    for name, size, lines in zip(names, sizes, listed.values(), strict=True):
        image = found.add_image(name, size)
        for line, row in lines:
            where = f"{annotations}:{line}"
            cells = {key: row[k].strip() for key, k in meaning.items()}
            texts = [cells[key] for key in ("xmin", "ymin", *corners)]
            if not any(texts) or size is None:
                continue
            cells["label"] = named.get(cells["label"], cells["label"])
            scale = size if normalized else None
            try:
                _add_row(found, image, cells, numbers_of(texts, where), corners[0], scale, where)
            except DataError as error:
                path = str(PurePath(images) / name)
                collect(error, "broken-row", file=path, annotation=f"line {line}")
    return found


def _add_row(
    found: Collected,
    image: int,
    cells: Mapping[str, str],
    numbers: Sequence[float],
    third: str,
    scale: tuple[int, int] | None,
    where: str,
) -> None:
    """Add the object of a row, whose third number is `xmax` or `width`."""
    if not cells["label"]:
        raise DataError(f"{where} has a box without a class")
    x0, y0, x1, y1 = numbers
    if third == "width":
        x1, y1 = x0 + x1, y0 + y1
    if scale is not None:
        require_shares((x0, y0, x1, y1), where)
        height, width = scale
        x0, y0, x1, y1 = x0 * width, y0 * height, x1 * width, y1 * height
    try:
        flags: dict[str, Any] = {_FLAGS[k]: as_flag(cells[k]) for k in _FLAGS if cells.get(k)}
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    found.add_object(image, cells["label"], where, box=(x0, y0, x1, y1), **flags)


def read_open_images(
    annotations: str, images: str, *, descriptions: str | None = None
) -> Collected:
    """Read a table of Open Images, `*-annotations-bbox.csv`; groups are crowds.

    Args:
        annotations: The file.
        images: Folder of `IMAGEID.jpg`.
        descriptions: `class-descriptions*.csv`; without it, classes have names such as `/m/01yrx`.
    """
    columns = {"image": "ImageID", "label": "LabelName", "crowd": "IsGroupOf"}
    columns |= {"xmin": "XMin", "ymin": "YMin", "xmax": "XMax", "ymax": "YMax"}
    return read_csv(
        annotations, images, columns=columns, normalized=True, descriptions=descriptions
    )


def _rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not empty, with the number of their last line."""
    text = read_text(path, "annotation file")
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count))
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num} cannot be read: {error}") from error


def _meaning(header: Sequence[str], columns: Mapping[str, str], where: str) -> dict[str, int]:
    """Return the index of each column that means something."""
    header = [name.strip() for name in header]
    for key, name in columns.items():
        if name not in header and key in (*_REQUIRED, "xmax", "ymax"):
            raise DataError(
                f"{where} has no column {name!r} ({key}).{did_you_mean(name, header)} Columns:"
                f" {', '.join(header)}"
            )
    plain = [name.lower().replace("_", "").replace(" ", "") for name in header]
    meaning = {
        key: next(plain.index(name) for name in usual if name in plain)
        for key, usual in _USUAL.items()
        if any(name in plain for name in usual)
    }
    return meaning | {key: header.index(name) for key, name in columns.items() if name in header}


def _descriptions(path: str) -> dict[str, str]:
    named = {}
    for line, row in _rows(path):
        if len(row) != 2:
            raise DataError(f"{path}:{line} has {len(row)} columns, need 2: class and name")
        named[row[0].strip()] = row[1].strip()
    return named
