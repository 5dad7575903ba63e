"""What Cityscapes' two evaluators share: the pngs of the ground truth and one pass over images.

The package `cityscapesscripts` is not used: it calls `np.in1d`, which NumPy 2.4 removed, ends the
process if a file is missing, and writes into the current folder.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.catalog import DatasetCatalog, MetadataCatalog
from detkit.data.datasets.builtin_meta import CITYSCAPES_LABELS
from detkit.data.record_files import spread
from detkit.evaluation.collector import ImageCollector
from detkit.evaluation.evaluator import DatasetEvaluator
from detkit.evaluation.testing import metrics_table, per_class_table
from detkit.structures import ModelInput, ModelOutput
from detkit.utils.errors import DataError
from detkit.utils.image import read_image_size, read_label_map
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.logger import shown_if_short
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)

LABEL_IDS = {label.name: label.id for label in CITYSCAPES_LABELS}
"""Label id of each evaluated class by its name."""
FIRST_INSTANCE_ID = 1000
"""Instance ids are 1000 times the label and the object's number; lower ones are labels."""
_INSTANCE_FILES = "_gtFine_instanceIds.png"
_LABEL_FILES = "_gtFine_labelIds.png"
_NUM_CHECKED = 50


class CityscapesEvaluator(DatasetEvaluator):
    """Base of the evaluators, which compare one image with its ground truth at a time."""

    task: str
    """Under which the metrics stand in the results."""
    classes_key: str
    """Key of the class names in the data set's metadata."""
    item_type: type
    """What the collector holds of each image."""
    scored: str
    """What is scored, for the log."""
    class_prefix: str
    """Beginning of the names of the metrics per class."""

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """List the files `gt_dir/CITY/CITY_SEQUENCE_FRAME_gtFine_*.png` of the ground truth.

        Args:
            dataset_name: A registered data set, whose metadata has `gt_dir`, and `thing_classes`
                for instances or `stuff_classes` for pixels.
            distributed: Whether to score the predictions of all processes together, in the main
                one.
            max_image_pixels: As `max_pixels` in `read_label_map`, for the pngs.

        Raises:
            DataError: There is no ground truth, or a class is not one of Cityscapes'.
        """
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._max_image_pixels = max_image_pixels
        metadata = MetadataCatalog.get(dataset_name)
        folder = metadata.get("gt_dir")
        if folder is None:
            raise DataError(
                "Cityscapes' scores need the folder of the ground truth of data set"
                f" {dataset_name!r}: set MetadataCatalog.get({dataset_name!r}).gt_dir"
            )
        # Only listed here; each file is read when its image comes.
        files = sorted(Path(folder).glob(f"*/[!.]*{_INSTANCE_FILES}"))
        if not files:
            raise DataError(
                f"no ground truth of data set {dataset_name!r}: {folder} has no"
                f" CITY/*{_INSTANCE_FILES}"
            )
        self._frames = {path.name.removesuffix(_INSTANCE_FILES): path for path in files}
        self._class_names: list[str] = list(metadata.get(self.classes_key) or ())
        if not self._class_names:
            raise DataError(
                f"data set {dataset_name!r} has no {self.classes_key}: set"
                f" MetadataCatalog.get({dataset_name!r}).{self.classes_key} = [...]"
            )
        for name in self._class_names:
            if name not in LABEL_IDS:
                raise DataError(
                    f"{self.classes_key} of data set {dataset_name!r} has {name!r}, which is no"
                    f" evaluated class of Cityscapes.{did_you_mean(name, LABEL_IDS)}"
                )
        self._labels = [LABEL_IDS[name] for name in self._class_names]
        self._collector = ImageCollector(self.item_type, dataset_name, self._frames)

    def check_files(self) -> None:
        """Look for the pngs of all images, and into some of them, spread over the data set.

        Raises:
            DataError: An image has no ground truth, or that has another size or unknown labels.
            BadImageError: A png cannot be read.
        """
        frames = {}
        for record in DatasetCatalog.get(self._dataset_name):
            frame = _frame_of(record["file_name"])
            frames[frame] = record["file_name"]
            if frame not in self._frames:
                raise DataError(
                    f"image {record['file_name']} of data set {self._dataset_name!r} has no"
                    f" {frame}{_INSTANCE_FILES} in its ground truth"
                )
        for frame in spread(list(frames), _NUM_CHECKED):
            size = read_image_size(frames[frame])
            for path, truth in self._truth_files(frame):
                if truth.shape != size:
                    raise DataError(
                        f"ground truth {path} is {truth.shape}, its image {frames[frame]} {size}"
                        " (height, width)"
                    )

    def _truth_files(self, frame: str) -> Iterator[tuple[Path, np.ndarray]]:
        """Yield the pngs that an image is compared with, and what is in them."""
        yield self._frames[frame], self._instance_ids(frame)

    def reset(self) -> None:
        """Remove what was processed."""
        self._collector.reset()

    def process(self, inputs: Sequence[ModelInput], outputs: Sequence[ModelOutput]) -> None:
        """Compare one batch of outputs with the ground truth.

        Raises:
            ValueError: An image is not in the data set or came before, or an input has no
                `file_name`.
            ConfigError: An output lacks what is scored, or its classes are not those of the data
                set.
            DataError: A prediction has another size than its ground truth.
            FileNotFoundError: A file of the ground truth is missing.
        """
        for model_input, output in zip(inputs, outputs, strict=True):
            if "file_name" not in model_input:
                raise ValueError(
                    "Cityscapes' scores need 'file_name' in every input, got the keys"
                    f" {sorted(model_input)}"
                )
            frame = _frame_of(model_input["file_name"])
            self._collector.check(frame)
            self._collector.add(self._compare(frame, output))

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Score what was processed.

        Returns:
            Task -> metric -> number in [0, 100]; empty in all processes but the main one.
        """
        images = self._collector.gather(self._distributed)
        results: OrderedDict[str, dict[str, float]] = OrderedDict()
        if images is None:
            return results
        metrics = self._score(images)
        results[self.task] = metrics
        logger.info(
            "Cityscapes' scores of %s on %s:\n%s",
            self.scored,
            self._dataset_name,
            metrics_table(metrics),
        )
        text = per_class_table(metrics, self.class_prefix)
        shown = shown_if_short(len(self._class_names))
        logger.info("per class on %s:\n%s", self._dataset_name, text, extra=shown)
        return results

    def _compare(self, frame: str, output: ModelOutput) -> Any:
        """Return the `item_type` of an image."""
        raise NotImplementedError

    def _score(self, images: Sequence[Any]) -> dict[str, float]:
        """Return the metrics over all images."""
        raise NotImplementedError

    def _instance_ids(self, frame: str) -> np.ndarray:
        return read_label_map(str(self._frames[frame]), max_pixels=self._max_image_pixels)

    def _label_ids(self, frame: str) -> np.ndarray:
        path = self._label_file(frame)
        labels = read_label_map(str(path), max_pixels=self._max_image_pixels)
        if labels.size and labels.max() >= FIRST_INSTANCE_ID:
            raise DataError(f"ground truth {path} has the label {labels.max()}, which is none")
        return labels

    def _label_file(self, frame: str) -> Path:
        return self._frames[frame].with_name(frame + _LABEL_FILES)


def _frame_of(file_name: str) -> str:
    """Return the frame of an image, which is called CITY_SEQUENCE_FRAME_leftImg8bit.png."""
    return Path(file_name).stem.removesuffix("_leftImg8bit")
