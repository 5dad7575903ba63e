"""What to change: each suggestion has its evidence, in numbers, and the key to turn."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from detkit.config import CfgNode, find_architecture
from detkit.evaluation.report.analysis import found_objects, object_scores
from detkit.evaluation.report.matching import Matching

_NOTABLE_COST = 1.0  # points of AP, below which an error type is not worth a setting
_FEW_OBJECTS = 20
_NOTABLE_SHARE = 0.15
_HARDLY = 0.5  # of the recall of all
_NOTABLE_GAP = 10.0  # points of recall
_MIN_CASES = 3  # fewer are chance

# What helps where things are found but not well placed, and the keys for it.
_LOCALISATION = {
    "bbox": ("or use an IoU loss of boxes", ["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"]),
    "segm": ("or predict finer masks", ["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION"]),
    "keypoints": ("or train on larger images", ["INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST"]),
}


def suggestions(
    matching: Matching,
    numbers: Mapping[str, Any],
    cfg: CfgNode | None,
    resize: np.ndarray,
) -> list[dict[str, Any]]:
    """Return what the errors suggest to change, most expensive first.

    Args:
        matching: Detections and objects.
        numbers: The rest of the report: `threshold`, `errors`, `confusion`, `breakdown`,
            `calibration` and `classes`.
        cfg: The settings of the detector; None leaves out what depends on them.
        resize: (N,) factor by which the detector resizes each image.

    Returns:
        `text`, `evidence`, `keys` (empty where it is about the data) and `cost`, the points of AP
        at stake, or nan.
    """
    found = _of_errors(matching.task, numbers, cfg) + _of_confusion(numbers) + _of_data(numbers)
    found += _of_calibration(numbers)
    if cfg is not None:
        found += _of_missed_objects(matching, numbers, cfg, resize)
        found += _of_limits(matching, numbers, cfg)
    return sorted(found, key=lambda entry: -np.nan_to_num(entry["cost"], nan=-1.0))


def _entry(text: str, evidence: str, *keys: str, cost: float = math.nan) -> dict[str, Any]:
    return {"text": text, "evidence": evidence, "keys": list(keys), "cost": cost}


def _cost(numbers: Mapping[str, Any], kind: str) -> tuple[float, str]:
    of_kind = numbers["errors"]["types"][kind]
    cost, count = of_kind["cost"], of_kind["count"]
    metric = f"AP{100 * numbers['iou_threshold']:g}"
    evidence = (
        f"{count} errors of this type, of any score; without them {metric} would gain {cost:.1f}"
        " points"
    )
    return cost, evidence


def _of_errors(task: str, numbers: Mapping[str, Any], cfg: CfgNode | None) -> list[dict[str, Any]]:
    """Return what the types of errors suggest."""
    architecture = find_architecture(cfg.MODEL.META_ARCHITECTURE) if cfg is not None else None
    found = []
    cost, evidence = _cost(numbers, "duplicate")
    nms = architecture.nms_threshold if architecture is not None else None
    if cost >= _NOTABLE_COST and cfg is not None and nms is not None:
        text = f"Objects are found more than once: lower {nms} (now {cfg.get_by_full_key(nms)})"
        found.append(_entry(text, evidence, nms, cost=cost))
    cost, evidence = _cost(numbers, "localisation")
    if cost >= _NOTABLE_COST:
        what, keys = _LOCALISATION[task]
        if cfg is not None and cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
            keys = ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE"]
        text = (
            "Objects are found, but not well enough placed: check that the annotations are tight,"
            f" train longer, {what}"
        )
        found.append(_entry(text, evidence, *keys, "SOLVER.MAX_ITER", cost=cost))
    cost, evidence = _cost(numbers, "background")
    if cost >= _NOTABLE_COST:
        text = (
            "Background is taken for objects: look at them in the gallery, as some may be objects"
            " without an annotation; train on images without objects, too"
        )
        key = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
        found.append(_entry(text, evidence, key, cost=cost))
    return found


def _of_confusion(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs of classes that are taken for each other."""
    labels, matrix = numbers["confusion"]["labels"], np.array(numbers["confusion"]["matrix"])
    found = []
    for row, column in itertools.permutations(range(len(labels) - 1), 2):
        count, total = int(matrix[row, column]), int(matrix[row].sum())
        if count >= _MIN_CASES and count >= _NOTABLE_SHARE * total:
            text = (
                f"{labels[row]} is taken for {labels[column]}: compare their annotations, merge the"
                " classes if they cannot be told apart, or add examples of both"
            )
            evidence = f"{count} of {total} objects of class {labels[row]}"
            found.append(_entry(text, evidence, "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS"))
    return found


def _of_data(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the classes that are hardly found, and those whose AP rests on few objects."""
    keys = ("DATALOADER.SAMPLER_TRAIN", "DATALOADER.REPEAT_THRESHOLD")
    classes = [c for c in numbers["classes"] if c["objects"]]
    overall = numbers["at_threshold"]["recall"]
    found = []
    for c in classes:
        if c["objects"] >= _FEW_OBJECTS and c["recall"] < _HARDLY * overall:
            text = (
                f"{c['name']} is hardly found: look at its objects in the gallery, train longer,"
                " show it more often in training, or give it a weight"
            )
            evidence = (
                f"recall is {100 * c['recall']:.0f} % of its {c['objects']} objects, and"
                f" {100 * overall:.0f} % of all"
            )
            # As much as if it were found like the others.
            others = [other["AP50"] for other in classes if other is not c]
            cost = max(0.0, (np.mean(others) - c["AP50"]) / len(classes)) if others else math.nan
            more = ("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "SOLVER.MAX_ITER")
            found.append(_entry(text, evidence, *keys, *more, cost=cost))
    rare = [c for c in classes if c["objects"] < _FEW_OBJECTS]
    if rare:
        names = ", ".join(f"{c['name']} ({c['objects']})" for c in rare[:10])
        which = "a class" if len(rare) == 1 else f"{len(rare)} classes"
        text = (
            f"The AP of {which} rests on fewer than {_FEW_OBJECTS} objects: read the intervals, and"
            " annotate more of them; if they are rare in training too, show them more often"
        )
        found.append(_entry(text, names, *keys))
    return found


def _of_calibration(numbers: Mapping[str, Any]) -> list[dict[str, Any]]:
    error = numbers["calibration"]["expected_calibration_error"]
    if not error > 0.15:  # nan without detections
        return []
    text = (
        "Scores are not probabilities here: choose the score from which you trust a detection by"
        f" the table of classes (all together: {numbers['threshold']:.2f})"
    )
    return [_entry(text, f"score and precision differ by {100 * error:.0f} points on average")]


def _of_missed_objects(
    matching: Matching, numbers: Mapping[str, Any], cfg: CfgNode, resize: np.ndarray
) -> list[dict[str, Any]]:
    """Return what the size and shape of the missed objects suggest."""
    objects = matching.objects
    is_missed = ~objects.is_ignored & ~found_objects(matching, numbers["threshold"])
    num_missed = int(is_missed.sum())
    if num_missed < _MIN_CASES:
        return []
    cost = numbers["errors"]["types"]["missed"]["cost"]
    found = []
    sides = np.sqrt(objects.areas[is_missed]) * resize[objects.images[is_missed]]
    reads_anchors = cfg.MODEL.META_ARCHITECTURE != "FCOS"
    anchors = [size for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in np.ravel(sizes)]
    limit = min(float(min(anchors)) / 2, 32.0) if reads_anchors else 16.0
    share = float((sides < limit).mean())
    small, others = _recalls(numbers, "size", ["small"])
    evidence = ""
    if share >= _NOTABLE_SHARE:
        evidence = (
            f"{100 * share:.0f} % of the {num_missed} missed objects are under {limit:.0f} pixels a"
            " side after the resize"
        )
    elif small < others - _NOTABLE_GAP:
        evidence = f"recall is {small:.0f} % of the small objects, and {others:.0f} % of the others"
    if evidence:
        what = f" or add an anchor of {limit:.0f}" if reads_anchors else ""
        text = (
            f"Small objects are missed: raise INPUT.MIN_SIZE_TEST (now {cfg.INPUT.MIN_SIZE_TEST},"
            f" and INPUT.MIN_SIZE_TRAIN with it){what}"
        )
        keys = ["INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"]
        keys += ["MODEL.ANCHOR_GENERATOR.SIZES"] if reads_anchors else []
        found.append(_entry(text, evidence, *keys, cost=cost))
    if reads_anchors:
        found += _of_shapes(objects.boxes[is_missed], cfg, cost)
    found += _of_crowding(numbers, cfg, cost)
    low = is_missed & (object_scores(matching) >= 0)
    if low.sum() >= max(_MIN_CASES, 0.3 * num_missed):
        text = (
            "Many missed objects were found, with a low score: where finding them matters more than"
            " false alarms, accept lower scores; training longer raises them"
        )
        evidence = f"{int(low.sum())} of {num_missed} missed objects have a detection that fits"
        found.append(_entry(text, evidence, "SOLVER.MAX_ITER"))
    return found


def _of_shapes(missed: np.ndarray, cfg: CfgNode, cost: float) -> list[dict[str, Any]]:
    """Return what the ratios of the boxes (M, 4) XYWH of missed objects suggest."""
    ratios = missed[:, 3] / np.maximum(missed[:, 2], 1e-9)
    shapes = [float(r) for ratios_i in cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS for r in ratios_i]
    # An anchor of twice the ratio and the same area overlaps a box by half.
    is_long = (ratios > 2 * max(shapes)) | (ratios < min(shapes) / 2)
    if float(is_long.mean()) < _NOTABLE_SHARE:
        return []
    text = (
        "Long objects are missed: add the ratio of their height to their width to"
        f" MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS (now {min(shapes):g} to {max(shapes):g})"
    )
    extremes = f"{ratios[is_long].min():.2g} to {ratios[is_long].max():.2g}"
    evidence = f"{int(is_long.sum())} of {len(missed)} missed objects have ratios of {extremes}"
    return [_entry(text, evidence, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", cost=cost)]


def _of_crowding(numbers: Mapping[str, Any], cfg: CfgNode, cost: float) -> list[dict[str, Any]]:
    """Return what the recall of objects beside each other suggests."""
    crowded, others = _recalls(numbers, "crowding", ["crowded"])
    touching, alone = _recalls(numbers, "crowding", ["touching", "crowded"])
    if crowded < others - _NOTABLE_GAP:
        text = (
            "Objects that overlap others are missed: keep overlapping detections by a higher"
            " threshold of NMS, or by soft NMS"
        )
        evidence = (
            f"recall is {crowded:.0f} % of the objects that others overlap by an IoU above 0.3, and"
            f" {others:.0f} % of the rest"
        )
        architecture = find_architecture(cfg.MODEL.META_ARCHITECTURE)
        keys = [architecture.nms_threshold] if architecture and architecture.nms_threshold else []
        return [_entry(text, evidence, *keys, "TEST.NMS.METHOD", cost=cost)]
    if touching < alone - _NOTABLE_GAP:
        text = (
            "Objects that touch others are missed: show more of them in training, for example by"
            " CopyPaste, which needs masks"
        )
        evidence = (
            f"recall is {touching:.0f} % of the objects that others overlap, and {alone:.0f} % of"
            " those alone"
        )
        return [_entry(text, evidence, "INPUT.AUGMENTATIONS", cost=cost)]
    return []


def _recalls(numbers: Mapping[str, Any], by: str, names: Sequence[str]) -> tuple[float, float]:
    """Return the recall, in %, of the objects in some bins and of those in the others.

    nan, which is below nothing, if there are only few objects on one side.
    """
    rows = [row for row in numbers["breakdown"] if row["by"] == by and row["objects"]]
    recalls = []
    for side in ([r for r in rows if (r["name"] in names) == is_in] for is_in in (True, False)):
        count = sum(row["objects"] for row in side)
        found = sum(row["objects"] * row["recall"] for row in side)
        recalls.append(found / count if count >= _FEW_OBJECTS else math.nan)
    return recalls[0], recalls[1]


def _of_limits(
    matching: Matching, numbers: Mapping[str, Any], cfg: CfgNode
) -> list[dict[str, Any]]:
    limit, num_images = cfg.TEST.DETECTIONS_PER_IMAGE, len(matching.image_ids)
    per_image = np.bincount(matching.detections.images, minlength=num_images)
    objects = matching.objects
    counted = np.bincount(objects.images[~objects.is_ignored], minlength=num_images)
    is_full = (per_image >= limit) & (counted > limit / 2)
    if not is_full.any():
        return []
    text = f"Raise TEST.DETECTIONS_PER_IMAGE (now {limit}): crowded images reach it"
    evidence = f"{int(is_full.sum())} of {num_images} images have as many detections"
    return [_entry(text, evidence, "TEST.DETECTIONS_PER_IMAGE")]
