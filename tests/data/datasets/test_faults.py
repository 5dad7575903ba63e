"""Readers name every faulty entry where faults are collected, and stop at the first where they are not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.data import DatasetCatalog, register_declared_datasets
from detkit.data.datasets.faults import collected_faults
from detkit.utils.errors import DataError

Entry = dict[str, Any]
GOOD = "0 0.5 0.5 0.2 0.2\n"


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def yolo(folder: Path) -> Entry:
    write(folder / "labels/a.txt", f"9 0.5 0.5 0.2 0.2\n{GOOD}0 x 0.5 0.2 0.2\n")
    write(folder / "labels/b.txt", GOOD)
    return {"format": "yolo", "annotations": str(folder / "labels"), "classes": ["cat"]}


def csv(folder: Path) -> Entry:
    rows = ["image,label,xmin,ymin,xmax,ymax", "a.png,cat,1,1,x,9", "a.png,cat,9,1,5,9"]
    rows += ["a.png,cat,1,1,9,9", "b.png,cat,1,1,9,9"]
    return {"format": "csv", "annotations": write(folder / "all.csv", "\n".join(rows))}


def labelme(folder: Path) -> Entry:
    def shape(points: Any, label: Any = "cat") -> Any:
        return {"label": label, "shape_type": "polygon", "points": points}

    good = shape([[1, 1], [9, 1], [9, 9]])
    bad = [shape("x"), shape([[1, 1], [2, 2]])]
    for name, shapes in (("a", [*bad, good]), ("b", [good])):
        content = {"imagePath": f"{name}.png", "imageHeight": 20, "imageWidth": 30}
        write(folder / f"marks/{name}.json", json.dumps({**content, "shapes": shapes}))
    return {"format": "labelme", "annotations": str(folder / "marks")}


def cvat(folder: Path) -> Entry:
    def box(right: Any) -> str:
        return f'<box label="cat" xtl="1" ytl="1" xbr="{right}" ybr="9"/>'

    images = f'<image id="0" name="a.png" width="30" height="20">{box("x")}{box(9)}'
    images += '<polygon label="cat" points="1,1;2,2"/></image>'
    images += f'<image id="1" name="b.png" width="30" height="20">{box(9)}</image>'
    text = f"<annotations>{images}</annotations>"
    return {"format": "cvat", "annotations": write(folder / "all.xml", text)}


def hugging_face(folder: Path) -> Entry:
    def line(name: str, *boxes: Any) -> str:
        objects = {"bbox": list(boxes), "categories": ["cat"] * len(boxes)}
        return json.dumps({"file_name": name, "objects": objects})

    lines = [line("a.png", [1, 1, 8, 8], [1, 1]), line("b.png", [1, 1, 8, 8])]
    lines.append(line("a.png", [1, 1, "x", 8]))
    write(folder / "images/metadata.jsonl", "\n".join(lines))
    return {"format": "hugging_face", "root": str(folder / "images"), "images": None}


def dota(folder: Path) -> Entry:
    good = "1 1 9 1 9 9 1 9 cat 0\n"
    write(folder / "labels/a.txt", f"1 1 9 1 9 9 1 9 cow 0\n{good}1 1 nan 1 9 9 1 9 cat 0\n")
    write(folder / "labels/b.txt", good)
    return {"format": "dota", "annotations": str(folder / "labels"), "classes": ["cat"]}


@pytest.mark.parametrize("make", [yolo, csv, labelme, cvat, hugging_face, dota])
def test_each_faulty_entry_is_named_and_the_others_are_read(
    make: Callable[[Path], Entry], tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for seed, name in enumerate(("a.png", "b.png")):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / name)
    entry = {"images": str(tmp_path / "images"), **make(tmp_path)}
    entry = {key: value for key, value in entry.items() if value is not None}
    name = f"faulty_{entry['format']}"
    register_declared_datasets([{**entry, "name": name}])
    try:
        with pytest.raises(DataError):
            DatasetCatalog.get(name)
        with collected_faults() as faults:
            records: list[Any] = DatasetCatalog.get(name)
        assert len(faults) == 2
        assert {fault.code for fault in faults} == {"broken-row"}
        assert all(Path(fault.file).name == "a.png" for fault in faults)
        counts = {Path(r["file_name"]).name: len(r["annotations"]) for r in records}
        assert counts["b.png"] == 1
        assert sum(counts.values()) == 2 or make is hugging_face
    finally:
        DatasetCatalog.remove(name)
