"""Borders of what counts as a fault."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

import detkit.modeling  # noqa: F401 - declares what the architectures read
from detkit.config import get_cfg
from detkit.data.doctor import KINDS

HEIGHT, WIDTH = 48, 64  # of the toy set


def box_mask(x: float, y: float, w: float, h: float) -> dict[str, Any]:
    """Return a box and its mask."""
    return {"bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}


def enlarged(toy: Any) -> None:
    """Have the model see images twice as large, with an object of 0.6 pixels."""
    toy.settings |= {"INPUT.MIN_SIZE_TEST": 2 * HEIGHT, "INPUT.MAX_SIZE_TEST": 2 * WIDTH}
    toy.settings["MODEL.ANCHOR_GENERATOR.SIZES"] = [[16]]
    toy.anchors.clear()
    toy.first(**box_mask(4, 6, 0.6, 0.7))


def hidden_outside(toy: Any) -> None:
    toy.settings["MODEL.KEYPOINT_ON"] = True
    toy.first(keypoints=[900, 5, 0, 9, 9, 2, WIDTH, HEIGHT, 2])


def at_the_limit(toy: Any) -> None:
    toy.settings["TEST.DETECTIONS_PER_IMAGE"] = 2
    toy.add(iscrowd=1, **box_mask(1, 1, 30, 20))


def filling(toy: Any) -> None:
    triangle = [[0, 0, WIDTH, 0, 0, HEIGHT]]
    toy.first(bbox=[0, 0, WIDTH, HEIGHT], segmentation=triangle)


def two_lost(toy: Any) -> None:
    toy.settings["MODEL.MASK_ON"] = True
    for k in range(2):
        toy.image("train", k).unlink()


BORDERS: dict[str, tuple[Callable[[Any], Any], set[str]]] = {
    "object that the resize enlarges": (enlarged, set()),
    "box that ends with its image": (
        lambda t: t.first(**box_mask(WIDTH - 20, HEIGHT - 14, 21, 15)),
        set(),
    ),
    "box more than a pixel beyond": (
        lambda t: t.first(**box_mask(WIDTH - 20, 20, 21.5, 14)),
        {"box-sticks-out"},
    ),
    "keypoint that is not labelled": (hidden_outside, set()),
    "objects at the limit, and a crowd": (at_the_limit, set()),
    "object that fills the image by its mask": (filling, set()),
    "copies within the test set": (
        lambda t: t.image("test", 1).write_bytes(t.image("test", 0).read_bytes()),
        {"duplicate-image"},
    ),
    "image twice as large as what the model is fed": (
        lambda t: t.write("large.jpg", t.pixels(2 * HEIGHT, 2 * WIDTH)),
        set(),
    ),
    "missing files are no copies": (two_lost, {"missing-image"}),
    "crowd without mask": (
        lambda t: (t.add(iscrowd=1), t.files["train"]["annotations"][-1].pop("segmentation")),
        set(),
    ),
    "same box in two images": (
        lambda t: t.add(image_id=1),
        set(),
    ),
    "file without orientation, in a format that allows one": (
        lambda t: Image.open(t.image()).save(t.image(), exif=Image.Exif()),
        set(),
    ),
    "class of the test set alone, that has no object": (
        lambda t: (
            [c["categories"].append({"id": 9, "name": "owl"}) for c in t.files.values()]
            and t.settings.update({"MODEL.ROI_HEADS.NUM_CLASSES": 3})
        ),
        {"class-without-objects"},
    ),
}


@pytest.mark.parametrize("border", BORDERS)
def test_border(border: str, toy: Any) -> None:
    change, expected = BORDERS[border]
    change(toy)
    assert {finding.code for finding in toy.check().findings} == expected


def test_anchors_that_meet_the_objects_are_not_compared_with_others(toy: Any) -> None:
    assert toy.check().anchors == {"recall": 1.0}


def test_all_places_are_kept_and_some_examples(toy: Any) -> None:
    for k in range(30):
        toy.add(bbox=[4 + k, 6, 0, 14])
    (finding,) = toy.check().findings
    assert finding.count == len(finding.places) == 30
    assert len(finding.examples) == 20


def test_records_without_size_get_that_of_their_file(toy: Any) -> None:
    for image in toy.files["train"]["images"]:
        del image["height"], image["width"]
    toy.first(**box_mask(50, 10, 20, 20))
    report = toy.check()
    assert [finding.code for finding in report.findings] == ["box-sticks-out"]
    assert report.records["toy_train"][0]["width"] == WIDTH


def test_remedies_name_keys_that_there_are() -> None:

    cfg = get_cfg()
    known = re.compile(r"\b(?:MODEL|INPUT|DATALOADER|DATASETS|TEST|SOLVER)(?:\.[A-Z_]+)+")
    for kind in KINDS.values():
        for key in known.findall(kind.remedy):
            cfg.get_by_full_key(key)  # raises for an unknown key
