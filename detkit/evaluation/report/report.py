"""Build the error report of a detector, and write it as a page, JSON and CSV."""

import csv
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detkit import __version__
from detkit.config import CfgNode
from detkit.data import MetadataCatalog
from detkit.evaluation.coco.evaluator import NOUNS
from detkit.evaluation.coco.ground_truth import CocoGroundTruth
from detkit.evaluation.coco.results import (
    TASKS,
    CocoProtocol,
    coco_protocol,
    detections_from_results,
)
from detkit.evaluation.detections import ImageDetections
from detkit.evaluation.report import analysis
from detkit.evaluation.report.gallery import LOWEST_SCORE, drawn_items, picture
from detkit.evaluation.report.matching import Matching
from detkit.evaluation.report.page import html_page
from detkit.evaluation.report.suggestions import suggestions
from detkit.structures.mask_formats import rle_counts
from detkit.utils.colormap import class_colors
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.file_io import read_file
from detkit.utils.logger import progress_bar


@dataclass(frozen=True)
class ReportOptions:
    """What a report holds."""

    confidence_threshold: float | None = None
    """Score from which detections count in the confusion matrix; None for that of the best F1."""
    num_images: int = 300
    """Most images in the page, those with most errors first."""
    image_side: int = 512
    """Longest side of the pictures in the page, in pixels."""
    num_samples: int = 500
    """Resamplings of images behind each interval."""


def read_results(file: str, truth: CocoGroundTruth) -> list[ImageDetections]:
    """Read detections in the format of COCO's result files, as evaluations write them.

    Args:
        file: Path of the file.
        truth: The data set that its image and category ids are of.

    Raises:
        MissingFileError: The file does not exist.
        DataError: It is no list of results, or of another data set.
    """
    try:
        results = json.loads(read_file(file, "file of predictions"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"file of predictions {file} is not valid JSON: {error}") from error
    if not isinstance(results, list):
        raise DataError(
            f"file of predictions {file} must hold a list of results; it holds a"
            f" {type(results).__name__}"
        )
    by_image = _results_by_image(results, file, truth)
    try:
        found = [detections_from_results(of_image, i) for i, of_image in by_image.items()]
        # pycocotools reads beyond its memory where runs and size differ.
        for mask in (mask for d in found for mask in d.masks or ()):
            rle_counts(mask)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"the results in {file} cannot be read as boxes, run-length masks and keypoints:"
            f" {error}"
        ) from error
    _check_detections(found, file, truth)
    return found


def _results_by_image(
    results: Sequence[Any], file: str, truth: CocoGroundTruth
) -> dict[int | str, list[dict[str, Any]]]:
    """Return the results of each image, with contiguous class ids."""
    image_ids = {coco_id: image_id for image_id, coco_id in truth.image_ids.items()}
    class_ids = {category_id: k for k, category_id in enumerate(truth.category_ids)}
    by_image: dict[int | str, list[dict[str, Any]]] = {}
    for number, result in enumerate(results, start=1):
        where = f"result {number} of {file}"
        lacking = [
            key
            for key in ("image_id", "category_id", "bbox", "score")
            if not isinstance(result, dict) or key not in result
        ]
        if lacking:
            raise DataError(f"{where} has no {lacking[0]!r}: it must be a result in COCO's format")
        for key, known in (("image_id", image_ids), ("category_id", class_ids)):
            if not isinstance(result[key], Hashable) or result[key] not in known:
                raise DataError(
                    f"{where} has {key} {result[key]!r}, which data set {truth.dataset_name!r} does"
                    " not have: are the predictions of another data set?"
                )
        by_image.setdefault(image_ids[result["image_id"]], []).append(
            {**result, "category_id": class_ids[result["category_id"]]}
        )
    for key in ("segmentation", "keypoints"):
        count = sum(key in result for result in results)
        if count not in (0, len(results)):
            raise DataError(
                f"{count} of the {len(results)} results in {file} have {key!r}: all must, or none"
            )
    return by_image


def _check_detections(found: Sequence[ImageDetections], file: str, truth: CocoGroundTruth) -> None:
    """Check what all images have together, and that numbers are finite."""
    for found_i in found:
        for mask in found_i.masks or ():
            truth.check_mask_size(found_i.image_id, mask["size"])
    if any(d.boxes.shape[1] != 4 for d in found):
        raise DataError(f"the boxes in {file} must be [x, y, width, height]")
    keypoints = [d.keypoints for d in found if d.keypoints is not None]
    counts = sorted({keypoints_i.shape[1] for keypoints_i in keypoints})
    if len(counts) > 1:
        raise DataError(
            f"the results in {file} have {counts[0]} to {counts[-1]} keypoints: all must have as"
            " many"
        )
    values = [*keypoints, *(values for d in found for values in (d.boxes, d.scores))]
    if not all(np.isfinite(values_i).all() for values_i in values):
        raise DataError(f"the boxes, scores and keypoints in {file} must be finite")


def tasks_of(
    truth: CocoGroundTruth, detections: Sequence[ImageDetections], protocol: CocoProtocol
) -> list[str]:
    """Return what detections and objects can be compared by."""
    annotations = truth.coco["annotations"]
    tasks = ["bbox"]
    if any(d.masks for d in detections) and any(a.get("segmentation") for a in annotations):
        tasks.append("segm")
    labelled = next((a["keypoints"] for a in annotations if a.get("keypoints")), None)
    predicted = next((d.keypoints for d in detections if d.keypoints is not None), None)
    if labelled is not None and predicted is not None:
        counts = {len(labelled) // 3, predicted.shape[1], len(protocol.oks_sigmas)}
        if len(counts) > 1:
            raise ConfigError(
                f"objects have {len(labelled) // 3} keypoints, detections {predicted.shape[1]}, and"
                f" there are {len(protocol.oks_sigmas)} spreads to score them by: set"
                " TEST.KEYPOINT_OKS_SIGMAS to one per keypoint; it is empty for COCO's 17"
            )
        tasks.append("keypoints")
    return [task for task in TASKS if task in tasks]


def protocol_of(cfg: CfgNode) -> CocoProtocol:
    """Return how an evaluation of this config scores."""
    return coco_protocol(
        iou_thresholds=cfg.TEST.IOU_THRESHOLDS,
        area_ranges=cfg.TEST.AREA_RANGES,
        max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        keypoint_max_dets_per_image=cfg.TEST.KEYPOINT_DETECTIONS_PER_IMAGE,
        kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
    )


def analyse(
    matching: Matching, cfg: CfgNode | None, options: ReportOptions, resize: np.ndarray
) -> dict[str, Any]:
    """Return the numbers of one task, as `report.json` has them; AP and costs in [0, 100].

    Args:
        matching: Detections and objects.
        cfg: Settings that suggestions refer to; None for none.
        options: What the report holds.
        resize: (N,) factor by which the detector resizes each image.
    """
    threshold = options.confidence_threshold
    if threshold is None:
        threshold = analysis.overall_threshold(matching)
    metrics = analysis.metrics_of(matching)
    samples = analysis.bootstrap_ap(matching, options.num_samples)
    errors = analysis.error_types(matching)
    numbers: dict[str, Any] = {
        "metrics": {name: value for name, value in metrics.items() if "-" not in name},
        "interval": analysis.interval(analysis.mean_over_classes(samples)),
        "iou_threshold": matching.protocol.iou_thresholds[matching.index],
        "threshold": threshold,
        "at_threshold": analysis.counts_of(matching).at(threshold),
        "classes": _class_rows(matching, metrics, samples, threshold),
        "curves": _curves(matching),
        "confusion": {
            "labels": [*matching.class_names, "background"],
            "matrix": analysis.confusion_matrix(matching, threshold).tolist(),
        },
        "calibration": analysis.calibration(matching),
        "breakdown": analysis.breakdown(matching, threshold),
        "errors": analysis.error_costs(matching, errors),
        "images": _image_rows(matching, threshold),
    }
    numbers["suggestions"] = suggestions(matching, numbers, cfg, resize)
    return numbers


def _class_rows(
    matching: Matching, metrics: Mapping[str, float], samples: np.ndarray, threshold: float
) -> list[dict[str, Any]]:
    outcome, rows = matching.outcome, []
    scores = analysis.scores_of(matching, {"all": outcome})
    for k, name in enumerate(matching.class_names):
        counts = analysis.counts_of(matching, k)
        best = counts.best_threshold()
        low, high = analysis.interval(analysis.mean_over_classes(samples[:, :, [k]]))
        rows.append(
            {
                "name": name,
                "objects": counts.num_objects,
                "detections": len(counts.scores),
                "AP": metrics[f"AP-{name}"],
                "AP_low": low,
                "AP_high": high,
                "AP50": 100 * scores.average_precision(0.5, class_ids=[k]),
                **counts.at(threshold),
                "best_threshold": best,
                "best_f1": counts.at(best)["f1"] if math.isfinite(best) else math.nan,
            }
        )
    return rows


def _curves(matching: Matching) -> dict[str, Any]:
    """Return precision over recall, interpolated as AP is, and all three over the score."""
    outcome, number = matching.outcome, matching.index
    grid = analysis.SCORE_GRID
    classes = []
    for k, rows in enumerate(matching.class_rows):
        counts = analysis.counts_of(matching, k)
        at_scores = [counts.at(score) for score in grid]
        curve: dict[str, Any] = {
            key: [point[key] for point in at_scores] for key in ("precision", "recall", "f1")
        }
        curve["precision_at_recall"] = None
        if outcome.num_objects[k]:
            curve["precision_at_recall"] = analysis.precision_at_recalls(
                outcome.is_hit[[number]][:, rows],
                outcome.is_counted[[number]][:, rows],
                float(outcome.num_objects[k]),
            )[0].tolist()
        classes.append(curve)
    return {
        "recalls": analysis.RECALL_POINTS.tolist(),
        "scores": grid.tolist(),
        "classes": classes,
    }


def _image_rows(matching: Matching, threshold: float) -> list[dict[str, Any]]:
    """Return the errors in each image at the threshold, worst images first."""
    objects, detections = matching.objects, matching.detections
    outcome, num_images = matching.outcome, len(matching.image_ids)
    is_shown = detections.scores >= threshold
    is_hit = outcome.is_hit[matching.index] & is_shown
    is_false = outcome.is_counted[matching.index] & is_shown & ~is_hit
    is_missed = ~objects.is_ignored & ~analysis.found_objects(matching, threshold)
    counts = {
        "objects": np.bincount(objects.images[~objects.is_ignored], minlength=num_images),
        "found": np.bincount(detections.images[is_hit], minlength=num_images),
        "missed": np.bincount(objects.images[is_missed], minlength=num_images),
        "false": np.bincount(detections.images[is_false], minlength=num_images),
    }
    order = np.argsort(-(counts["missed"] + counts["false"]), kind="stable").tolist()
    return [
        {"image_id": matching.image_ids[i], **{key: int(n[i]) for key, n in counts.items()}}
        for i in order
    ]


def compare(
    first: Matching, second: Matching, numbers: Mapping[str, Any], options: ReportOptions
) -> dict[str, Any]:
    """Return what a second detector does better or worse on the same images.

    The intervals are those of the difference, on the same resampled images for both.

    Args:
        first: The detector of the report.
        second: The other one.
        numbers: What `analyse` returned of the first.
        options: As in `analyse`; errors of both are counted at the threshold of the first.
    """
    metrics = [analysis.metrics_of(matching) for matching in (first, second)]
    samples = [analysis.bootstrap_ap(m, options.num_samples) for m in (first, second)]
    difference = samples[1] - samples[0]
    rows = [{"name": "all", "first": metrics[0]["AP"], "second": metrics[1]["AP"]}]
    intervals = [analysis.interval(analysis.mean_over_classes(difference))]
    for k, name in enumerate(first.class_names):
        first_ap, second_ap = (of_task[f"AP-{name}"] for of_task in metrics)
        rows.append({"name": name, "first": first_ap, "second": second_ap})
        intervals.append(analysis.interval(analysis.mean_over_classes(difference[:, :, [k]])))
    threshold = numbers["threshold"]
    before = {row["image_id"]: row for row in numbers["images"]}
    images = []
    for row in _image_rows(second, threshold):
        old = before[row["image_id"]]
        change = row["missed"] + row["false"] - old["missed"] - old["false"]
        images.append({**row, "change": change})
    images.sort(key=lambda row: -abs(row["change"]))
    return {
        "classes": [
            {**row, "difference": row["second"] - row["first"], "low": low, "high": high}
            for row, (low, high) in zip(rows, intervals, strict=True)
        ],
        "images": images,
    }


def write_report(
    folder: str | Path,
    truth: CocoGroundTruth,
    detections: Sequence[ImageDetections],
    cfg: CfgNode,
    *,
    others: Sequence[ImageDetections] | None = None,
    has_settings: bool = True,
    names: Mapping[str, str] | None = None,
    options: ReportOptions | None = None,
) -> Path:
    """Write `report.html`, `report.json`, `classes.csv`, `errors.csv` and `images.csv`.

    With a second detector, also `comparison.csv`.

    Args:
        folder: Where to; made if it is not there.
        truth: The data set.
        detections: Those of the detector, at most one entry per image.
        cfg: How to score (`TEST`), and how the detector reads images (`INPUT`).
        others: Those of a second detector to compare with, or None.
        has_settings: Whether `cfg` is that of the detector, so that suggestions may name its keys.
        names: What the page calls the detectors, `first` and `second`.
        options: None for the defaults.

    Returns:
        The page.

    Raises:
        ConfigError: The numbers of keypoints differ.
        DataError: The data set has rotated boxes, or a mask that cannot be used.
    """
    options = options or ReportOptions()
    if any(len(annotation["bbox"]) != 4 for annotation in truth.coco["annotations"]):
        raise DataError("the report is about upright boxes; rotated ones are evaluated only")
    protocol = protocol_of(cfg)
    images = {image["id"]: image for image in truth.coco["images"]}
    report: dict[str, Any] = {
        "detkit": __version__,
        "dataset": truth.dataset_name,
        "names": dict(names or {"first": "detector"}),
        "num_images": len(images),
        "num_objects": truth.num_objects,
        "num_samples": options.num_samples,
        "nouns": NOUNS,
        "error_types": analysis.ERROR_TYPES,
        "tasks": {},
    }
    matchings: dict[str, list[Matching]] = {}
    for task in tasks_of(truth, detections, protocol):
        matching = Matching(truth, detections, protocol, task)
        resize = np.array([_resize(images[i], cfg) for i in matching.image_ids])
        numbers = analyse(matching, cfg if has_settings else None, options, resize)
        for row in numbers["images"]:
            row["file"] = str(images[row["image_id"]]["file_name"])
        matchings[task] = [matching]
        if others is not None and task in tasks_of(truth, others, protocol):
            second = Matching(truth, others, protocol, task)
            matchings[task].append(second)
            numbers["compare"] = compare(matching, second, numbers, options)
        report["tasks"][task] = numbers
    report = finite(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    _write_tables(folder, report["tasks"])
    gallery = finite(_gallery(truth, matchings, report, cfg, options))
    page = folder / "report.html"
    page.write_text(html_page(report, gallery), encoding="utf-8")
    return page


def finite(value: Any) -> Any:
    """Return values with None for what is not finite: JSON has no nan."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resize(image: Mapping[str, Any], cfg: CfgNode) -> float:
    """Return the factor by which INPUT.MIN_SIZE_TEST resizes an image; 1 if its size is unknown."""
    height, width = image.get("height"), image.get("width")
    if not height or not width or cfg.INPUT.MIN_SIZE_TEST == 0:
        return 1.0
    shorter, longer = sorted((height, width))
    return min(cfg.INPUT.MIN_SIZE_TEST / shorter, cfg.INPUT.MAX_SIZE_TEST / longer)


def _write_tables(folder: Path, tasks: Mapping[str, Any]) -> None:
    tables: dict[str, list[dict[str, Any]]] = {"classes": [], "errors": [], "images": []}
    for task, numbers in tasks.items():
        compared = numbers.get("compare", {"classes": [], "images": []})
        others = {row["image_id"]: row for row in compared["images"]}
        tables["classes"] += [{"task": task, **row} for row in numbers["classes"]]
        for kind, row in numbers["errors"]["types"].items():
            tables["errors"].append({"task": task, "error": kind, **row})
        for row in numbers["images"]:
            other = {f"second_{key}": n for key, n in others.get(row["image_id"], {}).items()}
            tables["images"].append({"task": task, **row, **other})
        for row in compared["classes"]:
            tables.setdefault("comparison", []).append({"task": task, **row})
    for name, rows in tables.items():
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            # A task that only one of two detectors has comes without the columns of the second.
            columns = dict.fromkeys(key for row in rows for key in row)
            writer = csv.DictWriter(file, list(columns) or ["task"])
            writer.writeheader()
            writer.writerows(rows)


def _gallery(
    truth: CocoGroundTruth,
    matchings: Mapping[str, Sequence[Matching]],
    report: Mapping[str, Any],
    cfg: CfgNode,
    options: ReportOptions,
) -> dict[str, Any]:
    """Return the pictures of the images with most errors, and what is drawn over them."""
    files = {image["id"]: image for image in truth.coco["images"]}
    errors: dict[int, int] = dict.fromkeys(files, 0)
    for numbers in report["tasks"].values():
        for row in numbers["images"]:
            errors[row["image_id"]] += row["missed"] + row["false"]
        for row in numbers.get("compare", {}).get("images", ()):
            errors[row["image_id"]] += abs(row["change"])
    chosen = sorted(files, key=lambda image_id: (-errors[image_id], image_id))
    chosen = chosen[: options.num_images]
    metadata = MetadataCatalog.get(truth.dataset_name)
    pictures = []
    for image_id in progress_bar(chosen, leave=False):
        image = files[image_id]
        known = {side: image.get(side) for side in ("width", "height")}
        read = picture(
            str(image["file_name"]),
            cfg.INPUT.FORMAT,
            options.image_side,
            cfg.INPUT.MAX_IMAGE_PIXELS,
        )
        pictures.append({"id": image_id, "file": Path(image["file_name"]).name} | known | read)
    tasks: dict[str, Any] = {}
    for task, of_task in matchings.items():
        numbers = {image_id: n for n, image_id in enumerate(of_task[0].image_ids)}
        rows = [numbers[image_id] for image_id in chosen]
        lowest = min(report["tasks"][task]["threshold"], LOWEST_SCORE)
        tasks[task] = {
            "sizes": [name for name, *_ in analysis.size_bins(of_task[0])],
            "drawn": [drawn_items(m, analysis.error_types(m), rows, lowest) for m in of_task],
        }
    return {
        "images": pictures,
        "tasks": tasks,
        "colors": class_colors(len(truth.class_names)),
        "skeleton": _skeleton(metadata),
    }


def _skeleton(metadata: Any) -> list[tuple[int, int]]:
    """Return the pairs of keypoints that a line joins."""
    names: list[str] = list(metadata.get("keypoint_names") or ())
    index = {name: number for number, name in enumerate(names)}
    rules = metadata.get("keypoint_connection_rules") or ()
    return [(index[a], index[b]) for a, b, *_ in rules]
