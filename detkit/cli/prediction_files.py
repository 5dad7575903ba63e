"""The files of `detkit predict`: a log that a killed run goes on from, and formats made from it.

Nothing here imports torch. An entry is what `predictions.json` has of an image or a frame.
"""

import csv
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from detkit.utils.errors import ConfigError

RESULTS = "predictions.json"
Entry = dict[str, Any]
_LOGS = ".predictions_*.jsonl"


class PredictionLog:
    """Entries, written as they are made; each process of a run writes a file of its own.

    A line is `[number of the input, frame or None, entry]`. After the last frame of a video comes
    one whose entry is None, and the entry of an input that could not be read is an error. What was
    half written when a run was killed is ignored.

    Attributes:
        failed: Numbers of the inputs that could not be read, as of the last reading.
    """

    def __init__(self, folder: Path) -> None:
        """Take the folder of the output."""
        self._folder = folder
        self._file: IO[str] | None = None
        # (input, frame) -> file and position of its line; kept instead of the entries, which would
        # not fit into memory for all images.
        self._places: dict[tuple[int, int], tuple[Path, int]] = {}
        self.failed: set[int] = set()

    def start(self, run: Mapping[str, Any], resume: bool) -> set[int]:
        """Begin a run, or go on with one; called by the main process, before `opened`.

        Args:
            run: What its entries depend on, in values of JSON.
            resume: Whether to go on with the run that the folder holds.

        Returns:
            The numbers of the inputs that are done.

        Raises:
            ConfigError: The run that is to go on had other options.
        """
        header = self._folder / ".predictions_run.json"
        before = json.loads(header.read_text("utf-8")) if resume and header.exists() else None
        now = json.loads(json.dumps(run))
        if before is None:
            self.remove()
            header.write_text(json.dumps(now), encoding="utf-8")
            return set()
        if differing := [key for key in now if before.get(key) != now[key]]:
            raise ConfigError(
                f"--resume: the run in {self._folder} had another {', '.join(differing)}. Give the"
                " same options, or start anew without --resume"
            )
        return self._read()

    @contextmanager
    def opened(self, rank: int) -> Iterator[None]:
        """Let `add` write to the file of this process, within the block."""
        path = self._folder / _LOGS.replace("*", str(rank))
        with path.open("a", encoding="utf-8") as self._file:
            self._file.write("\n")  # ends a line that was half written
            yield

    def add(self, number: int, entry: Entry | str | None, frame: int | None = None) -> None:
        """Write an entry; None says that a video has ended, text why an input cannot be read."""
        assert self._file is not None
        self._file.write(json.dumps([number, frame, entry]) + "\n")
        self._file.flush()

    def entries(self) -> Iterator[Entry]:
        """Yield the entries of all processes, in the order of the inputs and of their frames."""
        self._read()
        with ExitStack() as stack:
            files = {
                path: stack.enter_context(path.open("rb"))
                for path in {path for path, _ in self._places.values()}
            }
            for key in sorted(self._places):
                path, position = self._places[key]
                files[path].seek(position)
                yield json.loads(files[path].readline())[2]

    def remove(self) -> None:
        """Remove the log."""
        for path in self._folder.glob(".predictions_*.json*"):
            path.unlink()

    def _read(self) -> set[int]:
        done: set[int] = set()
        self._places, self.failed = {}, set()
        for path in sorted(self._folder.glob(_LOGS)):
            with path.open("rb") as file:
                position = 0
                for line in file:
                    start, position = position, position + len(line)
                    try:
                        number, frame, entry = json.loads(line)
                    except ValueError:
                        continue
                    if frame is None:
                        done.add(number)
                    if isinstance(entry, str):
                        self.failed.add(number)
                    elif entry is not None:
                        self._places[number, -1 if frame is None else frame] = (path, start)
        return done


def digest(texts: Iterable[str]) -> str:
    """Return a short text that is another one for other texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def write_json(entries: Iterable[Entry], path: Path) -> None:
    """Write `predictions.json`, an entry a line: as easy to search as to parse."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write("[\n")
        for index, entry in enumerate(entries):
            entry.pop("name")
            file.write((",\n" if index else "") + json.dumps(entry))
        file.write("\n]\n")
    temporary.replace(path)


def write_coco(log: PredictionLog, folder: Path, classes: Sequence[str]) -> None:
    """Write `coco.json`, a data set in COCO's format whose annotations have scores."""
    with (folder / "coco.json").open("w", encoding="utf-8") as file:
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
        file.write(f'{{"categories": {json.dumps(categories)},\n"images": [')
        for k, entry in enumerate(log.entries()):
            image = {"id": k, "file_name": entry["file"]}
            image |= {key: entry[key] for key in ("frame", "height", "width") if key in entry}
            file.write((",\n" if k else "\n") + json.dumps(image))
        file.write('],\n"annotations": [')
        count = 0
        for k, entry in enumerate(log.entries()):
            for found in entry.get("instances", ()):
                file.write((",\n" if count else "\n") + json.dumps(_annotation(found, k, count)))
                count += 1
        file.write("]}\n")


def _annotation(found: Entry, image_id: int, index: int) -> Entry:
    bbox = found["bbox"]
    annotation = {
        "id": index + 1,
        "image_id": image_id,
        "category_id": found["category_id"] + 1,
        "bbox": bbox,
        "area": round(bbox[2] * bbox[3], 2),
        "iscrowd": 0,
        "score": found["score"],
    }
    if "segmentation" in found:
        from pycocotools import mask as mask_util

        annotation["segmentation"] = found["segmentation"]
        annotation["area"] = float(mask_util.area(found["segmentation"]))
    if "keypoints" in found:
        # COCO numbers pixels, and 2 means visible.
        numbered = enumerate(found["keypoints"])
        keypoints = [2 if i % 3 == 2 else round(value - 0.5, 3) for i, value in numbered]
        annotation |= {"keypoints": keypoints, "num_keypoints": len(keypoints) // 3}
    return annotation


def write_csv(log: PredictionLog, folder: Path, classes: Sequence[str]) -> None:
    """Write `predictions.csv`, a box per row; an image without any has one row, without box."""
    path = folder / "predictions.csv"
    # Names of files may hold bytes that are not UTF-8: they are written as they are.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "frame", "label", "score", "xmin", "ymin", "xmax", "ymax", "angle"])
        for entry in log.entries():
            start = [entry["file"], entry.get("frame", "")]
            for found in entry.get("instances", ()):
                x, y, width, height, *angle = found["bbox"]
                if angle:  # around its middle
                    x, y = x - width / 2, y - height / 2
                box = [round(v, 2) for v in (x, y, x + width, y + height)]
                row = [found["category"], found["score"], *box, *(angle or [""])]
                rows.writerow([*start, *row])
            if not entry.get("instances"):
                rows.writerow([*start, *[""] * 7])


def write_yolo(log: PredictionLog, folder: Path, classes: Sequence[str]) -> None:
    """Write `labels/NAME.txt` per image, as for training, without scores; and `data.yaml`."""
    import numpy as np
    import yaml

    from detkit.data.datasets.formats.write import yolo_shares

    (folder / "labels").mkdir(exist_ok=True)
    for entry in log.entries():
        scale = np.array([entry["width"], entry["height"]], dtype=float)
        rows = []
        for found in entry.get("instances", ()):
            annotation = _as_record(found)
            num_keypoints = len(found.get("keypoints", ())) // 3
            shares = yolo_shares(annotation, scale, num_keypoints, Counter())
            rows.append(f"{found['category_id']} {' '.join(f'{v:.6g}' for v in shares)}\n")
        name = f"{_stem(entry)}.txt"
        (folder / "labels" / name).write_text("".join(rows), encoding="utf-8")
    content = {"path": ".", "names": dict(enumerate(classes))}
    (folder / "data.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), "utf-8")


def _as_record(found: Entry) -> Any:
    """Return an instance of an entry as an annotation record, its mask as polygons."""
    from detkit.structures import BoxMode

    mode = BoxMode.XYWHA_ABS if len(found["bbox"]) == 5 else BoxMode.XYWH_ABS
    record = {"bbox": found["bbox"], "bbox_mode": mode, "category_id": found["category_id"]}
    if "segmentation" in found:
        record["segmentation"] = _polygons(found)
    if "keypoints" in found:
        record["keypoints"] = [2 if i % 3 == 2 else v for i, v in enumerate(found["keypoints"])]
    return record


def _polygons(found: Entry) -> list[list[float]]:
    from detkit.structures import bitmask_to_polygons, rle_to_bitmask

    mask = rle_to_bitmask(found["segmentation"])
    return [polygon.tolist() for polygon in bitmask_to_polygons(mask)]


def write_labelme(log: PredictionLog, folder: Path, classes: Sequence[str]) -> None:
    """Write `labelme/NAME.json` per image, which labelme opens beside it; frames are left out."""
    import numpy as np
    import torch

    from detkit.structures import rotated_box_corners

    (folder / "labelme").mkdir(exist_ok=True)
    for entry in log.entries():
        if "frame" in entry:
            continue
        shapes = []
        for group, found in enumerate(entry.get("instances", ())):
            x, y, width, height, *angle = found["bbox"]
            kind, outlines = "rectangle", [[[x, y], [x + width, y + height]]]
            if angle:
                corners = rotated_box_corners(torch.tensor([found["bbox"]]))
                kind, outlines = "polygon", corners.reshape(1, 4, 2).tolist()
            elif "segmentation" in found and (polygons := _polygons(found)):
                kind, outlines = "polygon", [np.reshape(p, (-1, 2)).tolist() for p in polygons]
            shapes += [
                {
                    "label": found["category"],
                    "points": points,
                    "group_id": group if len(outlines) > 1 else None,
                    "description": f"score {found['score']}",
                    "shape_type": kind,
                    "flags": {},
                }
                for points in outlines
            ]
        content = {
            "version": "5.0.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": os.path.relpath(entry["file"], folder / "labelme"),
            "imageData": None,
            "imageHeight": entry["height"],
            "imageWidth": entry["width"],
        }
        path = folder / "labelme" / f"{_stem(entry)}.json"
        path.write_text(json.dumps(content), encoding="utf-8")


def _stem(entry: Entry) -> str:
    """Return the name of the files of an image: another one for each, and for each frame."""
    return entry["name"] + (f"_{entry['frame']:06d}" if "frame" in entry else "")


FORMATS: dict[str, Callable[[PredictionLog, Path, Sequence[str]], None]] = {
    "coco": write_coco,
    "csv": write_csv,
    "yolo": write_yolo,
    "labelme": write_labelme,
}
"""What `--save` writes beside pictures, from the entries of the log."""
WRITTEN = {
    "coco": ("coco.json",),
    "csv": ("predictions.csv",),
    "yolo": ("labels", "data.yaml"),
    "labelme": ("labelme",),
}
"""The files and folders of each."""
