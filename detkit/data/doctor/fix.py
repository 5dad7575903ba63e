"""A cleaned copy of the data sets of a check, in COCO's format, with a list of what was changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.catalog import MetadataCatalog
from detkit.data.datasets.formats.collected import hull
from detkit.data.datasets.formats.write import write_dataset
from detkit.data.doctor.check import Report
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord
from detkit.utils.image import read_image_size
from detkit.utils.text import file_stem

Change = dict[str, Any]


def write_cleaned(
    report: Report, output: Path, *, needs_masks: bool = False
) -> tuple[list[dict[str, Any]], list[Change]]:
    """Write the data sets of a report without what was found, where that can be mended.

    Args:
        report: Its records stay as they are.
        output: The folder, empty or not there.
        needs_masks: Whether objects whose mask cannot be used are left out.

    Returns:
        An entry for DATASETS.REGISTER per data set that has images left, and all changes: data set,
        file, annotation, kind of fault, and what was done.
    """
    entries, changes = [], []
    for name, records in report.records.items():
        for fault in report.faults[name]:
            done = f"as the reader leaves it: {fault.message}"
            changes.append(_change(name, fault.file, fault.annotation, fault.code, done))
        kept = _cleaned(report, name, records, changes, needs_masks=needs_masks)
        if not kept:
            changes.append(
                _change(name, "", None, "empty-data-set", "not written: no image is left")
            )
            continue
        entry, lost = write_dataset(name, kept, str(output), "coco", file_stem(name))
        for what, count in lost.items():
            done = f"not written, COCO's format has none: {count} {what}"
            changes.append(_change(name, "", None, "format", done))
        if MetadataCatalog.get(name).get("evaluator_type") == "pascal_voc":
            entry["evaluator"] = "pascal_voc"
        entries.append({"name": f"{name}_clean", **entry})
    return entries, changes


def _change(dataset: str, file: str, annotation: Any, code: str, done: str) -> Change:
    return {
        "dataset": dataset,
        "file": file,
        "annotation": annotation,
        "code": code,
        "change": done,
    }


def _cleaned(
    report: Report,
    name: str,
    records: list[ImageRecord],
    changes: list[Change],
    *,
    needs_masks: bool,
) -> list[ImageRecord]:
    dropped_images: set[int] = set()
    dropped_objects: set[tuple[int, int]] = set()
    cleaned = [record.copy() for record in records]
    for record in cleaned:
        if "annotations" in record:
            record["annotations"] = [a.copy() for a in record["annotations"]]
    for finding in report.findings.of(name):
        for i, j in finding.places if finding.fix else ():
            record = cleaned[i]
            annotation = record.get("annotations", [])[j] if j >= 0 else None
            if finding.fix == "drop-image":
                dropped_images.add(i)
                done = "image left out"
            elif annotation is None:
                height, width = read_image_size(record["file_name"])
                done = f"size set to {width}x{height}"
                record["height"], record["width"] = height, width
            elif finding.fix == "drop-object":
                dropped_objects.add((i, j))
                done = "annotation left out"
            else:
                done = _MENDS[finding.fix](record, annotation)
            which = None if annotation is None else annotation.get("id", f"object {j + 1}")
            changes.append(_change(name, record["file_name"], which, finding.code, done))
    kept = []
    for i, record in enumerate(cleaned):
        if i in dropped_images:
            continue
        for j, annotation in enumerate(record.get("annotations", ()) if needs_masks else ()):
            # Readers leave an empty list where a mask had nothing that can be used.
            mask = annotation.get("segmentation")
            if isinstance(mask, list) and not mask and (i, j) not in dropped_objects:
                dropped_objects.add((i, j))
                which = annotation.get("id", f"object {j + 1}")
                done = "annotation left out, which has no usable mask"
                changes.append(_change(name, record["file_name"], which, "missing-mask", done))
        if "annotations" in record:
            record["annotations"] = [
                a for j, a in enumerate(record["annotations"]) if (i, j) not in dropped_objects
            ]
        kept.append(record)
    return kept


def _clip_box(record: ImageRecord, annotation: AnnotationRecord) -> str:
    box = BoxMode.convert(list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS)
    return _set_box(record, annotation, box, "box clipped")


def _box_of_mask(record: ImageRecord, annotation: AnnotationRecord) -> str:
    mask = annotation.get("segmentation")
    assert isinstance(mask, list)  # the kind of fault is of polygons alone
    box = hull([value for polygon in mask for value in polygon])
    return _set_box(record, annotation, box, "box drawn around the mask")


def _set_box(record: ImageRecord, annotation: AnnotationRecord, box: Any, done: str) -> str:
    limits = np.array([record.get("width", np.inf), record.get("height", np.inf)] * 2)
    before = [round(float(v), 2) for v in annotation["bbox"]]
    annotation["bbox"] = np.clip(np.array(box, dtype=float), 0, limits).tolist()
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return f"{done}: {before} to {[round(v, 2) for v in annotation['bbox']]}"


def _drop_mask(_: ImageRecord, annotation: AnnotationRecord) -> str:
    annotation.pop("segmentation", None)
    return "mask left out"


_MENDS: dict[str, Callable[[ImageRecord, AnnotationRecord], str]] = {
    "clip-box": _clip_box,
    "box-of-mask": _box_of_mask,
    "drop-mask": _drop_mask,
}
