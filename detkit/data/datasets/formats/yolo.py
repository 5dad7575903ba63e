"""Data sets in the format of YOLO: one text file of rows per image, and a data.yaml.

    images/train/IMAGE.jpg      or train/images/IMAGE.jpg
    labels/train/IMAGE.txt      or train/labels/IMAGE.txt
    data.yaml                   path, train, val, test, names; kpt_shape for keypoints

A row is `class x y width height` (x and y of the middle), all as shares of the image's sides; or
`class x1 y1 x2 y2 ...`, the corners of an object or of an oriented box; or, with `kpt_shape`, box
and keypoints. An image without text file has no object.

Format: https://docs.ultralytics.com/datasets
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import yaml

from detkit.config.yaml_loader import yaml_fault
from detkit.data.datasets.faults import collect
from detkit.data.datasets.formats.collected import (
    Collected,
    image_sizes,
    images_in,
    numbers_of,
    require_shares,
)
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.file_io import dataset_root, read_file, read_text
from detkit.utils.image_file import IMAGE_SUFFIXES
from detkit.utils.text import did_you_mean, listed

_MAX_SIZE = 1 << 24  # characters of a data.yaml, and 16 for each value
SPLITS = ("train", "val", "test")


def read_yolo(data: str, split: str) -> Collected:
    """Read one split of a data.yaml.

    Args:
        data: The file.
        split: One of its keys: `train`, `val` or `test`.

    Raises:
        MissingFileError: A file or folder is not there; the message says where it was looked for.
        DataError: The file is not what the format asks for, or a row, named by file and line.
    """
    content = read_data_yaml(data)
    if not content.get(split):
        known = splits_of(content, data)
        hint = did_you_mean(split, known)
        raise DataError(f"{data} has no split {split!r}, only {', '.join(known)}.{hint}")
    values = content[split] if isinstance(content[split], list) else [content[split]]
    places = [_located(str(value), data, content) for value in values]
    images = [image for place in places for image in _images_of(place)]
    shape = _keypoint_shape(content, data)
    found = _read(images, data, _names(content, data), shape)
    named = content.get("kpt_names")
    if shape is not None and isinstance(named, Mapping) and named:
        found.keypoints = [str(name) for name in next(iter(named.values()))]
        if len(found.keypoints) != shape[0]:
            raise DataError(f"{data} has {len(found.keypoints)} kpt_names, kpt_shape {shape}")
    return found


def read_yolo_folders(
    images: str, classes: Sequence[str], annotations: str | None = None
) -> Collected:
    """Read a folder of images and one of text files, without a data.yaml.

    Args:
        images: The folder, with all folders in it.
        classes: Names in the order of the numbers in the files.
        annotations: The folder of text files, by default that of the images with `labels` for
            `images` in its path.
    """
    files = [os.path.join(images, name) for name in images_in(images)]
    label_files = None
    if annotations is not None:
        below = (Path(os.path.relpath(file, images)).with_suffix(".txt") for file in files)
        label_files = [os.path.join(annotations, name) for name in below]
    return _read(files, images, list(classes), label_files=label_files)


def read_data_yaml(data: str) -> dict[str, Any]:
    """Return the content of a data.yaml."""
    text = read_file(data, "data file")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _require_modest(root, data)
        content = None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML reads the text of a date, a number or a tag such as !!bool without checks.
        fault = yaml_fault(error, text.decode(errors="replace"))
        raise DataError(f"data file {data} is not valid YAML: {fault}") from error
    if not isinstance(content, dict):
        raise DataError(f"data file {data} must hold names, train and val, got {content!r:.80}")
    return content


def _require_modest(root: yaml.Node | None, data: str) -> None:
    """Raise a DataError for aliases of aliases, by which a small file holds billions of values."""
    left, size = [] if root is None else [root], 0
    while left:
        node = left.pop()
        if isinstance(node, yaml.MappingNode):
            left += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
        size += 16 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        if size > _MAX_SIZE:
            raise DataError(f"data file {data} is too large, with its aliases written out")


def splits_of(content: Mapping[str, Any], data: str) -> list[str]:
    """Return the names of the splits in a data.yaml."""
    others = [k for k, v in content.items() if isinstance(v, str) and k not in (*SPLITS, "path")]
    others = [key for key in others if (Path(data).parent / content[key]).exists()]
    return [split for split in (*SPLITS, *others) if content.get(split)]


def _names(content: Mapping[str, Any], data: str) -> list[str]:
    names = content.get("names")
    if isinstance(names, Mapping):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise DataError(
                f"names of {data} must count from 0 without gaps, got {list(names)!r:.200}"
            )
        by_number = {int(key): name for key, name in names.items()}
        names = [by_number[k] for k in range(len(by_number))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{data} needs names, a list of class names, got {names!r:.200}")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int):
            # YAML reads yes, no, on and off as booleans.
            raise DataError(f"names of {data} must be text, got {name!r:.200}; put it in quotes")
    names = [str(name) for name in names]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"names of {data} repeats {', '.join(repeated)}")
    if content.get("nc", len(names)) != len(names):
        raise DataError(f"{data} has nc: {content['nc']}, but {len(names)} names")
    return names


def _keypoint_shape(content: Mapping[str, Any], data: str) -> tuple[int, int] | None:
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    if not isinstance(shape, list) or len(shape) != 2 or shape[1] not in (2, 3):
        raise DataError(f"kpt_shape of {data} must be [keypoints, 2 or 3], got {shape!r:.200}")
    return int(shape[0]), int(shape[1])


def _located(value: str, data: str, content: Mapping[str, Any]) -> str:
    """Return a folder or list of a data.yaml; tools disagree on what it is relative to."""
    folder = Path(data).parent
    root = str(content.get("path") or "")
    roots = dict.fromkeys([folder / root, dataset_root() / root, folder])
    # Roboflow writes ../train/images for the folder train/images beside the file.
    inner = value
    while inner.startswith("../"):
        inner = inner[3:]
    tried = [base / name for name in dict.fromkeys([value, inner]) for base in roots]
    for path in tried:
        if path.exists():
            return os.path.normpath(path)
    raise MissingFileError(
        f"{data} names {value}, which does not exist; looked for"
        f" {listed(list(dict.fromkeys(map(str, tried))))}"
    )


def _images_of(place: str) -> list[str]:
    """Return the images in a folder, or those that a text file lists."""
    if Path(place).is_dir():
        return [os.path.join(place, name) for name in images_in(place)]
    if not place.endswith(".txt"):
        raise DataError(f"{place} must be a folder of images, or a .txt file that lists them")
    images = []
    parents = Path(place).parents
    for number, line in enumerate(read_text(place).splitlines(), start=1):
        name = line.strip().replace("\\", "/")
        if not name:
            continue
        if PurePath(name).suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                f"{place}:{number} has {name!r}, need a file that ends in"
                f" {', '.join(IMAGE_SUFFIXES)}"
            )
        # Relative to the list, to a folder above it, or to where the tool was started.
        found = [parent / name for parent in parents if (parent / name).exists()]
        images.append(os.path.normpath(found[0] if found else parents[0] / name))
    return images


def label_file(image: str) -> str:
    """Return the text file of an image: in `labels` where its path has `images`, or beside it."""
    parts = list(PurePath(image).parts)
    for k in range(len(parts) - 2, -1, -1):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return str(PurePath(*parts).with_suffix(".txt"))


def _read(
    images: Sequence[str],
    source: str,
    names: list[str],
    shape: tuple[int, int] | None = None,
    label_files: Sequence[str] | None = None,
) -> Collected:
    images = [os.path.abspath(image) for image in images]  # noqa: PTH100 - keeps links
    labels = [label_file(image) for image in images] if label_files is None else label_files
    if images and not any(Path(path).is_file() for path in labels):
        raise MissingFileError(
            f"none of the {len(images)} images of {source} has a text file; looked for {labels[0]},"
            " ..."
        )
    # A data.yaml and its lists may name files anywhere.
    found = Collected(source, "/")
    found.names = names
    if shape is not None:
        found.keypoints = [f"keypoint_{k}" for k in range(shape[0])]
    sizes = image_sizes(images, source)
    for image, size, path in zip(images, sizes, labels, strict=True):
        number = found.add_image(image, size)
        if size is None or not Path(path).is_file():
            continue
        for line, row in enumerate(read_text(path).splitlines(), start=1):
            if not row.strip():
                continue
            try:
                _add_row(found, number, row.split(), size, shape, f"{path}:{line}")
            except DataError as error:
                collect(error, "broken-row", file=image, annotation=f"line {line}")
    return found


def _add_row(
    found: Collected,
    image: int,
    words: Sequence[str],
    size: tuple[int, int],
    shape: tuple[int, int] | None,
    where: str,
) -> None:
    class_id, *shares = numbers_of(words, where)
    names = found.names or []
    if not class_id.is_integer() or not 0 <= class_id < len(names):
        raise DataError(f"{where} has class {words[0]}, need 0 to {len(names) - 1}")
    label, further = names[int(class_id)], {}
    height, width = size
    if shape is not None and len(shares) > 4:
        count, values = shape
        if len(shares) != 4 + count * values:
            raise DataError(
                f"{where} has {len(words)} numbers, need {5 + count * values}: class, box and"
                f" {count} keypoints of {values} (kpt_shape)"
            )
        points = [shares[k : k + values] for k in range(4, len(shares), values)]
        further["keypoints"] = []
        for x, y, *rest in points:
            # Without visibility, (0, 0) stands for a keypoint without label.
            visibility = int(rest[0]) if rest else 2 * int((x, y) != (0, 0))
            further["keypoints"] += [x * width, y * height, visibility]
        require_shares([v for point in points for v in point[:2]], where)
        shares = shares[:4]
    require_shares(shares, where)
    if len(shares) == 4:
        x, y, w, h = shares
        corners = [(x - w / 2) * width, (y - h / 2) * height]
        corners += [(x + w / 2) * width, (y + h / 2) * height]
        found.add_object(image, label, where, box=corners, **further)
        return
    if len(shares) < 6 or len(shares) % 2:
        hint = ". Is the last one the score of a prediction?" if len(shares) == 5 else ""
        raise DataError(
            f"{where} has {len(words)} numbers, need 5 (class, x, y, width, height), or the class"
            f" and x and y of at least three corners{hint}"
        )
    polygon = [v * (height if k % 2 else width) for k, v in enumerate(shares)]
    found.add_object(image, label, where, polygons=[polygon])
