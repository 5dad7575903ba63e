"""Damaged copies of whole files, and what must come of reading them: the file's content, or an error meant for users.

Which errors those are is part of the readers' docstrings; `KINDS` has them by kind of file.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.checkpoint import CheckpointError, load_checkpoint_file
from detkit.cli.errors import is_written_for_users
from detkit.config import CfgNode, get_cfg
from detkit.config.cfg_node import ConfigKeyError
from detkit.data import DatasetCatalog, get_detection_dataset_dicts
from detkit.data.datasets import load_coco_json, load_voc_folders
from detkit.structures import ImageRecord
from detkit.utils.image import read_image
from detkit.utils.image_file import BadImageError

SECONDS_PER_CASE = 5.0
_RUNS_CODE = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "os.remove",
)
_watched: list[str] | None = None


class OutOfTime(BaseException):
    """A case took too long. Not an Exception, which readers may catch."""


@dataclass(frozen=True)
class Kind:
    """A kind of file: its seeds, how one is read, the errors that may come, and bytes that tend to do harm in it."""

    suffix: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], Sized]
    errors: tuple[type[Exception], ...]
    words: tuple[bytes, ...]


def fuzz(kind: Kind, count: int, folder: Path, seed: int = 0) -> Counter[str]:
    """Read so many damaged files, and give how many were read and how many refused with which error.

    Raises:
        AssertionError: An error that is not documented, code that ran, or a case that took too long. The file is kept.
    """
    draw = random.Random(seed)
    seeds = kind.seeds()
    outcomes: Counter[str] = Counter()
    for number in range(count):
        path = folder / f"case{kind.suffix}"
        path.write_bytes(damaged(draw.choice(seeds), kind.words, draw))
        with _watch() as events:
            outcome = _outcome(kind, path, f"case {number} of seed {seed}, kept as {path}")
        assert not events, f"case {number}, kept as {path}, ran {events}"
        outcomes[outcome] += 1
    return outcomes


def _outcome(kind: Kind, path: Path, where: str) -> str:
    try:
        with _time_limit():
            kind.read(path)
    except kind.errors as error:
        if not is_written_for_users(error):
            raise AssertionError(
                f"{where}: {type(error).__name__} is not detkit's own: {error}"
            ) from error
        return type(error).__name__
    except OutOfTime:
        raise AssertionError(f"{where}: took more than {SECONDS_PER_CASE} s") from None
    except Exception as error:
        raise AssertionError(
            f"{where}: {type(error).__name__} is not documented: {error}"
        ) from error
    return "read"


# What becomes of a few bytes; None cuts the file off before them.
_CHANGES: tuple[Callable[[bytes, tuple[bytes, ...], random.Random], bytes] | None, ...] = (
    lambda part, words, draw: bytes(b ^ (1 << draw.randrange(8)) for b in part),
    lambda part, words, draw: draw.randbytes(len(part)),
    lambda part, words, draw: draw.choice((b"\0", b"\xff")) * len(part),
    lambda part, words, draw: b"",
    lambda part, words, draw: part * draw.choice((2, 50)),
    lambda part, words, draw: draw.choice(words) + part,
    lambda part, words, draw: draw.choice(words),
    None,
)


def damaged(data: bytes, words: tuple[bytes, ...], draw: random.Random) -> bytes:
    """Return a copy with up to four changes: bits, bytes, cuts, doublings, moved slices and harmful words."""
    for _ in range(draw.choice((0, 1, 1, 2, 4))):
        at = draw.randrange(len(data) + 1)
        to = min(len(data), at + draw.choice((1, 2, 4, 8, 64)))
        change = draw.choice(_CHANGES)
        data = (
            data[:at] + change(data[at:to], words, draw) + data[to:]
            if change is not None
            else data[:at]
        )
    return data


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_CASE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _watch() -> Iterator[list[str]]:
    """Return the list of what Python reports as run while the context is open; the hook itself stays for good."""
    global _watched
    if not getattr(sys, "_detkit_fuzz_hook", False):
        sys.addaudithook(_note)
        sys._detkit_fuzz_hook = True
    _watched = []
    try:
        yield _watched
    finally:
        _watched = None


def _note(event: str, _: Any) -> None:
    if _watched is not None and event in _RUNS_CODE:
        _watched.append(event)


# --- kinds of files ---


class _Calls:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


def _weights() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.arange(24.0).reshape(4, 6),
        "a.bias": torch.ones(4, dtype=torch.float16),
    }


def _torch_seeds() -> list[bytes]:
    seeds = []
    for is_zip in (True, False):
        for content in (
            _weights(),
            {"model": _weights(), "iteration": 7, "optimizer": {"lr": [0.1]}},
        ):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=is_zip)
            seeds.append(file.getvalue())
    return seeds


def _pickle_seeds() -> list[bytes]:
    arrays = {name: value.numpy() for name, value in _weights().items()}
    hostile = pickle.dumps({"model": arrays, "more": _Calls()})
    whole = {
        "model": arrays,
        "__author__": "fuzz",
        "ids": {1, 2},
        "scale": np.float32(2),
        "matching_heuristics": True,
    }
    return [*(pickle.dumps(whole, protocol) for protocol in (2, 4, 5)), hostile]


def _safetensors_seeds() -> list[bytes]:
    save = pytest.importorskip("safetensors.torch").save

    return [
        save(_weights()),
        save(_weights(), {"format": "pt", "detkit": '{"thing_classes": ["a", "b"]}'}),
    ]


_YAML = b"""\
_BASE_: []
MODEL:
  META_ARCHITECTURE: "GeneralizedRCNN"
  WEIGHTS: &weights "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3)] for x in [32, 64]]"]
    ASPECT_RATIOS: [[0.5, 1.0, 2.0]]
  CUSTOM: {WIDTH: 0x10, ANY: ~, W: *weights}
DATASETS:
  TRAIN: ("a", "b")
  REGISTER:
    - {name: a, format: coco, images: i, annotations: a.json}
SOLVER: {BASE_LR: 1.0e-3, STEPS: [10, 20], IMS_PER_BATCH: 2}
"""

_COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "height": 40, "width": 60},
        {"id": 2, "file_name": "b/c.jpg", "height": 40, "width": 60},
    ],
    "categories": [
        {"id": 3, "name": "person", "keypoints": ["left_eye", "right_eye"]},
        {"id": 5, "name": "cat"},
    ],
    "annotations": [
        {
            **{
                "id": 1,
                "image_id": 1,
                "category_id": 3,
                "bbox": [1.5, 2, 10, 20.25],
                "iscrowd": 0,
                "area": 200,
            },
            **{"segmentation": [[1, 2, 11, 2, 11, 22]], "keypoints": [3, 4, 2, 5, 6, 1]},
        },
        {"id": 2, "image_id": 1, "category_id": 5, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        {
            **{"id": 3, "image_id": 2, "category_id": 5, "bbox": [5, 5, 4, 4], "area": 16},
            **{"segmentation": {"size": [40, 60], "counts": [100, 20, 2280]}},
        },
    ],
}

_VOC = b"""<?xml version="1.0" encoding="utf-8"?>
<annotation><folder>VOC</folder><filename>case.jpg</filename><size><width>60</width><height>40</height>
<depth>3</depth></size><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2.5</ymin>
<xmax>30</xmax><ymax>40</ymax></bndbox><part><name>head</name></part></object><object><name>dog</name><bndbox>
<xmin>5</xmin><ymin>5</ymin><xmax>50</xmax><ymax>30</ymax></bndbox></object></annotation>
"""


_ODD_VALUES = (
    None,
    -1,
    0,
    0.5,
    10**30,
    float("nan"),
    float("inf"),
    True,
    "",
    "x",
    "../../a",
    [],
    {},
    [[]],
    [None],
    "1",
)


def _coco_seeds() -> list[bytes]:
    """The file as it should be, and many whose JSON is whole but has an odd value or lacks one."""
    draw = random.Random(0)
    trees = [_COCO, {**_COCO, "annotations": []}]
    for _ in range(500):
        tree = copy.deepcopy(_COCO)
        places = [
            (node, key)
            for node in _containers(tree)
            for key in (node if isinstance(node, dict) else range(len(node)))
        ]
        node, key = draw.choice(places)
        if draw.random() < 0.2 and isinstance(node, dict):
            del node[key]
        else:
            node[key] = draw.choice(_ODD_VALUES)
        trees.append(tree)
    return [json.dumps(tree).encode() for tree in trees]


def _containers(tree: Any) -> list[Any]:
    values = (
        list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    )
    found = [tree] if isinstance(tree, dict | list) else []
    return found + [container for value in values for container in _containers(value)]


def _image_seeds() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)
    rgb, grey16 = Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 256)
    exif = Image.Exif()
    exif[0x0112] = 6
    pictures: list[tuple[Image.Image, str, dict[str, Any]]] = [
        *(
            (rgb, format, {})
            for format in ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA")
        ),
        (rgb, "JPEG", {"exif": exif}),
        (rgb, "JPEG", {"progressive": True}),
        (rgb.convert("CMYK"), "JPEG", {}),
        (rgb.quantize(16), "PNG", {"transparency": 0}),
        (rgb.convert("RGBA"), "PNG", {}),
        (grey16, "PNG", {}),
        (rgb, "TIFF", {"compression": "tiff_lzw"}),
    ]
    seeds = []
    for picture, format, options in pictures:
        file = io.BytesIO()
        picture.save(file, format, **options)
        seeds.append(file.getvalue())
    return seeds


def _read_yaml(path: Path) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(path))
    return cfg


def _read_coco(path: Path) -> list[ImageRecord]:
    return _through_the_report(lambda: load_coco_json(str(path), "images"))


def _read_voc(path: Path) -> list[ImageRecord]:
    path.with_suffix(".jpg").touch()
    (path.parent / "split.txt").write_text(path.stem)
    folder, split = str(path.parent), str(path.parent / "split.txt")
    return _through_the_report(
        lambda: load_voc_folders(folder, folder, ("cat", "dog"), split_file=split)
    )


def _through_the_report(load: Callable[[], list[ImageRecord]]) -> list[ImageRecord]:
    DatasetCatalog.register("fuzz", load)
    try:
        return get_detection_dataset_dicts("fuzz", filter_empty=False, num_classes=2)
    finally:
        DatasetCatalog.remove("fuzz")


_NUMBERS = (b"-1", b"0", b"1e999", b"NaN", b"99999999999999999999", b"1" * 5000, b"0.5")
_CHECKPOINT_WORDS = (
    b"cos\nsystem\n",
    b"\x93",
    b"R",
    b"r\xff\xff\xff\x7f",
    b"PK\x03\x04",
    b"\xff" * 8,
    b"\x80\x04",
    b"q\xff",
)


KINDS = {
    "pth": Kind(
        ".pth",
        _torch_seeds,
        lambda path: load_checkpoint_file(str(path)),
        (CheckpointError,),
        _CHECKPOINT_WORDS,
    ),
    "pkl": Kind(
        ".pkl",
        _pickle_seeds,
        lambda path: load_checkpoint_file(str(path)),
        (CheckpointError,),
        _CHECKPOINT_WORDS,
    ),
    "safetensors": Kind(
        ".safetensors",
        _safetensors_seeds,
        lambda path: load_checkpoint_file(str(path)),
        (CheckpointError,),
        (*_NUMBERS, b'"', b"{", b"[", b"null"),
    ),
    "yaml": Kind(
        ".yaml",
        lambda: [_YAML],
        _read_yaml,
        (ValueError, ConfigKeyError, FileNotFoundError),
        (
            *(
                *_NUMBERS,
                b"!!python/object/apply:os.system ['exit 1']",
                b"!!binary x",
                b"!!set {a}",
                b"*weights",
            ),
            *(
                b"<<: *weights",
                b"_BASE_: ../../etc/passwd\n",
                b"[" * 200,
                b"? ",
                b"!!bool ",
                b"&a [*a]",
                b"\n",
                b"\0",
            ),
        ),
    ),
    "coco": Kind(
        ".json",
        _coco_seeds,
        _read_coco,
        (ValueError,),
        (
            *_NUMBERS,
            b"null",
            b"[]",
            b"{}",
            b'"../../etc/passwd"',
            b"[" * 2000,
            b'"',
            b"true",
            b'"a\\u0000"',
            b"[[]]",
        ),
    ),
    "voc": Kind(
        ".xml",
        lambda: [_VOC],
        _read_voc,
        (ValueError, FileNotFoundError),
        (
            *_NUMBERS,
            b'<!DOCTYPE a [<!ENTITY b "c">]>',
            b"&b;",
            b"<",
            b"</object>",
            b"<object>",
            b"<a>" * 2000,
            b"\xff",
        ),
    ),
    "image": Kind(
        ".img",
        _image_seeds,
        lambda path: read_image(str(path)),
        (BadImageError,),
        (b"\xff\xff", b"\0" * 4, b"\xff\xd8\xff"),
    ),
}
