"""The doctor finds each planted fault under its own code, and nothing in data without faults."""

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

import detkit.modeling  # noqa: F401 - declares what the architectures read
from detkit.data import DatasetCatalog
from detkit.data.doctor import (
    KINDS,
    AnchorLevel,
    Report,
    check_datasets,
    warn_before_training,
)

HEIGHT, WIDTH, NAMES = 48, 64, ["cat", "dog"]  # of the toy set


def box_mask(x: float, y: float, w: float, h: float) -> dict[str, Any]:
    """Return a box and its mask."""
    return {"bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}


def cut(toy: Any) -> None:
    data = toy.image().read_bytes()
    toy.image().write_bytes(data[: len(data) * 9 // 10])


def in_words(toy: Any) -> None:
    toy.image().write_text("<html>404 Not Found</html>")


def exif(toy: Any) -> None:
    data = Image.Exif()
    data[0x0112] = 3
    Image.open(toy.image()).save(toy.image(), exif=data)


def xmp(toy: Any) -> None:
    text = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
        'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        'tiff:Orientation="3"/></rdf:RDF></x:xmpmeta>'
    )
    Image.open(toy.image()).save(toy.image(), xmp=text.encode())


def turned(toy: Any) -> None:
    data = Image.Exif()
    data[0x0112] = 6
    Image.open(toy.image()).save(toy.image(), exif=data)


def huge(toy: Any) -> None:
    """Claim 60,000 x 60,000 pixels in the header of a PNG."""
    file = io.BytesIO()
    Image.fromarray(toy.pixels()).save(file, "PNG")
    data = bytearray(file.getvalue())
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    (toy.folder / "huge.png").write_bytes(bytes(data))
    toy.files["train"]["images"][0].update(file_name="huge.png")


def saved_again(toy: Any, split: str) -> None:
    Image.open(toy.image()).save(toy.image(split, 1), quality=60)


def text(toy: Any, name: str, content: str) -> None:
    (toy.folder / name).write_text(content)


def voc(toy: Any, change: tuple[str, str]) -> None:
    """Replace the training set by one in the format of VOC, with a piece of text changed."""
    folder = toy.folder / "voc"
    for below in ("JPEGImages", "Annotations"):
        (folder / below).mkdir(parents=True)
    for k, name in enumerate(NAMES):
        shutil.copy(toy.image("train", k), folder / "JPEGImages")
        box = "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>25</xmax><ymax>22</ymax></bndbox>"
        objects = [f"<object><name>{name}</name>{box}</object>"]
        objects.append(f"<object><name>{NAMES[1 - k]}</name>{box.replace('25', '35')}</object>")
        xml = f"<annotation>{''.join(objects)}</annotation>"
        if k == 0:
            xml = xml.replace(*change)
        (folder / "Annotations" / f"train_{k}.xml").write_text(xml)
    toy.entries["train"] = {"name": "toy_train", "format": "voc", "root": str(folder)}
    toy.entries["train"]["classes"] = NAMES
    toy.settings["MODEL.MASK_ON"] = False


def yolo(toy: Any) -> None:
    """Replace the training set by one in the format of YOLO, with a row of a class too many."""
    (toy.folder / "images").mkdir()
    (toy.folder / "labels").mkdir()
    for k in range(2):
        shutil.copy(toy.image("train", k), toy.folder / "images")
        rows = f"{k} 0.5 0.5 0.3 0.4\n" + "7 0.2 0.2 0.1 0.1\n" * (k == 0)
        text(toy, f"labels/train_{k}.txt", rows)
    entry = {"name": "toy_train", "format": "yolo", "images": str(toy.folder / "images")}
    toy.entries["train"] = entry | {"classes": NAMES}
    toy.settings["MODEL.MASK_ON"] = False


def lost_xml(toy: Any) -> None:
    voc(toy, ("", ""))
    (toy.folder / "voc/ImageSets/Main").mkdir(parents=True)
    text(toy, "voc/ImageSets/Main/some.txt", "train_0\ntrain_1\n")
    (toy.folder / "voc/Annotations/train_1.xml").unlink()
    toy.entries["train"]["split"] = "some"


def foreign(toy: Any) -> None:
    """Replace the training set by records of the user's own, of which one has a class too many."""
    toy.cfg()
    records: list[Any] = DatasetCatalog.get("toy_train")
    records[0]["annotations"][0]["category_id"] = 7
    DatasetCatalog.remove("toy_train")
    DatasetCatalog.register("toy_train", lambda: records)
    del toy.entries["train"]


def rare(toy: Any) -> None:
    """Give the first image a thousand dogs, where there is one cat."""
    toy.all(lambda a: {"category_id": 2})
    toy.first(category_id=1)
    for k in range(1000):
        toy.add(category_id=2, **box_mask(k % 40, k / 40, 20, 14.5))
    toy.settings["TEST.DETECTIONS_PER_IMAGE"] = 2000


def label_maps(toy: Any, *, stray: int = 0, ground: int = 0) -> None:
    """Train on label maps of two classes, or of one; the last one may have a label of no class."""
    (toy.folder / "images").mkdir()
    (toy.folder / "labels").mkdir()
    for k in range(2):
        shutil.copy(toy.image("train", k), toy.folder / "images")
        labels = np.full((HEIGHT, WIDTH), ground or k, np.uint8)
        labels[0, 0] = stray * k or labels[0, 0]
        Image.fromarray(labels).save(toy.folder / "labels" / f"train_{k}.png")
    folders = {"images": str(toy.folder / "images"), "labels": str(toy.folder / "labels")}
    toy.entries["train"] = {"name": "toy_train", "format": "sem_seg", "classes": NAMES, **folders}
    toy.settings |= {"MODEL.META_ARCHITECTURE": "SemanticSegmentor", "MODEL.MASK_ON": False}


def keypoints(toy: Any, **changes: Any) -> None:
    toy.settings |= {"MODEL.KEYPOINT_ON": True, **changes}


RLE = {"size": [HEIGHT, WIDTH], "counts": [5]}
FLAT = [[4, 6, 20, 6, 4, 6]]
# Code -> the fault, which is the only one of the data.
# fmt: off
FAULTS: dict[str, Callable[[Any], Any]] = {
    # files of annotations
    "unreadable-data-set": lambda t: text(t, "train.json", "{"),
    "empty-data-set": lambda t: t.files["train"].update(images=[], annotations=[]),
    "reader-warning": lambda t: t.files["test"].pop("annotations"),
    "broken-image-entry": lambda t: t.files["train"]["images"].append({"id": 77}),
    "unknown-image-id": lambda t: t.add(image_id=99),
    "unknown-category-id": lambda t: t.add(category_id=99),
    "repeated-annotation-id": lambda t: t.first(id=2),
    "broken-box": lambda t: t.add(bbox=[1, 2, "x", 4]),
    "broken-row": yolo,
    "broken-polygon": lambda t: t.first(segmentation=[[1, 2, 3, 4]]),
    "broken-run-length": lambda t: t.first(segmentation=RLE),
    "broken-keypoints": lambda t: t.first(keypoints=[1, 2]),
    "broken-flag": lambda t: t.first(iscrowd="maybe"),
    "broken-area": lambda t: t.first(area="big"),
    "broken-annotation-file": lambda t: voc(t, ("</annotation>", "")),
    "missing-annotation-file": lost_xml,
    "unknown-class": lambda t: voc(t, ("</annotation>", "<object><name>cow</name></object></annotation>")),
    # files of images
    "missing-image": lambda t: t.image().unlink(),
    "empty-file": lambda t: t.image().write_bytes(b""),
    "not-an-image": in_words,
    "damaged-image": cut,
    "too-many-pixels": huge,
    "mislabelled-file": lambda t: Image.fromarray(t.pixels()).save(t.image(), "PNG"),
    "bit-depth": lambda t: t.write("deep.png", t.pixels()[:, :, 0].astype(np.uint16) * 256),
    "exif-orientation": exif,
    "xmp-orientation": xmp,
    "slow-format": lambda t: t.write("slow.jp2", t.pixels()),
    "large-image": lambda t: t.write("large.jpg", t.pixels(HEIGHT * 8, WIDTH * 8)),
    "blank-image": lambda t: t.write("blank.png", np.full((HEIGHT, WIDTH, 3), 7, np.uint8)),
    "size-differs": lambda t: Image.fromarray(t.pixels(HEIGHT + 4)).save(t.image()),
    "size-not-upright": turned,
    "channel-count": lambda t: t.settings.update({"INPUT.FORMAT": "RAW", "MODEL.PIXEL_MEAN": [0.0], "MODEL.PIXEL_STD": [1.0]}),
    "bad-label-map": lambda t: label_maps(t, stray=77),
    "empty-label-maps": lambda t: label_maps(t, ground=255),
    # copies
    "duplicate-image": lambda t: shutil.copy(t.image(), t.image("train", 1)),
    "near-duplicate": lambda t: saved_again(t, "train"),
    "leaked-image": lambda t: shutil.copy(t.image(), t.image("test", 1)),
    "near-leaked-image": lambda t: saved_again(t, "test"),
    "listed-twice": lambda t: (t.files["train"]["images"].append({**t.files["train"]["images"][0], "id": 50}), t.add(image_id=50)),
    # classes
    "class-count": lambda t: t.settings.update({"MODEL.ROI_HEADS.NUM_CLASSES": 5}),
    "class-names-differ": lambda t: t.entries["test"].update(classes=["dog", "cat"]),
    "checkpoint-classes": lambda t: t.checkpoint_classes.extend(["dog", "cat"]),
    "class-without-objects": lambda t: [t.all(lambda a: {"category_id": 1}, split) for split in t.files],
    "class-not-trained": lambda t: t.all(lambda a: {"category_id": 1}),
    "class-id-range": foreign,
    "rare-class": rare,
    "alike-class-names": lambda t: [c["categories"][1].update(name="Cat ") for c in t.files.values()],
    # boxes
    "box-not-finite": lambda t: t.first(bbox=[1, 2, float("nan"), 4]),
    "box-without-area": lambda t: t.first(bbox=[4, 6, 0, 14]),
    "box-outside": lambda t: t.first(bbox=[2000, 2000, 9, 4]),
    "box-sticks-out": lambda t: t.first(**box_mask(50, 10, 20, 20)),
    "boxes-as-corners": lambda t: t.all(lambda a: {"bbox": [40, 30, 60, 44]}),
    "boxes-as-fractions": lambda t: t.all(lambda a: {"bbox": [v / 100 for v in a["bbox"]]}),
    "doubled-box": lambda t: t.add(),
    "contradicting-box": lambda t: t.add(category_id=2),
    "whole-image-box": lambda t: t.first(**box_mask(0, 0, WIDTH, HEIGHT)),
    "tiny-object": lambda t: t.first(**box_mask(4, 6, 0.5, 0.7)),
    # masks and keypoints
    "missing-mask": lambda t: t.first().pop("segmentation"),
    "mask-outside": lambda t: t.first(segmentation=[[900, 900, 950, 900, 900, 950]]),
    "mask-without-area": lambda t: t.first(segmentation=FLAT),
    "mask-off-box": lambda t: t.first(segmentation=[[40, 30, 60, 30, 60, 44]]),
    "keypoint-count": lambda t: keypoints(t, **{"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5}),
    "keypoint-outside": lambda t: (keypoints(t), t.first(keypoints=[900, 5, 2, 9, 9, 2, 0, 0, 0])),
    # against the config
    "only-crowds": lambda t: t.all(lambda a: {"iscrowd": 1}),
    "empty-image": lambda t: t.files["train"]["annotations"].__delitem__(slice(0, 2)),
    "anchor-recall": lambda t: t.anchors.__setitem__(0, AnchorLevel(4, 0.5, np.array([[-40.0, -40, 40, 40]]))),
    "many-objects": lambda t: t.settings.update({"TEST.DETECTIONS_PER_IMAGE": 1}),
    "many-keypoint-objects": lambda t: keypoints(t, **{"TEST.KEYPOINT_DETECTIONS_PER_IMAGE": 1}),
}
# fmt: on


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings}


@pytest.mark.parametrize("code", FAULTS)
def test_planted_fault_is_found_under_its_own_code(code: str, toy: Any) -> None:
    FAULTS[code](toy)
    assert codes(toy.check()) == {code}


@pytest.mark.parametrize("keypoint_on", [False, True])
def test_data_without_faults_have_no_finding(keypoint_on: bool, toy: Any) -> None:
    toy.settings["MODEL.KEYPOINT_ON"] = keypoint_on
    assert toy.check().findings.as_json() == []


def test_every_kind_is_planted() -> None:
    assert set(KINDS) - set(FAULTS) == set()


def test_training_tells_what_shows_without_opening_images(toy: Any, caplog: Any) -> None:
    toy.add()
    toy.image().unlink()
    cfg = toy.cfg()
    records = DatasetCatalog.get("toy_train")
    with caplog.at_level("INFO", logger="detkit"):
        warn_before_training(cfg, records, toy.anchors)
    warning, hint = caplog.messages
    assert "annotated twice: 1 in the 4 training images" in warning
    assert f"annotation 108 of {toy.image()}" in warning
    assert "check-dataset" in hint


class Opening(Dataset):
    """Of the user's own: each item takes time."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("was read")


def test_training_says_nothing_of_data_without_faults_and_of_others_than_records(
    toy: Any, caplog: Any
) -> None:
    cfg = toy.cfg()
    foreign = {"file_name": "a", "annotations": [{"bbox_mode": 0, "bbox": None}]}
    png = {"bbox_mode": 0, "bbox": [1, 2, 3, 4], "category_id": 0, "segmentation": "a.png"}
    lone: list[Any] = [[{"file_name": "a", "annotations": found}] for found in (None, [png])]
    others: list[Any] = [[1, "a"], [{"annotations": [{}]}], [], [foreign], Opening(), *lone]
    cfg.MODEL.MASK_ON = True
    for records in (DatasetCatalog.get("toy_train"), *others):
        warn_before_training(cfg, records, toy.anchors)
    assert caplog.messages == []


def test_worker_processes_find_the_same(toy: Any) -> None:
    toy.first(bbox=[4, 6, 0, 14])
    toy.image().unlink()
    alone = toy.check().findings.as_json()
    found = check_datasets(toy.cfg(), num_workers=2, anchors=toy.anchors).findings.as_json()
    assert found == alone != []


def test_label_maps_are_read_each_and_held_against_their_image(toy: Any) -> None:
    label_maps(toy)
    assert codes(toy.check()) == set()
    lost, other = (toy.folder / "labels" / f"train_{k}.png" for k in range(2))
    lost.write_bytes(lost.read_bytes()[:60])
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(other)
    (finding,) = toy.check().findings
    assert (finding.code, finding.count) == ("bad-label-map", 2)
    assert "damaged" in finding.examples[0].detail
    assert "is (5, 6), its image (48, 64)" in finding.examples[1].detail
