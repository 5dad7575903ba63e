"""Panoptic quality on any data set with panoptic ground truth.

Legend: C categories, P predicted segments of an image, H and W height and width of an image.
"""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.record_files import spread
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.detections import image_id_of
from detkit.evaluation.evaluator import DatasetEvaluator, output_of
from detkit.evaluation.panoptic.ground_truth import PanopticCategories, load_panoptic_ground_truth
from detkit.evaluation.panoptic.quality import (
    PanopticCounts,
    Segment,
    count_segments,
    panoptic_metrics,
)
from detkit.evaluation.testing import table, write_json
from detkit.structures import ImageRecord, ModelInput, ModelOutput
from detkit.utils.colormap import id2rgb, rgb2id
from detkit.utils.errors import DataError
from detkit.utils.image import read_image, read_image_size
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.remote_files import stem_of
from detkit.utils.text import distinct_names, listed

logger = logging.getLogger(__name__)

RESULTS_FILE = "predictions.json"
PNG_FOLDER = "panoptic_predictions"
_NUM_CHECKED = 50


@dataclass(frozen=True)
class _ImageSegments:
    image_id: int | str
    counts: PanopticCounts
    file_name: str
    """Of the predicted segments' png."""
    segments: np.ndarray
    """(P, 2) id and category of the predicted segments."""

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return everything but the image's id, as `ImageCollector` gathers it."""
        counts = np.stack(list(vars(self.counts).values()), axis=1)
        # Only the categories of this image: a few of some 130.
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
        """Build the segments from the arrays of `to_arrays`."""
        counts = np.zeros((int(arrays["num_categories"][0]), 4))
        counts[arrays["categories"]] = arrays["counts"]
        file_name = os.fsdecode(arrays["file_name"].tobytes())
        return cls(image_id, PanopticCounts(*counts.T), file_name, arrays["segments"])


class COCOPanopticEvaluator(DatasetEvaluator):
    """Scores `panoptic_seg` outputs by panoptic quality."""

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        *,
        distributed: bool = True,
        records: Sequence[ImageRecord] | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Load the lists of true segments.

        Args:
            dataset_name: A registered data set: see `load_panoptic_ground_truth`.
            output_dir: Where `predictions.json` is written in COCO's panoptic format, and its pngs
                in `panoptic_predictions`. None writes nothing.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            records: What the data set's loader returns, if it has been called already; None calls
                it.
            max_image_pixels: As `max_pixels` in `read_image`, for the pngs.

        Raises:
            FileNotFoundError: A png that its json names does not exist.
            DataError: The data set has no panoptic ground truth, or a png does not fit.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._max_image_pixels = max_image_pixels
        self._output_dir = None if output_dir is None else str(output_dir)  # subclasses add to it
        self._categories = PanopticCategories(MetadataCatalog.get(dataset_name))
        records = DatasetCatalog.get(dataset_name) if records is None else records
        # From all records, so that every process gives an image the same name.
        stems = [stem_of(record.get("file_name", str(record["image_id"]))) for record in records]
        names = distinct_names(f"{stem}.png" for stem in stems)
        self._png_names = {r["image_id"]: name for r, name in zip(records, names, strict=True)}
        self._truth = load_panoptic_ground_truth(dataset_name, self._categories, records)
        self._records = records
        self._collector = ImageCollector(_ImageSegments, dataset_name, self._truth)

    def check_files(self) -> None:
        """Look into some pngs, spread over the data set.

        Raises:
            BadImageError: One cannot be read.
            DataError: One has another size than its image, or none of its segments.
        """
        problems = [p for r in spread(self._records, _NUM_CHECKED) if (p := self._check_png(r))]
        if problems:
            logger.warning(
                "%d of the panoptic png of %s that were looked at do not show the segments that"
                " their json lists; what is listed and not drawn can never be found, what is drawn"
                " and not listed does not count: %s",
                len(problems),
                self._dataset_name,
                listed(problems, 3),
            )

    def _check_png(self, record: ImageRecord) -> str:
        """Return how a png differs from the list of its segments; empty if it does not."""
        truth = self._truth[record["image_id"]]
        ids = rgb2id(read_image(truth.file_name, "RGB", max_pixels=self._max_image_pixels))
        expected = (record.get("height"), record.get("width"))
        if None in expected:
            expected = read_image_size(record["file_name"])
        if ids.shape != expected:
            raise DataError(
                f"panoptic png {truth.file_name} is {ids.shape}, its image {record['file_name']}"
                f" {expected} (height, width)"
            )
        named = {segment.id for segment in truth.segments}
        found = set(np.unique(ids).tolist())
        if named and not named & found:
            raise DataError(
                f"panoptic png {truth.file_name} shows none of its segments {sorted(named)[:5]},"
                f" but the ids {sorted(found)[:5]}: a pixel holds red + 256 green + 65536 blue"
            )
        differing = (named - found, found - named - {0})  # 0 is no segment
        if not any(differing):
            return ""
        undrawn, unlisted = (sorted(ids)[:5] for ids in differing)
        return f"{truth.file_name} (not drawn: {undrawn}, not listed: {unlisted})"

    def reset(self) -> None:
        """Remove what was processed."""
        self._collector.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Add one batch of outputs with `panoptic_seg`: (H, W) segment ids, a dict per segment.

        As in Detectron2, None in the place of the dicts says that a pixel is the category, by its
        contiguous id, times the `label_divisor` of the metadata, plus the number of the instance;
        -1 is no segment.

        Raises:
            ValueError: An image is not in the data set or came before, or pixels and segments of a
                prediction have different ids.
            ConfigError: An output has no `panoptic_seg`.
            DataError: A prediction has another size than the ground truth, or a category that the
                data set does not have.
            FileNotFoundError: A png of the ground truth is missing.
        """
        # Matched at once, so that no map of pixels has to be held.
        for model_input, output in zip(inputs, outputs, strict=True):
            image_id = image_id_of(model_input)
            self._collector.check(image_id)
            ids, segments_info = output_of(output, "panoptic_seg", "panoptic quality")
            predicted_ids = ids.cpu().numpy()
            if segments_info is None:
                predicted_ids, segments_info = self._read_coded(predicted_ids)
            where = f"the prediction for image {image_id!r}"
            predicted = []
            for info in segments_info:
                category = self._categories.number_of(info["isthing"], info["category_id"], where)
                predicted.append(Segment(int(info["id"]), category))
            counts = self._count(image_id, predicted_ids, predicted)
            file_name = self._png_names[image_id]
            segments = np.array([(s.id, s.category) for s in predicted], np.int64).reshape(-1, 2)
            self._collector.add(_ImageSegments(image_id, counts, file_name, segments))
            if self._output_dir is not None:
                folder = Path(self._output_dir) / PNG_FOLDER
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(id2rgb(predicted_ids)).save(folder / file_name)

    def _read_coded(self, codes: np.ndarray) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return segment ids and a dict per segment of a map that holds both."""
        metadata = MetadataCatalog.get(self._dataset_name)
        things = set(metadata.thing_dataset_id_to_contiguous_id.values())
        segments = []
        for code in np.unique(codes[codes >= 0]).tolist():
            category = code // metadata.label_divisor
            is_thing = category in things
            segments.append({"id": code + 1, "isthing": is_thing, "category_id": category})
        return codes + 1, segments

    def _count(
        self, image_id: int | str, predicted_ids: np.ndarray, predicted: Sequence[Segment]
    ) -> PanopticCounts:
        truth = self._truth[image_id]
        truth_ids = rgb2id(read_image(truth.file_name, "RGB", max_pixels=self._max_image_pixels))
        if truth_ids.shape != predicted_ids.shape:
            raise DataError(
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

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            `panoptic_seg` with PQ, SQ, RQ of all categories, of things (_th) and of stuff (_st), in
            [0, 100]; segments in images that were not predicted count as missed. Empty in all
            processes but the main one.
        """
        images = self._collector.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if images is None:
            return results
        if self._output_dir is not None:
            self._write_json(Path(self._output_dir) / RESULTS_FILE, images)
        total = sum((image.counts for image in images), PanopticCounts.zeros(len(self._categories)))
        if self._collector.warn_if_incomplete(images, "the segments in the others count as missed"):
            predicted = {image.image_id for image in images}
            # From the lists of segments alone, without reading a png.
            for image_id, truth in self._truth.items():
                if image_id not in predicted:
                    for segment in truth.segments:
                        total.missed[segment.category] += not segment.is_crowd
        elif images and not any(len(image.segments) for image in images):
            logger.warning(
                "PQ is 0 on %s: no segment was predicted in any of %d images",
                self._dataset_name,
                len(images),
            )
        metrics = panoptic_metrics(total, self._categories.is_thing)
        logger.info("panoptic quality on %s:\n%s", self._dataset_name, panoptic_table(metrics))
        results["panoptic_seg"] = metrics
        return results

    def _write_json(self, path: Path, images: Sequence[_ImageSegments]) -> None:
        dataset_ids = self._categories.dataset_ids
        annotations = []
        for image in images:
            infos = [
                {"id": segment_id, "category_id": dataset_ids[category]}
                for segment_id, category in image.segments.tolist()
            ]
            annotations.append(
                {"image_id": image.image_id, "file_name": image.file_name, "segments_info": infos}
            )
        is_thing = self._categories.is_thing.tolist()
        categories = [
            {"id": dataset_id, "isthing": int(thing)}
            for dataset_id, thing in zip(dataset_ids, is_thing, strict=True)
        ]
        content = {"annotations": annotations, "categories": categories}
        write_json(path, content, f"the segments of {len(annotations)} images")


def panoptic_table(metrics: Mapping[str, float]) -> str:
    """Return the metrics of all categories, of things and of stuff as the rows of a table."""
    rows = [
        [name, *(metrics[key + suffix] for key in ("PQ", "SQ", "RQ"))]
        for name, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st"))
    ]
    return table(rows, ["", "PQ", "SQ", "RQ"], name_columns=[0])
