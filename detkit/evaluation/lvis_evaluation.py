"""LVIS's average precision: COCO's, on data of which each image is annotated for some of the classes only.

Source: Gupta et al. 2019, "LVIS: a dataset for large vocabulary instance segmentation", arXiv
1908.03195, section 3.3. Where its rules differ from COCO's: the 300 best detections of an image
count, over all classes; a detection counts only in images that have an object of its class or are
known to have none; where not all objects of a class are annotated, a detection that finds none of
them is not wrong. No object is a crowd.

The `lvis` package is not used: it asks NumPy for `np.float`, which is gone since 1.24.
`tests/evaluation` compares the numbers with it, given that name back.

Legend: K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from detkit.data.catalog import MetadataCatalog
from detkit.data.datasets.lvis import lvis_categories
from detkit.evaluation.coco.evaluator import NOUNS, COCOEvaluator
from detkit.evaluation.coco.ground_truth import CocoGroundTruth
from detkit.evaluation.coco.results import CocoScores, coco_metrics
from detkit.evaluation.coco.scoring import (
    ClassEntries,
    detections_per_class,
    garbage_collection_paused,
    image_numbers,
    objects_per_class,
    score_classes,
)
from detkit.evaluation.detections import ImageDetections
from detkit.evaluation.testing import metrics_table
from detkit.structures import ImageRecord

logger = logging.getLogger(__name__)

_DEFAULT_MAX_DETS = 300
_FREQUENCIES = {"r": "rare", "c": "common", "f": "frequent"}
_MOST_IMAGES = {"r": 10, "c": 100}


class LVISEvaluator(COCOEvaluator):
    """Scores boxes and masks by LVIS's AP, and the proposals of a proposal network by their recall."""

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
                `not_exhaustive_category_ids` (ids of the data set's own file). How frequent a class
                is comes from `frequency` in the metadata's `json_file`, else from its
                `class_image_count`, [{id, image_count},
                ...].
            tasks: What to score, of "bbox" and "segm". None scores what the model gives.
            distributed: As for `COCOEvaluator`.
            output_dir: Gets `lvis_instances_results.json`. None writes nothing.
            max_dets_per_image: The best so many detections per image are scored; None takes LVIS's
                300.
            records: As for `COCOEvaluator`.

        Raises:
            ValueError: As `COCOEvaluator`.
        """
        limit = _DEFAULT_MAX_DETS if max_dets_per_image is None else max_dets_per_image
        super().__init__(
            dataset_name, tasks, distributed, output_dir, max_dets_per_image=limit, records=records
        )
        truth = self._ground_truth
        self._negative = _images_by_category("neg_category_ids", truth)
        self._not_exhaustive = _images_by_category("not_exhaustive_category_ids", truth)
        self._classes_by_frequency = _classes_by_frequency(truth)

    def _evaluate_task(self, task: str, detections: list[ImageDetections]) -> dict[str, float]:
        truth = self._ground_truth
        scores = self._score(
            task, [best_detections(d, self._protocol.max_dets) for d in detections]
        )
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

    def _score(self, task: str, detections: Sequence[ImageDetections]) -> CocoScores:
        truth, numbers = self._ground_truth, image_numbers(self._ground_truth)
        images = [numbers[truth.image_ids[detections_i.image_id]] for detections_i in detections]
        with garbage_collection_paused():
            objects = objects_per_class(truth, numbers, task, 0)
            found = detections_per_class(detections, images, len(truth.class_names), task)
            return score_classes(self._federated(objects, found), self._protocol, task)

    def _federated(
        self, objects: Sequence[ClassEntries], found: Iterator[ClassEntries]
    ) -> Iterator[tuple[ClassEntries, ClassEntries]]:
        """Leave out detections in images that are not annotated for the class, and mark those that
        cannot be wrong.
        """
        for category_id, objects_k, found_k in zip(
            self._ground_truth.category_ids, objects, found, strict=True
        ):
            known = {entry["image_id"] for entry in objects_k} | self._negative.get(
                category_id, set()
            )
            unsure = self._not_exhaustive.get(category_id, set())
            kept = [
                {**e, "lvis_mark": e["image_id"] in unsure}
                for e in found_k
                if e["image_id"] in known
            ]
            yield [{**entry, "iscrowd": 0} for entry in objects_k], kept


def best_detections(detections: ImageDetections, limit: int) -> ImageDetections:
    """Return the best so many detections of an image, over all classes; of equal scores the first."""
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
        for category_id in record.get(key, ()):
            images.setdefault(category_id, set()).add(numbers[truth.image_ids[record["image_id"]]])
    unknown = sorted(set(images) - set(truth.category_ids))
    if unknown:
        raise ValueError(
            f"{key} in the records of data set {truth.dataset_name!r} has the categories"
            f" {unknown[:10]}, which it lacks: they are ids of its own file, not contiguous ones"
        )
    return images


def _classes_by_frequency(truth: CocoGroundTruth) -> dict[str, list[int]]:
    """Return the contiguous ids of the rare, common and frequent classes, under r, c and f."""
    metadata = MetadataCatalog.get(truth.dataset_name)
    json_file = metadata.get("json_file")
    categories = [] if json_file is None else lvis_categories(json_file)
    frequency = {
        category["id"]: category["frequency"] for category in categories if "frequency" in category
    }
    if not frequency:
        counts = metadata.get("class_image_count") or ()
        frequency = {entry["id"]: _frequency(entry["image_count"]) for entry in counts}
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


def _frequency(image_count: int) -> str:
    return next((letter for letter, most in _MOST_IMAGES.items() if image_count <= most), "f")
