"""The records of one or several data sets, checked and reported on before anything is trained.

Legend: K classes, M annotations over all images.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.data_report import (
    EDGE_TOLERANCE,
    DataReport,
    listed,
    log_report,
    print_instances_class_histogram,
)
from detkit.data.proposals import load_proposals_into_dataset
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord

logger = logging.getLogger(__name__)

ROI_HEADS_KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
SEM_SEG_HEAD_KEY = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
# Where metadata say that a data set comes from.
_SOURCES = ("json_file", "panoptic_json", "dirname", "image_root")
_CHECKED_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)


def get_detection_dataset_dicts(
    names: str | Sequence[str],
    filter_empty: bool = True,
    min_keypoints: int = 0,
    proposal_files: Sequence[str] | None = None,
    *,
    num_classes: int | None = None,
    num_classes_key: str = ROI_HEADS_KEY,
    num_stuff_classes: int | None = None,
    num_stuff_classes_key: str = SEM_SEG_HEAD_KEY,
    needs_masks: bool = False,
) -> list[ImageRecord]:
    """Return the records of one or several data sets, one after the other, and log what they hold and what was left out.

    Args:
        names: Registered names.
        filter_empty: Leave out images without an object that can be trained on.
        min_keypoints: Leave out images with fewer visible keypoints.
        proposal_files: Precomputed proposals, one file per data set; see
            `load_proposals_into_dataset`.
        num_classes: K of the model, to check the data sets against; None does not check.
        num_classes_key: The config key that sets K, for messages.
        num_stuff_classes: Classes of the model's semantic head, to check the data sets against;
            None does not check.
        num_stuff_classes_key: The config key that sets them, for messages.
        needs_masks: Whether every object that is trained on must have a mask.

    Raises:
        KeyError: A name is not registered.
        ValueError: A data set has no image, the data sets have different classes, they do not fit
            K, objects lack masks, a proposal file does not fit, or no image is left.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ValueError(
            "no data set is named: set DATASETS.TRAIN or DATASETS.TEST to registered names"
        )
    if proposal_files is not None and len(proposal_files) != len(names):
        raise ValueError(
            "need a proposal file (DATASETS.PROPOSAL_FILES_*) per data set: got"
            f" {len(proposal_files)} files for {len(names)} data sets ({', '.join(names)})"
        )
    per_name = [(name, _load(name)) for name in names]
    _require_same_classes(names)
    if num_classes is not None:
        for name, records in per_name:
            check_dataset_against_model(name, records, num_classes, num_classes_key)
    if num_stuff_classes is not None:
        _check_stuff_against_model(names, num_stuff_classes, num_stuff_classes_key)
    if needs_masks:
        for name, records in per_name:
            _require_masks(name, records)
    if proposal_files:
        per_name = [
            (name, load_proposals_into_dataset(records, file))
            for (name, records), file in zip(per_name, proposal_files, strict=True)
        ]
    report = DataReport(names)
    records = _without_bad_boxes(
        list(itertools.chain.from_iterable(records for _, records in per_name)), report
    )
    records = _filtered(records, filter_empty, min_keypoints, report)
    log_report(report)
    if not records:
        raise ValueError(_nothing_left(report))
    if any("annotations" in record for record in records):
        print_instances_class_histogram(records, MetadataCatalog.get(names[0]).get("thing_classes"))
    return records


def _load(name: str) -> list[ImageRecord]:
    records = DatasetCatalog.get(name)
    if not records:
        metadata = MetadataCatalog.get(name)
        source = next((metadata.get(key) for key in _SOURCES if metadata.get(key)), None)
        raise ValueError(
            f"data set {name!r} has no images" + (f": {source} lists none" if source else "")
        )
    return records


def _require_same_classes(names: Sequence[str]) -> None:
    classes = {name: MetadataCatalog.get(name).get("thing_classes") for name in names}
    for name in names[1:]:
        if classes[name] != classes[names[0]]:
            raise ValueError(
                "data sets that are used together need the same classes in the same order:"
                f" {names[0]!r} has {classes[names[0]]}, {name!r} has {classes[name]}"
            )


def check_dataset_against_model(
    dataset_name: str,
    records: Sequence[ImageRecord],
    num_classes: int,
    num_classes_key: str = ROI_HEADS_KEY,
) -> None:
    """Check that a data set's classes are those that a model has.

    On a GPU, a class id out of range would end the process in the middle of a step, with a message
    that does not name it.

    Args:
        dataset_name: Its registered name, whose metadata may have `thing_classes`.
        records: Its images.
        num_classes: K, from the config.
        num_classes_key: The config key that sets K.

    Raises:
        ValueError: A class id lies outside of [0, K), or the data set names another number of
            classes than K. The message names the data set, the ids, the range and the key.
    """
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    stray = _stray_class_ids(records, num_classes)
    if not stray and (names is None or len(names) == num_classes):
        return
    problems = []
    if stray:
        listed = "; ".join(
            f"{class_id!r} ({count} objects, first in {file})"
            for class_id, (count, file) in stray.items()
        )
        problems.append(f"has class ids outside of the range 0 to {num_classes - 1}: {listed}")
    if names is not None and len(names) != num_classes:
        problems.append(
            f"has {len(names)} classes ({_shortened(', '.join(names))}), the model {num_classes}"
        )
    raise ValueError(
        f"data set {dataset_name!r} does not fit the model: it {'; it '.join(problems)}."
        f" {num_classes_key} is {num_classes}{_advice(names, stray, num_classes_key)}."
    )


def _check_stuff_against_model(
    names: Sequence[str], num_classes: int, num_classes_key: str
) -> None:
    for name in names:
        classes = MetadataCatalog.get(name).get("stuff_classes")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"data set {name!r} does not fit the model: it has {len(classes)} stuff classes"
                f" ({_shortened(', '.join(classes))}), the model {num_classes}; set"
                f" {num_classes_key} to {len(classes)}."
            )


def _require_masks(name: str, records: Sequence[ImageRecord]) -> None:
    lacking = [
        _where(record, index)
        for record in records
        for index, annotation in enumerate(record.get("annotations", ()))
        if "segmentation" not in annotation and annotation.get("iscrowd", 0) == 0
    ]
    if lacking:
        raise ValueError(
            f"MODEL.MASK_ON needs a mask (segmentation) for every object, but {len(lacking)}"
            f" objects of data set {name!r} have none: {listed(lacking)}"
        )


def _stray_class_ids(
    records: Iterable[ImageRecord], num_classes: int
) -> dict[object, tuple[int, str]]:
    """Class id outside of [0, K) -> how many objects have it, and the first file that shows one."""
    stray: dict[object, tuple[int, str]] = {}
    for record in records:
        for annotation in record.get("annotations", ()):
            class_id = annotation["category_id"]
            is_integer = isinstance(class_id, int | np.integer) and not isinstance(class_id, bool)
            if not is_integer or not 0 <= class_id < num_classes:
                count, file = stray.get(class_id, (0, record["file_name"]))
                stray[class_id] = (count + 1, file)
    return dict(sorted(stray.items(), key=lambda entry: str(entry[0])))


def _advice(names: Sequence[str] | None, stray: dict[object, tuple[int, str]], key: str) -> str:
    if names is not None and not any(_exceeds(class_id, len(names)) for class_id in stray):
        return f"; set {key} to {len(names)}"
    if names is None and all(isinstance(class_id, int) and class_id >= 0 for class_id in stray):
        return f"; set {key} to at least {max(int(str(class_id)) for class_id in stray) + 1}"
    return f"; correct the ids, which must count from 0, and set {key} to the number of classes"


def _exceeds(class_id: object, num_classes: int) -> bool:
    return not isinstance(class_id, int | np.integer) or not 0 <= class_id < num_classes


def filter_images_with_only_crowd_annotations(
    dataset_dicts: Sequence[ImageRecord],
) -> list[ImageRecord]:
    """Return the images that show an object, leaving out those without annotations or with regions
    of crowds alone.
    """
    return [record for record in dataset_dicts if _has_object(record)]


def filter_images_with_few_keypoints(
    dataset_dicts: Sequence[ImageRecord], min_keypoints_per_image: int
) -> list[ImageRecord]:
    """Return the images with at least so many visible keypoints over all of their objects."""
    return [
        record
        for record in dataset_dicts
        if _num_visible_keypoints(record) >= min_keypoints_per_image
    ]


def _has_object(record: ImageRecord) -> bool:
    return any(annotation.get("iscrowd", 0) == 0 for annotation in record.get("annotations", ()))


def _num_visible_keypoints(record: ImageRecord) -> int:
    visibilities = (
        annotation.get("keypoints", [])[2::3] for annotation in record.get("annotations", ())
    )
    return sum(v > 0 for v in itertools.chain.from_iterable(visibilities))


def _filtered(
    records: list[ImageRecord], filter_empty: bool, min_keypoints: int, report: DataReport
) -> list[ImageRecord]:
    """Leave out what the settings ask for, and note how many images for which reason."""
    steps: list[tuple[str, Callable[[ImageRecord], bool]]] = []
    # Data sets of label maps alone have no annotations anywhere, and lack nothing.
    if filter_empty and any("annotations" in record for record in records):
        steps.append(
            ("no annotation with a usable box", lambda record: bool(record.get("annotations")))
        )
        steps.append(("regions of crowds only", _has_object))
    if min_keypoints > 0:
        steps.append(
            (
                f"fewer than {min_keypoints} visible keypoints",
                lambda r: _num_visible_keypoints(r) >= min_keypoints,
            )
        )
    for reason, is_kept in steps:
        kept = [record for record in records if is_kept(record)]
        if len(kept) < len(records):
            report.dropped_images[reason] = len(records) - len(kept)
        records = kept
    return records


def _without_bad_boxes(records: list[ImageRecord], report: DataReport) -> list[ImageRecord]:
    """Leave out annotations whose box cannot be used, and fill in the report. The records are not
    changed.
    """
    places = [
        (i, j)
        for i, record in enumerate(records)
        for j in range(len(record.get("annotations", ())))
    ]
    annotations = [records[i].get("annotations", [])[j] for i, j in places]
    report.num_images, report.num_annotations = len(records), len(annotations)
    boxes, is_checked = _stacked_boxes(annotations)
    sizes = np.array([_known_size(records[i]) for i, _ in places], dtype=np.float64).reshape(-1, 2)
    bad = np.zeros(len(annotations), dtype=bool)
    for reason, mask in _box_problems(boxes, sizes).items():
        mask = mask & is_checked & ~bad
        report.add_boxes(
            reason, [_where(records[places[k][0]], places[k][1]) for k in np.flatnonzero(mask)]
        )
        bad |= mask
    sticks_out = _sticks_out(boxes, sizes) & is_checked & ~bad
    report.sticking_out = [
        _where(records[places[k][0]], places[k][1]) for k in np.flatnonzero(sticks_out)
    ]
    report.num_crowd = sum(
        a.get("iscrowd", 0) != 0 for a, is_bad in zip(annotations, bad, strict=True) if not is_bad
    )
    return _without(records, [places[k] for k in np.flatnonzero(bad)])


def _without(records: list[ImageRecord], places: Sequence[tuple[int, int]]) -> list[ImageRecord]:
    """Leave annotations out, given as index of record and annotation. The records are not changed."""
    left_out = set(places)
    records = list(records)
    for i in {i for i, _ in places}:
        record = records[i].copy()
        record["annotations"] = [
            a for j, a in enumerate(record.get("annotations", [])) if (i, j) not in left_out
        ]
        records[i] = record
    return records


def _stacked_boxes(annotations: Sequence[AnnotationRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes, (M, 4) XYXY, and (M,) which of them can be judged: upright ones in absolute
    pixels.
    """
    modes = np.array([int(annotation["bbox_mode"]) for annotation in annotations], dtype=np.int64)
    is_checked = np.isin(modes, _CHECKED_MODES)
    values = [
        a["bbox"] if ok else (0, 0, 1, 1) for a, ok in zip(annotations, is_checked, strict=True)
    ]
    boxes = np.array(values, dtype=np.float64).reshape(-1, 4)
    is_xywh = modes == BoxMode.XYWH_ABS
    boxes[is_xywh, 2:] += boxes[is_xywh, :2]
    return boxes, is_checked


def _known_size(record: ImageRecord) -> tuple[float, float]:
    return record.get("width", np.inf), record.get("height", np.inf)


def _box_problems(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Reason -> (M,) bool, for boxes (M, 4) XYXY in images of sizes (M, 2) width and height."""
    with np.errstate(invalid="ignore"):
        return {
            "box is not finite": np.any(~np.isfinite(boxes), axis=1),
            "box has no area": np.any(boxes[:, 2:] <= boxes[:, :2], axis=1),
            "box lies outside of the image": np.any(
                (boxes[:, 2:] <= 0) | (boxes[:, :2] >= sizes), axis=1
            ),
        }


def _sticks_out(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    return np.any(
        (boxes[:, :2] < -EDGE_TOLERANCE) | (boxes[:, 2:] > sizes + EDGE_TOLERANCE), axis=1
    )


def _where(record: ImageRecord, index: int) -> str:
    annotation = record.get("annotations", [])[index]
    which = f"annotation {annotation['id']}" if "id" in annotation else f"object {index + 1}"
    return f"{which} of {record['file_name']}"


def _nothing_left(report: DataReport) -> str:
    reasons = "; ".join(
        f"{count} images: {reason}" for reason, count in report.dropped_images.items()
    )
    boxes = "; ".join(
        f"{len(where)} boxes: {reason}" for reason, where in report.dropped_boxes.items()
    )
    return (
        f"no usable image in {', '.join(map(repr, report.names))}: all {report.num_images} were"
        f" left out ({reasons}{'; ' if boxes else ''}{boxes}). DATALOADER.FILTER_EMPTY_ANNOTATIONS"
        " False keeps images without objects, in keypoint models with"
        " MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE 0."
    )


def _shortened(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
