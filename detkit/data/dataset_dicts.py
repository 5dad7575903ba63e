"""The records of one or several data sets, checked and reported on before training.

Legend: K classes, M annotations over all images.
"""

import copy
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from torch.utils.data import ConcatDataset, Dataset

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.data_report import (
    CROWDS_HINT,
    EDGE_TOLERANCE,
    DataReport,
    counted,
    log_report,
    print_instances_class_histogram,
)
from detkit.data.proposals import load_proposals_into_dataset
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, as_flag
from detkit.utils.env import garbage_collection_off
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.text import cut, listed, shortened

logger = logging.getLogger(__name__)

ROI_HEADS_KEY = "MODEL.ROI_HEADS.NUM_CLASSES"
SEM_SEG_HEAD_KEY = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"
# Metadata that tell where a data set comes from.
_SOURCES = ("json_file", "panoptic_json", "dirname", "image_root")
_ONLY_CROWDS = "regions of crowds only"
_CHECKED_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
# Images whose boxes are checked in one array: tables of all boxes of a million images would take as
# much memory as the records.
_IMAGES_AT_A_TIME = 4096


@garbage_collection_off()
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
    model_classes: Sequence[str] = (),
    model_stuff_classes: Sequence[str] = (),
    model_keypoints: Sequence[str] = (),
    needs_masks: bool = False,
    uses: Sequence[str] = ("boxes",),
    with_names: bool = False,
) -> list[ImageRecord]:
    """Return the records of one or several data sets, one after the other.

    What they hold, and what was left out, is logged.

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
        num_stuff_classes_key: The config key that sets their number, for messages.
        model_classes: Names of the model's classes, which test sets must have in the same order;
            those that find their classes in their files then match them by name. Empty if unknown.
        model_stuff_classes: Likewise of its semantic head, by the order alone.
        model_keypoints: Likewise of its keypoints.
        needs_masks: Whether every object that is trained on must have a mask.
        uses: What a model takes of the objects, of "boxes", "polygons" and "keypoints".
        with_names: Whether records get the name of their data set, as `dataset_name`.

    Returns:
        The records; as they are, data sets of torch that users have registered instead.

    Raises:
        UnknownNameError: A name is not registered.
        ConfigError: No name is given, the number of proposal files differs, or the data sets have
            different classes.
        ConfigError: A data set does not fit K or `num_stuff_classes`, or lacks masks.
        ConfigError: The stuff classes or keypoints of a data set are not those of the model.
        DataError: A data set has no image, a proposal file does not fit, or no image is left; or
            its coordinates are fractions of the image.
    """
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise ConfigError(
            "no data set is named: set DATASETS.TRAIN or DATASETS.TEST to registered names"
        )
    if proposal_files is not None and len(proposal_files) != len(names):
        raise ConfigError(
            "need a proposal file (DATASETS.PROPOSAL_FILES_*) per data set: got"
            f" {len(proposal_files)} files for {len(names)} data sets ({', '.join(names)})"
        )
    for name in names if model_classes else ():
        _expect_classes(name, model_classes)
    per_name = {name: _load(name) for name in names}
    _check_same_classes(names)
    own = [records for records in per_name.values() if isinstance(records, Dataset)]
    if own:  # torch's data sets, which are not looked into
        return cast(Any, own[0] if len(per_name) == 1 else ConcatDataset(own))
    for name, records in per_name.items():
        if model_classes:
            _check_class_order(name, model_classes)
        _check_same_names(name, "stuff_classes", model_stuff_classes)
        _check_same_names(name, "keypoint_names", model_keypoints)
        if num_classes is not None:
            check_dataset_against_model(name, records, num_classes, num_classes_key)
        if num_stuff_classes is not None:
            _check_stuff_against_model(name, num_stuff_classes, num_stuff_classes_key)
        if needs_masks:
            _check_masks(name, records)
        for kind in uses:
            check_not_fractions(name, records, kind)
    all_records: list[ImageRecord] = []
    for number, name in enumerate(names):
        records = per_name[name]
        if proposal_files:
            records = load_proposals_into_dataset(records, proposal_files[number])
        if with_names:
            records = [copy.copy(record) for record in records]
            for record in records:
                record["dataset_name"] = name
        all_records += records
    report = DataReport(names)
    all_records = _without_bad_objects(all_records, report, needs_masks=needs_masks)
    all_records = _filtered(all_records, filter_empty, min_keypoints, report)
    log_report(report)
    if not all_records:
        raise DataError(_nothing_left(report))
    if any("annotations" in record for record in all_records):
        class_names = MetadataCatalog.get(names[0]).get("thing_classes")
        print_instances_class_histogram(all_records, class_names)
    return all_records


def _load(name: str) -> list[ImageRecord]:
    records = DatasetCatalog.get(name)
    if not records:
        metadata = MetadataCatalog.get(name)
        source = next((metadata.get(key) for key in _SOURCES if metadata.get(key)), None)
        raise DataError(
            f"data set {name!r} has no images" + (f": {source} lists none" if source else "")
        )
    return records


def _check_same_classes(names: Sequence[str]) -> None:
    for name, key in itertools.product(names[1:], ("thing_classes", "stuff_classes")):
        first, classes = (MetadataCatalog.get(n).get(key) for n in (names[0], name))
        if classes != first:
            raise ConfigError(
                "data sets that are used together need the same classes in the same order:"
                f" {names[0]!r} has {first}, {name!r} has {classes}"
            )


def _expect_classes(name: str, model_classes: Sequence[str]) -> None:
    """Have a data set number its classes as a model does, if its loader can choose."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        metadata.set(model_classes=list(model_classes))


def _check_class_order(name: str, model_classes: Sequence[str]) -> None:
    found = MetadataCatalog.get(name).get("thing_classes")
    # Things come first where stuff is listed with them.
    if found is None or list(found[: len(model_classes)]) == list(model_classes):
        return
    raise ConfigError(
        f"data set {name!r} does not have the model's classes in the model's order. The model, as"
        f" its training data: {cut(', '.join(model_classes), 300)}. {name!r}:"
        f" {cut(', '.join(found), 300)}. Scores would compare different classes: give its entry"
        f" under DATASETS.REGISTER `classes: [{cut(', '.join(model_classes), 300)}]`"
    )


def _check_same_names(name: str, key: str, expected: Sequence[str]) -> None:
    found = MetadataCatalog.get(name).get(key)
    if not expected or not found or list(found) == list(expected):
        return
    kind, field = ("stuff classes", "classes") if key == "stuff_classes" else ("keypoints",) * 2
    raise ConfigError(
        f"data set {name!r} does not have the model's {kind} in the model's order. The model, as"
        f" its training data: {cut(', '.join(expected), 300)}. {name!r}:"
        f" {cut(', '.join(found), 300)}. Scores would compare different ones: bring them into"
        f" one order, in the files and in `{field}` of the entries under DATASETS.REGISTER"
    )


def check_dataset_against_model(
    dataset_name: str,
    records: Sequence[ImageRecord],
    num_classes: int,
    num_classes_key: str = ROI_HEADS_KEY,
) -> None:
    """Check that a data set's classes are those of a model.

    On a GPU, a class id out of range would end the process in the middle of a step, with a message
    that does not name it.

    Args:
        dataset_name: Its registered name, whose metadata may have `thing_classes`.
        records: Its images.
        num_classes: K, from the config.
        num_classes_key: The config key that sets K.

    Raises:
        ConfigError: A class id lies outside of [0, K); the message names the ids and files.
        ConfigError: The data set has another number of class names than K.
    """
    names = MetadataCatalog.get(dataset_name).get("thing_classes")
    stray = _stray_class_ids(records, num_classes)
    if not stray and (names is None or len(names) == num_classes):
        return
    problems = []
    if stray:
        found = "; ".join(
            f"{class_id!r} ({counted(count, 'object', 'objects')}, first in {file})"
            for class_id, (count, file) in stray.items()
        )
        problems.append(f"has class ids outside of the range 0 to {num_classes - 1}: {found}")
    if names is not None and len(names) != num_classes:
        problems.append(
            f"has {len(names)} classes ({cut(', '.join(names), 300)}), the model {num_classes}"
        )
    if names is not None and not any(is_stray(class_id, len(names)) for class_id in stray):
        advice = f"set {num_classes_key} to {len(names)}"
        used = {a["category_id"] for record in records for a in record.get("annotations", ())}
        unused = [name for k, name in enumerate(names) if k not in used]
        if len(names) - len(unused) == num_classes:
            kept = ", ".join(name for name in names if name not in unused)
            # Exports of Roboflow begin with such a class, which is the name of the project.
            advice += (
                f", or leave out {listed(unused)}, of which there is no object: `classes: [{kept}]`"
                " in the entry of the data set under DATASETS.REGISTER"
            )
    elif names is None and all(isinstance(k, int) and k >= 0 for k in stray):
        advice = f"set {num_classes_key} to at least {max(int(str(k)) for k in stray) + 1}"
    else:
        advice = (
            f"correct the ids, which must count from 0, and set {num_classes_key} to the number of"
            " classes"
        )
    raise ConfigError(
        f"data set {dataset_name!r} does not fit the model: it {'; it '.join(problems)}."
        f" {num_classes_key} is {num_classes}; {advice}."
    )


def _check_stuff_against_model(name: str, num_classes: int, key: str) -> None:
    classes = MetadataCatalog.get(name).get("stuff_classes")
    if classes is not None and len(classes) != num_classes:
        raise ConfigError(
            f"data set {name!r} does not fit the model: it has {len(classes)} stuff classes"
            f" ({cut(', '.join(classes), 300)}), the model {num_classes}; set {key}"
            f" to {len(classes)}."
        )


def _check_masks(name: str, records: Sequence[ImageRecord]) -> None:
    lacking = [
        _where(record, index)
        for record in records
        for index, annotation in enumerate(record.get("annotations", ()))
        if "segmentation" not in annotation and not as_flag(annotation.get("iscrowd"))
    ]
    if lacking:
        raise ConfigError(
            f"MODEL.MASK_ON needs a mask (segmentation) for every object, but {len(lacking)}"
            f" objects of data set {name!r} have none: {listed(lacking)}"
        )


def check_not_fractions(name: str, records: Sequence[ImageRecord], kind: str) -> None:
    """Refuse a data set whose boxes, polygons or keypoints all lie within the first pixel."""
    numbers_of, first = _NUMBERS_OF[kind], None
    for record in records:
        for index, annotation in enumerate(record.get("annotations", ())):
            numbers = numbers_of(annotation)
            if not numbers:
                continue
            if not max(numbers) <= 1:
                return  # at the first object, as a rule
            first = first or f"{_where(record, index)}: {shortened(list(numbers), 80)}"
    if first is not None:
        raise DataError(
            f"all {kind} of data set {name!r} lie within the first pixel of their image, such as"
            f" that of {first}. They are probably fractions of the image: multiply x and width by"
            " the width of the image, y and height by its height"
        )


def _box_corner(annotation: AnnotationRecord) -> Sequence[float]:
    """Return the lower right corner of a box; far away where its form is not checked."""
    x0, y0, x1, y1, *_ = (*annotation["bbox"], 0, 0, 0, 0)
    if annotation["bbox_mode"] == BoxMode.XYWH_ABS:
        return (x0 + x1, y0 + y1)
    return (x1, y1) if annotation["bbox_mode"] in _CHECKED_MODES else (np.inf,)


def _polygon_numbers(annotation: AnnotationRecord) -> Sequence[float]:
    mask = annotation.get("segmentation")
    if not isinstance(mask, list):
        return () if mask is None else (np.inf,)
    return [number for polygon in mask for number in polygon]


def _keypoint_numbers(annotation: AnnotationRecord) -> Sequence[float]:
    """Return x and y of the labelled keypoints, as in the file, which counts pixels from 0."""
    points = list(annotation.get("keypoints", ()))
    labelled = zip(points[0::3], points[1::3], points[2::3], strict=False)
    return [number - 0.5 for x, y, visibility in labelled if visibility > 0 for number in (x, y)]


# The coordinates of an object; empty if it has none.
_NUMBERS_OF = {
    "boxes": _box_corner,
    "polygons": _polygon_numbers,
    "keypoints": _keypoint_numbers,
}


def _stray_class_ids(
    records: Sequence[ImageRecord], num_classes: int
) -> dict[object, tuple[int, str]]:
    """Return stray class id -> the number of its objects, and the first file that shows one."""
    ids = [a["category_id"] for record in records for a in record.get("annotations", ())]
    # Nearly always, and seven times as fast as to look at each one.
    if set(map(type, ids)) <= {int} and (not ids or (min(ids) >= 0 and max(ids) < num_classes)):
        return {}
    stray: dict[object, tuple[int, str]] = {}
    for record in records:
        for annotation in record.get("annotations", ()):
            class_id = annotation["category_id"]
            if isinstance(class_id, bool) or is_stray(class_id, num_classes):
                count, file = stray.get(class_id, (0, record["file_name"]))
                stray[class_id] = (count + 1, file)
    return dict(sorted(stray.items(), key=lambda entry: str(entry[0])))


def is_stray(class_id: object, num_classes: int) -> bool:
    """Return whether a class id lies outside of [0, `num_classes`), or is no integer."""
    return not isinstance(class_id, int | np.integer) or not 0 <= class_id < num_classes


def filter_images_with_only_crowd_annotations(
    dataset_dicts: Sequence[ImageRecord],
) -> list[ImageRecord]:
    """Return the images that show an object that is not a crowd region."""
    return [record for record in dataset_dicts if _has_object(record)]


def filter_images_with_few_keypoints(
    dataset_dicts: Sequence[ImageRecord], min_keypoints_per_image: int
) -> list[ImageRecord]:
    """Return the images with at least so many visible keypoints over all of their objects."""
    return [r for r in dataset_dicts if _num_visible_keypoints(r) >= min_keypoints_per_image]


def _has_object(record: ImageRecord) -> bool:
    return not all(as_flag(a.get("iscrowd")) for a in record.get("annotations", ()))


def _num_visible_keypoints(record: ImageRecord) -> int:
    num_visible = 0
    for annotation in record.get("annotations", ()):
        num_visible += sum(v > 0 for v in annotation.get("keypoints", [])[2::3])
    return num_visible


def _filtered(
    records: list[ImageRecord], filter_empty: bool, min_keypoints: int, report: DataReport
) -> list[ImageRecord]:
    """Leave out what the settings ask for, and note how many images for which reason."""
    steps: list[tuple[str, Callable[[ImageRecord], bool]]] = []
    # Data sets of label maps alone have no annotations at all, and lack nothing.
    if filter_empty and any("annotations" in record for record in records):
        steps.append(("no annotation with a usable box", lambda r: bool(r.get("annotations"))))
        steps.append((_ONLY_CROWDS, _has_object))
    if min_keypoints > 0:
        reason = f"fewer than {min_keypoints} visible keypoints"
        steps.append((reason, lambda r: _num_visible_keypoints(r) >= min_keypoints))
    for reason, is_kept in steps:
        kept = [record for record in records if is_kept(record)]
        if len(kept) < len(records):
            report.dropped_images[reason] = len(records) - len(kept)
        records = kept
    return records


def _without_bad_objects(
    records: list[ImageRecord], report: DataReport, *, needs_masks: bool
) -> list[ImageRecord]:
    """Leave out annotations whose box or mask cannot be used, and fill in the report.

    The records are not changed.
    """
    report.num_images = len(records)
    kept: list[ImageRecord] = []
    for start in range(0, len(records), _IMAGES_AT_A_TIME):
        chunk = records[start : start + _IMAGES_AT_A_TIME]
        for i, bad in _bad_objects(chunk, report, needs_masks=needs_masks).items():
            chunk[i] = record = chunk[i].copy()
            annotations = enumerate(record.get("annotations", []))
            record["annotations"] = [a for j, a in annotations if j not in bad]
        kept += chunk
    return kept


def _bad_objects(
    records: Sequence[ImageRecord], report: DataReport, *, needs_masks: bool
) -> dict[int, set[int]]:
    """Add to the report; return place of an image -> places of its annotations to be left out."""
    counts = [len(record.get("annotations", ())) for record in records]
    annotations = [a for record in records for a in record.get("annotations", ())]
    image_of = np.repeat(np.arange(len(records)), counts)
    firsts = np.cumsum(counts) - counts
    report.num_annotations += len(annotations)
    boxes, is_checked = stacked_boxes(annotations)
    sizes = [(record.get("width", np.inf), record.get("height", np.inf)) for record in records]
    limits = np.array(sizes, dtype=np.float64)[image_of]

    def places(mask: np.ndarray) -> list[tuple[int, int]]:
        return [(int(image_of[k]), int(k - firsts[image_of[k]])) for k in np.flatnonzero(mask)]

    def named(mask: np.ndarray) -> list[str]:
        return [_where(records[i], j) for i, j in places(mask)]

    bad = np.zeros(len(annotations), dtype=bool)
    # Each annotation is counted for its first problem only.
    for reason, mask in box_problems(boxes, limits).items():
        mask = mask & is_checked & ~bad
        report.add_boxes(reason, named(mask))
        bad |= mask
    if needs_masks:
        # Readers leave an empty list where a mask had nothing that can be used.
        has_no_mask = np.array([_is_empty_mask(a) for a in annotations], dtype=bool) & ~bad
        report.add_boxes("mask has nothing that can be used", named(has_no_mask))
        bad |= has_no_mask
    over_edge = (boxes[:, :2] < -EDGE_TOLERANCE) | (boxes[:, 2:] > limits + EDGE_TOLERANCE)
    # Corners of rotated boxes do, of objects that do not.
    is_upright = np.array([len(a["bbox"]) == 4 for a in annotations], dtype=bool)
    report.sticking_out += named(np.any(over_edge, axis=1) & is_checked & is_upright & ~bad)
    is_crowd = np.array([as_flag(a.get("iscrowd")) for a in annotations], dtype=bool)
    report.num_crowd += int((is_crowd & ~bad).sum())
    left_out: defaultdict[int, set[int]] = defaultdict(set)
    for i, j in places(bad):
        left_out[i].add(j)
    return left_out


def _is_empty_mask(annotation: AnnotationRecord) -> bool:
    """Return whether an object has a mask without polygons."""
    mask = annotation.get("segmentation")
    return isinstance(mask, list) and not mask


def stacked_boxes(annotations: Sequence[AnnotationRecord]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes, (M, 4) XYXY, and (M,) which can be checked: those in absolute pixels.

    Of a rotated box that is the upright one around it.
    """
    modes = np.array([int(annotation["bbox_mode"]) for annotation in annotations], dtype=np.int64)
    is_checked = np.isin(modes, _CHECKED_MODES)
    is_rotated = modes == BoxMode.XYWHA_ABS
    # Others are replaced by a box that passes all checks.
    values = [
        a["bbox"] if ok else (0, 0, 1, 1) for a, ok in zip(annotations, is_checked, strict=True)
    ]
    boxes = np.array(values, dtype=np.float64).reshape(-1, 4)
    if is_rotated.any():
        given = [a["bbox"] for a, yes in zip(annotations, is_rotated, strict=True) if yes]
        rotated = np.array(given, dtype=np.float64)
        upright = BoxMode.convert(rotated, BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS)
        # The upright box around a line has an area.
        is_flat = (rotated[:, 2:4] <= 0).any(axis=1)
        upright[is_flat, 2:] = upright[is_flat, :2]
        boxes[is_rotated], is_checked = upright, is_checked | is_rotated
    is_xywh = modes == BoxMode.XYWH_ABS
    boxes[is_xywh, 2:] += boxes[is_xywh, :2]
    return boxes, is_checked


def box_problems(boxes: np.ndarray, sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Return reason -> (M,) bool, for boxes (M, 4) XYXY and sizes (M, 2), width before height."""
    # NaN compares as false, so that such boxes are reported as not finite alone.
    with np.errstate(invalid="ignore"):
        return {
            "box is not finite": np.any(~np.isfinite(boxes), axis=1),
            "box has no area": np.any(boxes[:, 2:] <= boxes[:, :2], axis=1),
            "box lies outside of the image": np.any(
                (boxes[:, 2:] <= 0) | (boxes[:, :2] >= sizes), axis=1
            ),
        }


def _where(record: ImageRecord, index: int) -> str:
    annotation = record.get("annotations", [])[index]
    which = f"annotation {annotation['id']}" if "id" in annotation else f"object {index + 1}"
    return f"{which} of {record['file_name']}"


def _nothing_left(report: DataReport) -> str:
    reasons = [f"{count} images: {reason}" for reason, count in report.dropped_images.items()]
    reasons += [f"{len(where)} boxes: {reason}" for reason, where in report.dropped_boxes.items()]
    crowds = CROWDS_HINT if _ONLY_CROWDS in report.dropped_images else ""
    return (
        f"no usable image in {', '.join(map(repr, report.names))}: all {report.num_images} were"
        f" left out ({'; '.join(reasons)}).{crowds} DATALOADER.FILTER_EMPTY_ANNOTATIONS"
        " False keeps images without objects, in keypoint models with"
        " MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE 0."
    )
