"""Panoptic quality on any data set with panoptic ground truth.

Legend: C categories, P predicted segments of an image, H and W height and width of an image.
"""

from __future__ import annotations

import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tabulate import tabulate

from detkit.data.catalog import MetadataCatalog
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.detections import image_id_of
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.panoptic.ground_truth import PanopticCategories, load_panoptic_ground_truth
from detkit.evaluation.panoptic.quality import (
    PanopticCounts,
    Segment,
    count_segments,
    panoptic_metrics,
)
from detkit.structures import ImageRecord, ModelInput, ModelOutput
from detkit.utils.image import read_image
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.segment_ids import id2rgb, rgb2id

logger = logging.getLogger(__name__)

RESULTS_FILE = "predictions.json"
PNG_FOLDER = "panoptic_predictions"


@dataclass(frozen=True)
class _ImageSegments:
    image_id: int | str
    counts: PanopticCounts
    file_name: str
    """Of the predicted segments' png."""
    segments: np.ndarray
    """(P, 2) id and category of the predicted segments."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it: counts of
        categories there are.
        """
        counts = np.stack(list(vars(self.counts).values()), axis=1)
        categories = np.flatnonzero(counts.any(axis=1))
        return {
            "num_categories": np.array([len(counts)]),
            "categories": categories,
            "counts": counts[categories],
            "file_name": np.frombuffer(os.fsencode(self.file_name), dtype=np.uint8),
            "segments": self.segments,
        }

    @classmethod
    def from_arrays(cls, image_id: int | str, arrays: Mapping[str, np.ndarray]) -> _ImageSegments:
        """Return what `to_arrays` told."""
        counts = np.zeros((int(arrays["num_categories"][0]), 4))
        counts[arrays["categories"]] = arrays["counts"]
        file_name = os.fsdecode(arrays["file_name"].tobytes())
        return cls(image_id, PanopticCounts(*counts.T), file_name, arrays["segments"])


class COCOPanopticEvaluator(DatasetEvaluator):
    """Scores `panoptic_seg` outputs by panoptic quality. Segments are matched as they come, so no
    map is held.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        records: Sequence[ImageRecord] | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Load the list of true segments; the png of each image is read when the image comes.

        Args:
            dataset_name: A registered data set: see `load_panoptic_ground_truth`.
            output_dir: Gets `predictions.json` in COCO's panoptic format, and its pngs in
                `panoptic_predictions`. None writes nothing.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            records: What the data set's loader gives, where it has been called already; None calls
                it.
            max_image_pixels: As `max_pixels` in `read_image`, of the pngs.

        Raises:
            FileNotFoundError: A png that its json names does not exist.
            ValueError: The data set has no panoptic ground truth.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._max_image_pixels = max_image_pixels
        self._output_dir = None if output_dir is None else Path(output_dir)
        self._categories = PanopticCategories(MetadataCatalog.get(dataset_name))
        self._truth = load_panoptic_ground_truth(dataset_name, self._categories, records)
        self._collector = ImageCollector(_ImageSegments, dataset_name, self._truth)

    def reset(self) -> None:
        """Forget everything that was processed."""
        self._collector.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Take in one batch of outputs with `panoptic_seg`: (H, W) segment ids and a dict per segment.

        Raises:
            ValueError: An image is not in the data set or came before, an output has no
                `panoptic_seg` or one of another size than the ground truth, or pixels and segments
                of a prediction contradict each other.
            FileNotFoundError: A png of the ground truth is missing.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            image_id = image_id_of(model_input)
            self._collector.check(image_id)
            if "panoptic_seg" not in output:
                raise ValueError(
                    "panoptic scores need 'panoptic_seg' in the outputs, got the keys"
                    f" {sorted(output)}"
                )
            ids, segments_info = output["panoptic_seg"]
            predicted_ids = ids.cpu().numpy()
            predicted = self._segments(image_id, segments_info)
            counts = self._count(image_id, predicted_ids, predicted)
            file_name = f"{Path(model_input.get('file_name', str(image_id))).stem}.png"
            segments = np.array([(s.id, s.category) for s in predicted], dtype=np.int64).reshape(
                -1, 2
            )
            self._collector.add(_ImageSegments(image_id, counts, file_name, segments))
            if self._output_dir is not None:
                self._write_png(file_name, predicted_ids)

    def _segments(
        self, image_id: int | str, segments_info: Sequence[Mapping[str, Any]]
    ) -> list[Segment]:
        where = f"the prediction for image {image_id!r}"
        return [
            Segment(int(s["id"]), self._categories.number_of(s["isthing"], s["category_id"], where))
            for s in segments_info
        ]

    def _count(
        self, image_id: int | str, predicted_ids: np.ndarray, predicted: Sequence[Segment]
    ) -> PanopticCounts:
        truth = self._truth[image_id]
        truth_ids = rgb2id(read_image(truth.file_name, "RGB", max_pixels=self._max_image_pixels))
        if truth_ids.shape != predicted_ids.shape:
            raise ValueError(
                f"the prediction for image {image_id!r} is {predicted_ids.shape}, its ground truth"
                f" {truth.file_name} {truth_ids.shape} (height, width): are 'height' and 'width' in"
                " the inputs of the model?"
            )
        try:
            return count_segments(
                truth_ids, truth.segments, predicted_ids, predicted, len(self._categories)
            )
        except ValueError as error:
            raise ValueError(
                f"the prediction for image {image_id!r} is inconsistent: {error}"
            ) from error

    def _write_png(self, file_name: str, ids: np.ndarray) -> None:
        assert self._output_dir is not None
        folder = self._output_dir / PNG_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(id2rgb(ids)).save(folder / file_name)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `panoptic_seg` with PQ, SQ, RQ over all categories, and with _th and _st over things and
            stuff, in [0, 100]; segments in images that were not predicted count as missed. An empty
            dict in all processes but the main one.
        """
        images = self._collector.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if images is None:
            return results
        if self._output_dir is not None:
            self._write_json(images)
        total = sum((image.counts for image in images), PanopticCounts.zeros(len(self._categories)))
        total += self._missed({image.image_id for image in images})
        self._explain(images)
        metrics = panoptic_metrics(total, self._categories.is_thing)
        logger.info("panoptic quality on %s:\n%s", self._dataset_name, panoptic_table(metrics))
        results["panoptic_seg"] = metrics
        return results

    def _missed(self, predicted_images: set[int | str]) -> PanopticCounts:
        counts = PanopticCounts.zeros(len(self._categories))
        for image_id, truth in self._truth.items():
            if image_id not in predicted_images:
                for segment in truth.segments:
                    counts.missed[segment.category] += not segment.is_crowd
        return counts

    def _explain(self, images: Sequence[_ImageSegments]) -> None:
        if len(images) < len(self._truth):
            logger.warning(
                "only %d of the %d images of %s were predicted: the segments in the others count as"
                " missed",
                len(images),
                len(self._truth),
                self._dataset_name,
            )
        elif images and not any(len(image.segments) for image in images):
            logger.warning(
                "PQ is 0 on %s: no segment was predicted in any of %d images",
                self._dataset_name,
                len(images),
            )

    def _annotation(self, image: _ImageSegments) -> dict[str, Any]:
        """Return the predicted segments as an entry of COCO's panoptic json."""
        segments = [
            {"id": id_, "category_id": self._categories.dataset_ids[k]}
            for id_, k in image.segments.tolist()
        ]
        return {"image_id": image.image_id, "file_name": image.file_name, "segments_info": segments}

    def _write_json(self, images: Sequence[_ImageSegments]) -> None:
        assert self._output_dir is not None
        annotations = [self._annotation(image) for image in images]
        is_thing = self._categories.is_thing.tolist()
        categories = [
            {"id": dataset_id, "isthing": int(thing)}
            for dataset_id, thing in zip(self._categories.dataset_ids, is_thing, strict=True)
        ]
        self._output_dir.mkdir(parents=True, exist_ok=True)
        path = self._output_dir / RESULTS_FILE
        path.write_text(
            json.dumps({"annotations": annotations, "categories": categories}), encoding="utf-8"
        )
        logger.info("wrote the segments of %d images to %s", len(annotations), path)


def panoptic_table(metrics: Mapping[str, float]) -> str:
    """Return the metrics of all categories, of things and of stuff as the rows of a table."""
    rows = [
        [name, *(metrics[key + suffix] for key in ("PQ", "SQ", "RQ"))]
        for name, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st"))
    ]
    return tabulate(
        rows, headers=["", "PQ", "SQ", "RQ"], tablefmt="pipe", floatfmt=".3f", numalign="left"
    )
