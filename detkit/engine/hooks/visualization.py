"""Pictures of predictions beside ground truth: during training, and of the test sets after it."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from detkit.config import CfgNode
from detkit.data import DatasetMapper, MetadataCatalog, get_test_records
from detkit.engine.tiling import TiledModel
from detkit.engine.train_loop import PeriodicHook
from detkit.evaluation import inference_context
from detkit.structures import ImageRecord, ModelInput, ModelOutput
from detkit.utils.image import convert_image_to_rgb, read_image
from detkit.utils.image_file import MAX_IMAGE_PIXELS
from detkit.utils.remote_files import stem_of
from detkit.utils.text import distinct_names, file_stem
from detkit.visualization import (
    COLOR_MODES,
    ColorMode,
    VisImage,
    Visualizer,
    readable_scale,
    side_by_side,
)

logger = logging.getLogger(__name__)


class VisualizationHook(PeriodicHook):
    """Draws predictions on some fixed images, beside their ground truth.

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
        *,
        is_raw: bool = False,
        show_labels: bool = True,
        color_mode: ColorMode = ColorMode.SEGMENTATION,
    ) -> None:
        """Set what to draw.

        Args:
            period: Iterations between two series of pictures; 0 draws at the end only.
            model: Without the wrapper of DistributedDataParallel.
            load_records: Returns the data set; called when the first picture is drawn.
            mapper: Record to model input, as in testing.
            output_dir: Folder of the pictures; made if absent.
            metadata: Names and colors of the classes.
            num_images: How many images, evenly spaced over the data set, and the same ones each
                time.
            score_threshold: Predictions below this score are not drawn.
            max_image_pixels: As `max_pixels` in `read_image`.
            is_raw: See `draw_truth_and_prediction`.
            show_labels: Whether names and scores are written.
            color_mode: What colours of objects stand for.
        """
        super().__init__(period)
        self._model = model
        self._load_records = load_records
        self._mapper = mapper
        self._output_dir = Path(output_dir)
        self._metadata = metadata
        self._num_images = num_images
        self._score_threshold = score_threshold
        self._max_image_pixels = max_image_pixels
        self._is_raw = is_raw
        self._show_labels = show_labels
        self._color_mode = color_mode
        self._records: list[ImageRecord] | None = None

    def act(self) -> None:
        self.draw()

    def draw(self) -> None:
        """Draw all pictures now."""
        if self._records is None:
            self._records = _spread(self._load_records(), self._num_images)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        for index, record in enumerate(self._records):
            picture = draw_truth_and_prediction(
                record,
                _predict(self._model, self._mapper, record),
                self._metadata,
                self._score_threshold,
                self._max_image_pixels,
                is_raw=self._is_raw,
                show_labels=self._show_labels,
                color_mode=self._color_mode,
            )
            picture.save(str(self._output_dir / f"{index:02d}_{self.trainer.iter:07d}.jpg"))
            # (C, H, W), as the storage's images are.
            image = np.ascontiguousarray(picture.get_image().transpose(2, 0, 1))
            self.trainer.storage.put_image(f"predictions/{index:02d}", image)
        logger.info(
            "%d pictures of predictions beside ground truth are in %s",
            len(self._records),
            self._output_dir,
        )


def write_pictures(
    cfg: CfgNode, model: nn.Module, folder: Path, *, limit: int = 12, min_score: float = 0.5
) -> list[Path]:
    """Draw predictions beside ground truth for images spread over each test set.

    Args:
        cfg: Read for `DATASETS.TEST`, `INPUT`, `VIS_LABELS` and `VIS_COLORS`.
        model: Runs in eval mode, and comes back in the modes it was in.
        folder: Where the pictures go, as `DATASET_IMAGE.jpg`, numbered where names are equal;
            older ones of that name are replaced.
        limit: At most so many pictures per data set.
        min_score: Predictions below it are not drawn: of a picture that shows every box down to a
            score of 0.05, nobody sees what the model is sure of.

    Returns:
        The files written.
    """
    mapper = DatasetMapper(cfg, is_train=False)
    model = TiledModel(cfg, model) if cfg.TEST.TILES.SIZE else model
    drawn: list[tuple[str, ImageRecord]] = []
    for name in cfg.DATASETS.TEST:
        drawn += [(name, record) for record in _spread(get_test_records(cfg, name), limit)]
    # `a.jpg` beside `a.png`, or images of one name in two folders, are two pictures.
    files = distinct_names(f"{file_stem(name)}_{stem_of(r['file_name'])}.jpg" for name, r in drawn)
    written = [folder / file for file in files]
    for path, (name, record) in zip(written, drawn, strict=True):
        picture = draw_truth_and_prediction(
            record,
            _predict(model, mapper, record),
            MetadataCatalog.get(name),
            min_score,
            cfg.INPUT.MAX_IMAGE_PIXELS,
            is_raw=cfg.INPUT.FORMAT == "RAW",
            show_labels=cfg.VIS_LABELS,
            color_mode=COLOR_MODES[cfg.VIS_COLORS],
        )
        picture.save(path)
    return written


def _spread(records: Sequence[ImageRecord], limit: int) -> list[ImageRecord]:
    """Return at most `limit` records, evenly spaced."""
    count = min(limit, len(records))
    return [records[i * len(records) // count] for i in range(count)]


def _predict(
    model: nn.Module, mapper: Callable[[ImageRecord], ModelInput], record: ImageRecord
) -> ModelOutput:
    with inference_context(model), torch.no_grad():
        return model([mapper(record)])[0]


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
    *,
    is_raw: bool = False,
    show_labels: bool = True,
    color_mode: ColorMode = ColorMode.SEGMENTATION,
) -> VisImage:
    """Draw the ground truth of an image on the left, and a model's output on the right.

    Args:
        record: The image file is read again, upright and in its own size. Of its annotations, those
            are drawn that the model predicts.
        output: In pixels of that file.
        metadata: Names and colors of the classes.
        score_threshold: Instances below it are not drawn.
        max_image_pixels: As `max_pixels` in `read_image`, of image and ground truth.
        is_raw: Whether the format of the images, INPUT.FORMAT, is RAW.
        show_labels: Whether names and scores are written.
        color_mode: What colours of objects stand for; those of classes can be compared.
    """
    image_format = "RAW" if is_raw else "RGB"
    image = read_image(record["file_name"], image_format, max_pixels=max_image_pixels)
    rgb = convert_image_to_rgb(image, image_format)
    scale = readable_scale(rgb.shape[:2])
    left, right = (
        Visualizer(rgb, metadata, scale, color_mode, show_labels=show_labels) for _ in range(2)
    )
    truth = left.draw_dataset_dict(_comparable(record, output), max_image_pixels)
    return side_by_side(truth, right.draw_output(output, score_threshold))


def _comparable(record: ImageRecord, output: ModelOutput) -> ImageRecord:
    """Return the record without what the output says nothing of."""
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
