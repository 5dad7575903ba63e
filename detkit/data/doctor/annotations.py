"""Faults of annotations, of their classes, and of both against the config; no image is opened.

Legend: M annotations of a data set, N images, K classes.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from detkit.config import CfgNode, find_architecture
from detkit.data.catalog import MetadataCatalog
from detkit.data.data_report import EDGE_TOLERANCE
from detkit.data.dataset_dicts import box_problems, check_not_fractions, is_stray, stacked_boxes
from detkit.data.datasets.coco_export import annotation_area
from detkit.data.datasets.formats.collected import hull
from detkit.data.doctor.finding import Example, Findings
from detkit.data.transforms.build import build_test_resize
from detkit.structures import AnnotationRecord, BoxMode, ImageRecord, as_flag
from detkit.utils.errors import DataError
from detkit.utils.text import listed, near_misses

_PROBLEM_CODES = {
    "box is not finite": "box-not-finite",
    "box has no area": "box-without-area",
    "box lies outside of the image": "box-outside",
}
_CORNERS_SHARE = 0.2  # of the boxes stick out, where corners were stored as x, y, width, height
_SURE = 0.95  # share of boxes that must make sense as corners
_WHOLE = 0.99  # share of the sides of an image
_RARE = 10  # objects, of a class that has less than a hundredth of the most frequent one's
_MIN_MASK_OVERLAP = 0.5


@dataclass
class Objects:
    """The annotations of a data set in arrays."""

    name: str
    records: Sequence[ImageRecord]
    annotations: list[AnnotationRecord]
    image: np.ndarray
    """(M,) number of the record."""
    index: np.ndarray
    """(M,) number of the annotation in it."""
    boxes: np.ndarray
    """(M, 4) XYXY."""
    sizes: np.ndarray
    """(M, 2) width and height of the image, infinite if unknown."""
    is_crowd: np.ndarray
    """(M,) bool"""
    is_usable: np.ndarray
    """(M,) whether the box is in pixels; those with a fault are taken out as they are found."""

    def note(
        self,
        findings: Findings,
        code: str,
        mask: np.ndarray,
        detail: str = "",
        *,
        remedy: str = "",
    ) -> None:
        """Add the annotations of a (M,) mask to the findings."""
        for k in np.flatnonzero(mask).tolist():
            i, j = int(self.image[k]), int(self.index[k])
            box = self.boxes[k]
            shown = [round(float(v), 2) for v in box] if np.isfinite(box).all() else None
            where = self.annotations[k].get("id", f"object {j + 1}")
            example = Example(self.records[i]["file_name"], where, detail, shown)
            findings.add(code, self.name, example, place=(i, j), remedy=remedy)


def objects_of(name: str, records: Sequence[ImageRecord]) -> Objects:
    """Return the annotations of a data set in arrays."""
    counts = [len(record.get("annotations", ())) for record in records]
    annotations = [a for record in records for a in record.get("annotations", ())]
    image = np.repeat(np.arange(len(records)), counts)
    index = np.arange(len(annotations)) - np.repeat(np.cumsum(counts) - counts, counts)
    boxes, is_checked = stacked_boxes(annotations)
    sides = [(r.get("width", np.inf), r.get("height", np.inf)) for r in records]
    sizes = np.array(sides, dtype=float).reshape(-1, 2)[image]
    is_crowd = np.array([as_flag(a.get("iscrowd")) for a in annotations], dtype=bool)
    return Objects(name, records, annotations, image, index, boxes, sizes, is_crowd, is_checked)


def check_annotations(
    cfg: CfgNode, name: str, records: Sequence[ImageRecord], findings: Findings, *, is_train: bool
) -> Objects:
    """Look for faults in the annotations of a data set.

    Args:
        cfg: What they must fit.
        name: Of the data set, whose metadata are read.
        records: Its images.
        findings: Added to.
        is_train: Whether it is trained on.

    Returns:
        The annotations, for further checks.
    """
    objects = objects_of(name, records)
    _check_classes(cfg, objects, findings, is_train=is_train)
    _check_boxes(objects, findings)
    _check_copies(objects, findings)
    if cfg.MODEL.MASK_ON:
        _check_masks(objects, findings)
    if cfg.MODEL.KEYPOINT_ON:
        _check_keypoints(cfg, objects, findings)
    _check_counts(cfg, objects, findings, is_train=is_train)
    with np.errstate(invalid="ignore"):
        shorter = (objects.boxes[:, 2:] - objects.boxes[:, :2]).min(axis=1)
        is_tiny = shorter * resize_scales(cfg, objects.sizes) < 1
    objects.note(findings, "tiny-object", is_tiny & objects.is_usable)
    return objects


def resize_scales(cfg: CfgNode, sizes: np.ndarray) -> np.ndarray:
    """Return (M,) by how much the config's resize scales images of (M, 2) width and height."""
    resize, limits = build_test_resize(cfg), (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    scales = np.ones(len(sizes))
    if not limits[0]:  # images keep their size
        return scales
    known = np.isfinite(sizes).all(axis=1)
    found, inverse = np.unique(sizes[known], axis=0, return_inverse=True)
    shapes = [(height, width) for width, height in found.astype(int).tolist()]
    per_size = [resize.get_output_shape(*shape, *limits)[0] / shape[0] for shape in shapes]
    scales[known] = np.array(per_size, dtype=float)[inverse.reshape(-1)]
    return scales


def num_classes_of(cfg: CfgNode) -> tuple[str, int] | None:
    """Return the key of the model's number of classes and its value; None if it has none."""
    architecture = find_architecture(cfg.MODEL.META_ARCHITECTURE)
    key = architecture and architecture.num_classes
    return (key, cfg.get_by_full_key(key)) if key else None


def _check_classes(cfg: CfgNode, objects: Objects, findings: Findings, *, is_train: bool) -> None:
    name, names = objects.name, MetadataCatalog.get(objects.name).get("thing_classes")
    model = num_classes_of(cfg)
    limit = model[1] if model else len(names or ())
    if model and names is not None and len(names) != model[1]:
        detail = f"{len(names)} classes ({listed(names)}), the model {model[1]}"
        remedy = f"{model[0]}: {len(names)}"
        findings.add("class-count", name, Example(detail=detail), remedy=remedy)
        limit = len(names)
    if not limit:
        return
    stray = [is_stray(a["category_id"], limit) for a in objects.annotations]
    objects.note(findings, "class-id-range", np.array(stray, dtype=bool), f"need 0 to {limit - 1}")
    counts = objects_per_class(objects)
    for k, class_name in enumerate(names or ()):
        if is_train and 0 < counts[k] < _RARE and 100 * counts[k] < max(counts.values()):
            findings.add("rare-class", name, Example(detail=f"{class_name}: {counts[k]}"))
    plain = [_plain(n) for n in names or ()]
    for key, count in Counter(plain).items():
        if count > 1:
            alike = [n for n, p in zip(names or (), plain, strict=True) if p == key]
            findings.add("alike-class-names", name, Example(detail=", ".join(map(repr, alike))))


def objects_per_class(objects: Objects) -> Counter[int]:
    """Return class id -> number of objects, without crowds."""
    singles = zip(objects.annotations, objects.is_crowd, strict=True)
    return Counter(a["category_id"] for a, is_crowd in singles if not is_crowd)


def _plain(name: str) -> str:
    """Return a class name without what people write in different ways."""
    letters = "".join(c for c in name.casefold() if c.isalnum())
    return letters.removesuffix("s") if len(letters) > 3 else letters


def _check_boxes(objects: Objects, findings: Findings) -> None:
    boxes, sizes = objects.boxes, objects.sizes
    for kind in ("boxes", "polygons", "keypoints"):
        try:
            check_not_fractions(objects.name, objects.records, kind)
        except DataError as error:
            findings.add("boxes-as-fractions", objects.name, Example(detail=str(error)))
            objects.is_usable[:] = False
            return
    for reason, mask in box_problems(boxes, sizes).items():
        objects.note(findings, _PROBLEM_CODES[reason], mask & objects.is_usable)
        objects.is_usable &= ~mask
    is_upright = np.array([len(a["bbox"]) == 4 for a in objects.annotations], dtype=bool)
    with np.errstate(invalid="ignore"):
        beyond = (boxes[:, :2] < -EDGE_TOLERANCE) | (boxes[:, 2:] > sizes + EDGE_TOLERANCE)
        sides = boxes[:, 2:] - boxes[:, :2]
        whole = (sides >= _WHOLE * sizes).all(axis=1) & objects.is_usable & ~objects.is_crowd
    over = beyond.any(axis=1) & is_upright & objects.is_usable
    if _are_corners(objects, over):
        objects.note(findings, "boxes-as-corners", over)
        objects.is_usable[:] = False
        return
    objects.note(findings, "box-sticks-out", over)
    for k in np.flatnonzero(whole):
        # A mask shows that the object itself fills the image.
        mask = objects.annotations[k].get("segmentation")
        if isinstance(mask, np.ndarray) or mask:
            area = annotation_area({"segmentation": mask}, (0, 0, 0, 0))
            whole[k] = area >= _WHOLE * sides[k].prod()
    objects.note(findings, "whole-image-box", whole & ~over)


def _are_corners(objects: Objects, over: np.ndarray) -> bool:
    """Return whether x, y, width and height make sense as corners, and many boxes stick out."""
    modes = np.array([a["bbox_mode"] for a in objects.annotations], dtype=int)
    is_xywh = modes == BoxMode.XYWH_ABS
    if not is_xywh.any() or over[is_xywh].mean() <= _CORNERS_SHARE:
        return False
    start = objects.boxes[is_xywh, :2]
    given = objects.boxes[is_xywh, 2:] - start
    makes_sense = (given > start) & (given <= objects.sizes[is_xywh] + EDGE_TOLERANCE)
    return makes_sense.all(axis=1).mean() >= _SURE


def _check_copies(objects: Objects, findings: Findings) -> None:
    """Note boxes that an image has twice, to the pixel."""
    doubled, contradicting = (np.zeros(len(objects.image), dtype=bool) for _ in range(2))
    classes = [a["category_id"] for a in objects.annotations]
    first: dict[tuple[int, ...], int] = {}
    for k in np.flatnonzero(objects.is_usable & ~objects.is_crowd).tolist():
        corners = np.rint(objects.boxes[k]).tolist()
        other = first.setdefault((int(objects.image[k]), *corners), k)
        if other != k:
            (doubled if classes[other] == classes[k] else contradicting)[k] = True
    objects.note(findings, "doubled-box", doubled)
    objects.note(findings, "contradicting-box", contradicting)


def _check_masks(objects: Objects, findings: Findings) -> None:
    num = len(objects.image)
    missing, flat, apart = (np.zeros(num, dtype=bool) for _ in range(3))
    for k in range(num):
        mask = objects.annotations[k].get("segmentation")
        if mask is None:
            missing[k] = not objects.is_crowd[k]
        elif isinstance(mask, np.ndarray) or mask:
            x0, y0, x1, y1 = objects.boxes[k]
            area = annotation_area({"segmentation": mask}, (x0, y0, x1 - x0, y1 - y0))
            flat[k] = area <= 0
            apart[k] = area > 0 and isinstance(mask, list) and _is_apart(mask, objects.boxes[k])
    objects.note(findings, "missing-mask", missing)
    objects.note(findings, "mask-without-area", flat)
    objects.note(findings, "mask-off-box", apart & objects.is_usable)


def _is_apart(polygons: Sequence[Sequence[float]], box: np.ndarray) -> bool:
    """Return whether the hull of polygons overlaps a box by less than half."""
    a0, b0, a1, b1 = hull([value for polygon in polygons for value in polygon])
    x0, y0, x1, y1 = box
    common = max(min(a1, x1) - max(a0, x0), 0) * max(min(b1, y1) - max(b0, y0), 0)
    union = (a1 - a0) * (b1 - b0) + (x1 - x0) * (y1 - y0) - common
    return union > 0 and common < _MIN_MASK_OVERLAP * union


def _check_keypoints(cfg: CfgNode, objects: Objects, findings: Findings) -> None:
    needed = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    other, outside = (np.zeros(len(objects.image), dtype=bool) for _ in range(2))
    for k in range(len(objects.image)):
        points = np.array(objects.annotations[k].get("keypoints", ()), dtype=float).reshape(-1, 3)
        other[k] = len(points) not in (0, needed)
        labelled = points[points[:, 2] > 0, :2]
        limits = objects.sizes[k] + EDGE_TOLERANCE
        outside[k] = bool(((labelled < -EDGE_TOLERANCE) | (labelled > limits)).any())
    objects.note(findings, "keypoint-count", other, f"the model has {needed}")
    objects.note(findings, "keypoint-outside", outside)


def _check_counts(cfg: CfgNode, objects: Objects, findings: Findings, *, is_train: bool) -> None:
    """Note images by their number of objects."""
    name, records = objects.name, objects.records
    if not any("annotations" in record for record in records):
        return
    if len(objects.image) and objects.is_crowd.all():
        findings.add("only-crowds", name, count=len(objects.image))
        return
    per_image = np.bincount(objects.image[~objects.is_crowd], minlength=len(records))
    used = "left out" if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else "trained on"
    used = used if is_train else "evaluated on"
    _note_images(objects, findings, "empty-image", per_image == 0, lambda i: used)
    _note_images(
        objects,
        findings,
        "many-objects",
        per_image > cfg.TEST.DETECTIONS_PER_IMAGE,
        lambda i: f"{per_image[i]} objects, limit {cfg.TEST.DETECTIONS_PER_IMAGE}",
    )
    limit = cfg.TEST.KEYPOINT_DETECTIONS_PER_IMAGE
    if cfg.MODEL.KEYPOINT_ON and not is_train:
        with_points = [
            sum(any(a.get("keypoints", ())[2::3]) for a in r.get("annotations", ()))
            for r in records
        ]
        _note_images(
            objects,
            findings,
            "many-keypoint-objects",
            np.array(with_points) > limit,
            lambda i: f"{with_points[i]} objects, limit {limit}",
        )


def _note_images(
    objects: Objects, findings: Findings, code: str, mask: np.ndarray, detail: Callable[[int], str]
) -> None:
    for i in np.flatnonzero(mask).tolist():
        example = Example(objects.records[i]["file_name"], detail=detail(i))
        findings.add(code, objects.name, example, place=(i, -1))


def check_between(
    train: Sequence[Objects],
    test: Sequence[Objects],
    findings: Findings,
    checkpoint_classes: Sequence[str],
) -> None:
    """Look for faults in the classes of the data sets of a config, against each other.

    Args:
        train: Those trained on.
        test: Those evaluated on.
        findings: Added to.
        checkpoint_classes: Names of the classes of MODEL.WEIGHTS; empty if not known.
    """
    names = {o.name: MetadataCatalog.get(o.name).get("thing_classes") for o in (*train, *test)}
    known = [(name, list(classes)) for name, classes in names.items() if classes is not None]
    for name, classes in known[1:]:
        first, expected = known[0]
        if classes != expected:
            detail = f"{first}: {listed(expected)}; {name}: {listed(classes)}"
            typo = [
                f"{c!r} for {m[0]!r}?"
                for c in classes
                if c not in expected and (m := near_misses(c, expected))
            ]
            findings.add("class-names-differ", name, Example(detail=" ".join([detail, *typo])))
    if known and checkpoint_classes and len(checkpoint_classes) == len(known[0][1]):
        name, classes = known[0]
        if list(checkpoint_classes) != classes:
            detail = f"checkpoint: {listed(checkpoint_classes)}; {name}: {listed(classes)}"
            findings.add("checkpoint-classes", name, Example(detail=detail))
    trained = Counter[int]()
    for o in train:
        trained += objects_per_class(o)
    tested = {o.name: objects_per_class(o) for o in test}
    for k, class_name in enumerate(known[0][1] if known and trained else ()):
        if trained[k]:
            continue
        for name, counts in tested.items():
            if counts[k]:
                example = Example(detail=f"{class_name}: {counts[k]} objects")
                findings.add("class-not-trained", name, example)
        if not any(counts[k] for counts in tested.values()):
            findings.add("class-without-objects", train[0].name, Example(detail=class_name))
