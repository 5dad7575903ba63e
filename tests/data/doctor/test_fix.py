"""A cleaned copy has none of the faults that could be mended, and says what was changed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import detkit.modeling  # noqa: F401 - declares what the architectures read
from detkit.data import DatasetCatalog, MetadataCatalog, register_declared_datasets
from detkit.data.doctor import check_datasets, write_cleaned

SPOILED: dict[str, tuple[Any, str]] = {
    "lost": (lambda t: t.image().unlink(), "image left out"),
    "copy": (lambda t: t.image("train", 1).write_bytes(t.image().read_bytes()), "image left out"),
    "leak": (lambda t: t.image("test", 1).write_bytes(t.image().read_bytes()), "image left out"),
    "size": (lambda t: t.files["train"]["images"][0].update(height=99), "size set to 64x48"),
    "unknown image": (lambda t: t.add(image_id=99), "as the reader leaves it: .*image_id 99"),
    "repeated id": (lambda t: t.first(id=2), "as the reader leaves it: .*more than once: 2"),
    "flat": (lambda t: t.first(bbox=[4, 6, 0, 14]), "annotation left out"),
    "nan": (lambda t: t.first(bbox=[4, float("nan"), 4, 14]), "annotation left out"),
    "twice": (lambda t: t.add(), "annotation left out"),
    "no mask": (lambda t: t.first().pop("segmentation"), "annotation left out"),
    "over the edge": (
        lambda t: t.first(bbox=[50, 10, 20, 20], segmentation=[[50, 10, 64, 10, 64, 30]]),
        r"box clipped: \[50.0, 10.0, 20.0, 20.0\] to \[50.0, 10.0, 64.0, 30.0\]",
    ),
    "polygon": (lambda t: t.first(segmentation=[[1, 2, 3, 4]]), "as the reader leaves it: .*of 2"),
    "mask apart": (
        lambda t: t.first(segmentation=[[40, 30, 60, 30, 60, 44]]),
        r"box drawn around the mask: .* to \[40.0, 30.0, 60.0, 44.0\]",
    ),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_cleaned_copy_has_no_fault_and_every_change_is_listed(
    fault: str, toy: Any, tmp_path: Path
) -> None:
    further = {"polygon": ["annotation left out, which has no usable mask"]}
    spoil, done = SPOILED[fault]
    spoil(toy)
    cfg = toy.cfg()
    report = check_datasets(cfg)
    before = json.dumps(report.records)
    entries, changes = write_cleaned(report, tmp_path / "clean", needs_masks=True)
    assert json.dumps(report.records) == before
    assert re.fullmatch(f"{done}.*", changes[0]["change"]), changes
    assert {change["dataset"] for change in changes} == {"toy_train"}
    assert [change["change"] for change in changes[1:]] == further.get(fault, [])
    register_declared_datasets(entries)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("toy_train_clean",), ("toy_test_clean",)
    assert [f for f in check_datasets(cfg).findings if f.severity != "note"] == []


def test_what_is_without_fault_comes_back_unchanged(toy: Any, tmp_path: Path) -> None:
    report = check_datasets(toy.cfg())
    entries, changes = write_cleaned(report, tmp_path / "clean")
    assert changes == []
    register_declared_datasets(entries)
    for name in ("toy_train", "toy_test"):
        found: list[Any] = DatasetCatalog.get(f"{name}_clean")
        expected: list[Any] = DatasetCatalog.get(name)
        for record, other in zip(found, expected, strict=True):
            with Image.open(record["file_name"]) as image, Image.open(other["file_name"]) as same:
                assert image.tobytes() == same.tobytes()
            for a, b in zip(record["annotations"], other["annotations"], strict=True):
                assert {**a, "id": 0, "area": 0} == {**b, "id": 0, "area": 0}
        classes = (MetadataCatalog.get(n).thing_classes for n in (f"{name}_clean", name))
        assert len(set(map(tuple, classes))) == 1
