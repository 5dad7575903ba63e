"""`VisualizationHook`: pictures of predictions beside the ground truth while a model learns."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from detkit.engine.train_loop import HookBase
from detkit.evaluation import inference_context
from detkit.structures import ImageRecord, ModelInput, ModelOutput
from detkit.utils.image import read_image
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.visualization import ColorMode, VisImage, Visualizer, readable_scale, side_by_side

logger = logging.getLogger(__name__)


class VisualizationHook(HookBase):
    """Draws the model's predictions on some fixed images, beside their ground truth, every so often and at the end.

    Writes `<image number>_<iteration>.jpg` into a folder, and the same pictures to the storage for
    TensorBoard. To be registered in the main process only.
    """

    def __init__(
        self,
        period: int,
        model: nn.Module,
        load_records: Callable[[], Sequence[ImageRecord]],
        mapper: Callable[[ImageRecord], ModelInput],
        output_dir: str,
        metadata: Any = None,
        num_images: int = 4,
        score_threshold: float = 0.5,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ) -> None:
        """Remember what to draw.

        Args:
            period: Iterations between two series of pictures; 0 draws at the end only.
            model: Without the wrapper of DistributedDataParallel.
            load_records: Gives the data set; called when the first picture is drawn.
            mapper: Record to model input, as in testing.
            output_dir: Folder of the pictures; made if absent.
            metadata: For the names of the classes.
            num_images: How many images, evenly spaced over the data set, and the same ones each
                time.
            score_threshold: Predictions below this score are not drawn.
            max_image_pixels: As `max_pixels` in `read_image`.
        """
        self._period = period
        self._model = model
        self._load_records = load_records
        self._mapper = mapper
        self._output_dir = Path(output_dir)
        self._metadata = metadata
        self._num_images = num_images
        self._score_threshold = score_threshold
        self._max_image_pixels = max_image_pixels
        self._records: Sequence[ImageRecord] | None = None

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if (
            self._period > 0
            and next_iter % self._period == 0
            and next_iter != self.trainer.max_iter
        ):
            self.draw()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self.draw()

    def draw(self) -> None:
        """Draw all pictures now."""
        if self._records is None:
            self._records = _evenly_spaced(self._load_records(), self._num_images)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        with inference_context(self._model), torch.no_grad():
            for index, record in enumerate(self._records):
                picture = self._picture(record)
                picture.save(str(self._output_dir / f"{index:02d}_{self.trainer.iter:07d}.jpg"))
                image = np.ascontiguousarray(picture.get_image().transpose(2, 0, 1))
                self.trainer.storage.put_image(f"predictions/{index:02d}", image)
        logger.info(
            "%d pictures of predictions beside ground truth are in %s",
            len(self._records),
            self._output_dir,
        )

    def _picture(self, record: ImageRecord) -> VisImage:
        output = self._model([self._mapper(record)])[0]
        return draw_truth_and_prediction(
            record, output, self._metadata, self._score_threshold, self._max_image_pixels
        )


# What a model predicts -> the entries of a record that say the same. Truth of another kind than the
# prediction would make the two sides of a picture hard to compare.
_TRUTH_OF_FIELD = {"pred_masks": "segmentation", "pred_keypoints": "keypoints"}
_PANOPTIC_ENTRIES = ("pan_seg_file_name", "segments_info")


def draw_truth_and_prediction(
    record: ImageRecord,
    output: ModelOutput,
    metadata: Any = None,
    score_threshold: float = 0.5,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> VisImage:
    """Draw what is known of an image on the left and what a model says of it on the right, each class in one colour.

    Args:
        record: The image file is read again, upright and in its own size. Of its annotations, those
            are drawn that the model predicts.
        output: In pixels of that file.
        metadata: Names and colours of the classes.
        score_threshold: Instances below it are not drawn.
        max_image_pixels: As `max_pixels` in `read_image`, of image and ground truth.
    """
    rgb = read_image(record["file_name"], "RGB", max_pixels=max_image_pixels)
    scale = readable_scale(rgb.shape[:2])
    visualizer = Visualizer(rgb, metadata, scale, ColorMode.SEGMENTATION)
    truth = visualizer.draw_dataset_dict(_comparable(record, output), max_image_pixels)
    prediction = Visualizer(rgb, metadata, scale, ColorMode.SEGMENTATION).draw_output(
        output, score_threshold
    )
    return side_by_side(truth, prediction)


def _comparable(record: ImageRecord, output: ModelOutput) -> ImageRecord:
    """The record without what the output says nothing of."""
    left_out: set[str] = set() if "panoptic_seg" in output else set(_PANOPTIC_ENTRIES)
    if "sem_seg" not in output:
        left_out.add("sem_seg_file_name")
    found = output.get("instances", output.get("proposals"))
    if found is None:
        left_out.add("annotations")
    hidden = {
        name: None
        for field, name in _TRUTH_OF_FIELD.items()
        if found is None or not found.has(field)
    }
    kept: dict[str, Any] = {key: value for key, value in record.items() if key not in left_out}
    kept["annotations"] = [{**annotation, **hidden} for annotation in kept.get("annotations") or []]
    return cast(ImageRecord, kept)


def _evenly_spaced(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    count = min(count, len(records))
    return [records[i * len(records) // count] for i in range(count)]
