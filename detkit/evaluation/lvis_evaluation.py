"""LVIS's average precision: COCO's, for images that are annotated for some of the classes only.

Source: Gupta et al. 2019, "LVIS: a dataset for large vocabulary instance segmentation", arXiv
1908.03195, section 3.3. Where its rules differ from COCO's:

- The 300 best detections of an image count, over all classes.
- A detection counts only in images that have an object of its class or are known to have none.
- In images where not all objects of a class are annotated, an unmatched detection is not wrong.
- No object is a crowd.

The `lvis` package is not used: it calls `np.float`, which NumPy 1.24 removed. `tests/evaluation`
compares the numbers with it, with that name put back.

Legend: K classes.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from detkit.data.catalog import MetadataCatalog
from detkit.data.datasets.lvis import lvis_categories
from detkit.evaluation.coco.evaluator import NOUNS, COCOEvaluator
from detkit.evaluation.coco.ground_truth import CocoGroundTruth, image_numbers
from detkit.evaluation.coco.results import coco_metrics
from detkit.evaluation.coco.scoring import ClassEntries, class_entries, score_classes
from detkit.evaluation.detections import ImageDetections
from detkit.evaluation.testing import metrics_table
from detkit.structures import ImageRecord
from detkit.utils.errors import DataError

logger = logging.getLogger(__name__)

_DEFAULT_MAX_DETS = 300
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
# Classes in up to 10 training images are rare, in up to 100 common: section 3.1 of the paper.
_MOST_IMAGES = {"r": 10, "c": 100}


class LVISEvaluator(COCOEvaluator):
    """Scores boxes and masks by LVIS's AP, and proposals by their recall."""

    results_file = "lvis_instances_results.json"
    scored_tasks = ("bbox", "segm")

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = None,
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        max_dets_per_image: int | None = None,
        records: Sequence[ImageRecord] | None = None,
    ) -> None:
        """Load the ground truth.

        Args:
            dataset_name: A registered data set, whose records may have `neg_category_ids` and
                `not_exhaustive_category_ids` (ids of the data set's own file). The frequency of a
                class is read from `frequency` in the metadata's `json_file`, else from the
                metadata's `class_image_count`, [{id, image_count}, ...].
            tasks: What to score, of "bbox" and "segm". None scores what the model predicts.
            distributed: As in `COCOEvaluator`.
            output_dir: Where `lvis_instances_results.json` is written. None writes nothing.
            max_dets_per_image: Detections per image that are scored, best score first; None for
                LVIS's 300.
            records: As in `COCOEvaluator`.

        Raises:
            ValueError: As in `COCOEvaluator`.
            DataError: A record names a category that the data set does not have.
        """
        limit = _DEFAULT_MAX_DETS if max_dets_per_image is None else max_dets_per_image
        super().__init__(
            dataset_name, tasks, distributed, output_dir, max_dets_per_image=limit, records=records
        )
        truth = self._ground_truth
        self._negative = _images_by_category("neg_category_ids", truth)
        if not self._negative:
            logger.warning(
                "no image of %s has neg_category_ids: detections of a class count only in images"
                " that show it, so scores come out too high. Where every class is annotated in"
                " every image, give the data set `evaluator: coco` under DATASETS.REGISTER",
                dataset_name,
            )
        self._not_exhaustive = _images_by_category("not_exhaustive_category_ids", truth)
        self._classes_by_frequency = _classes_by_frequency(truth)

    def _evaluate_task(self, task: str, detections: list[ImageDetections]) -> dict[str, float]:
        truth, protocol = self._ground_truth, self._protocol
        # Over all classes together, unlike COCO's limit, so before they are scored one by one.
        best = [best_detections(detections_i, protocol.max_dets) for detections_i in detections]
        classes = class_entries(truth, best, task, protocol)
        scores = score_classes(self._federated(classes), protocol, task)
        metrics = {
            name: value
            for name, value in coco_metrics(scores, truth.class_names).items()
            if "-" not in name
        }
        for letter, class_ids in self._classes_by_frequency.items():
            metrics[f"AP{letter}"] = 100 * scores.average_precision(class_ids=class_ids)
        logger.info(
            "LVIS AP of %s on %s:\n%s", NOUNS[task], truth.dataset_name, metrics_table(metrics)
        )
        return metrics

    def _federated(
        self, classes: Iterator[tuple[ClassEntries, ClassEntries]]
    ) -> Iterator[tuple[ClassEntries, ClassEntries]]:
        """Apply LVIS's rules about images that are annotated for some classes only."""
        for category_id, (objects, detections) in zip(
            self._ground_truth.category_ids, classes, strict=True
        ):
            # Elsewhere nobody looked for the class, so its detections there do not count.
            annotated = {entry["image_id"] for entry in objects}
            annotated |= self._negative.get(category_id, set())
            incomplete = self._not_exhaustive.get(category_id, set())
            kept = [entry for entry in detections if entry["image_id"] in annotated]
            for entry in kept:
                # Read by `score_class`: an unmatched detection with this mark is ignored.
                entry["lvis_mark"] = entry["image_id"] in incomplete
            # Records may have it from another format, and objects without a mask got it above.
            for entry in objects:
                entry["iscrowd"] = 0
            yield objects, kept


def best_detections(detections: ImageDetections, limit: int) -> ImageDetections:
    """Return the `limit` best detections of an image over all classes; ties keep their order."""
    if len(detections) <= limit:
        return detections
    best = np.argsort(-detections.scores, kind="stable")[:limit]
    return replace(
        detections,
        boxes=detections.boxes[best],
        scores=detections.scores[best],
        classes=detections.classes[best],
        masks=None if detections.masks is None else [detections.masks[i] for i in best.tolist()],
        keypoints=None if detections.keypoints is None else detections.keypoints[best],
    )


def _images_by_category(key: str, truth: CocoGroundTruth) -> dict[int, set[int]]:
    """Category id of the data set's own file -> numbers of the images whose record lists it."""
    numbers = image_numbers(truth)
    images: dict[int, set[int]] = {}
    for record in truth.records:
        for category_id in record.get(key) or ():
            images.setdefault(category_id, set()).add(numbers[truth.image_ids[record["image_id"]]])
    unknown = sorted(set(images) - set(truth.category_ids))
    if unknown:
        raise DataError(
            f"{key} in the records of data set {truth.dataset_name!r} has the categories"
            f" {unknown[:10]}, which it lacks: they are ids of its own file, not contiguous ones"
        )
    return images


def _classes_by_frequency(truth: CocoGroundTruth) -> dict[str, list[int]]:
    """Return the contiguous ids of the rare, common and frequent classes, under r, c and f."""
    metadata = MetadataCatalog.get(truth.dataset_name)
    # LVIS's files tell the frequency themselves, counted on the training set.
    frequency: dict[int, str] = {}
    if metadata.get("json_file") is not None:
        for category in lvis_categories(metadata.json_file):
            if "frequency" in category:
                frequency[category["id"]] = category["frequency"]
    if not frequency:
        for entry in metadata.get("class_image_count") or ():
            reached = [k for k, most in _MOST_IMAGES.items() if entry["image_count"] <= most]
            frequency[entry["id"]] = [*reached, "f"][0]
    missing = [
        name
        for name, id_ in zip(truth.class_names, truth.category_ids, strict=True)
        if id_ not in frequency
    ]
    if missing:
        logger.warning(
            "how frequent %d of %d classes of %s are is not known (%s, ...): they count in no score"
            " of %s classes",
            len(missing),
            len(truth.class_names),
            truth.dataset_name,
            missing[0],
            ", ".join(_FREQUENCIES.values()),
        )
    return {
        letter: [k for k, id_ in enumerate(truth.category_ids) if frequency.get(id_) == letter]
        for letter in _FREQUENCIES
    }
