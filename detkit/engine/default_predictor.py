"""`DefaultPredictor`: a trained model that takes one image at a time."""

import logging
from typing import Any

import numpy as np
import torch

from detkit.checkpoint import DetectionCheckpointer
from detkit.config import CfgNode
from detkit.data import Metadata, MetadataCatalog
from detkit.data.dataset_mapper import image_to_tensor
from detkit.data.transforms.build import build_test_resize
from detkit.engine.evaluations import with_test_time_augmentation
from detkit.engine.run_config import prepare
from detkit.layers import PreparedWeights
from detkit.modeling import build_model
from detkit.structures import ModelInput, ModelOutput
from detkit.utils.env import resolve_device, reuse_freed_memory

logger = logging.getLogger(__name__)


class DefaultPredictor:
    """Runs a trained model on single images: resized as in testing, converted to the channel order the model wants.

    What convolutions compute from their weights is kept from image to image. Weights may be loaded
    or changed between two of them, but not through `tensor.data` or by a fused optimizer, which
    torch does not notice (`PreparedWeights`). For R50-FPN this takes 430 MB on a CPU, and the size
    of the model on other devices.

    Example:
        >>> predictor = DefaultPredictor(cfg)
        >>> instances = predictor(read_image("street.jpg", format="BGR"))["instances"]

    Attributes:
        model: In eval mode; with TEST.AUG.ENABLED the one that augments.
        metadata: Class names as `thing_classes`: those in the checkpoint, else those of
            DATASETS.TEST.
        input_format: Channel order of the model, INPUT.FORMAT.
    """

    def __init__(self, cfg: CfgNode, *, allow_partial: bool = False) -> None:
        """Build the model and load MODEL.WEIGHTS.

        Args:
            cfg: Not kept, and not changed.
            allow_partial: Accept weights that leave a part of the model, or all of it, at random
                values.

        Raises:
            CheckpointError: The weights do not fill the model.
            ValueError: MODEL.WEIGHTS is empty.
        """
        cfg = cfg.clone()
        prepare(cfg)
        self.model = build_model(cfg).eval()
        if resolve_device(cfg.MODEL.DEVICE).type == "cpu":
            reuse_freed_memory()
        checkpoint = DetectionCheckpointer(self.model).load(
            cfg.MODEL.WEIGHTS,
            checkpointables=[],
            strict=not allow_partial,
            averaged=cfg.MODEL_EMA.USE_FOR_PREDICTION,
        )
        if cfg.TEST.AUG.ENABLED:
            self.model = with_test_time_augmentation(cfg, self.model)
        self.metadata = _metadata(checkpoint.get("metadata") or {}, cfg)
        self.aug = build_test_resize(cfg)
        self.input_format = cfg.INPUT.FORMAT
        self._num_channels = len(cfg.MODEL.PIXEL_MEAN)
        self._prepared_weights = PreparedWeights()

    def __call__(self, original_image: np.ndarray) -> ModelOutput:
        """Return what the model finds in an image.

        Args:
            original_image: (H, W, C) uint8, BGR where the model takes three channels. Not changed.

        Returns:
            The model's output, in pixels of the given image: `instances` with `pred_boxes`,
            `scores`, `pred_classes`, and what else the model says (`ModelOutput`).

        Raises:
            TypeError: Not an array of uint8.
            ValueError: Not an image of the channels that the model takes.
        """
        self._check(original_image)
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        height, width = image.shape[:2]
        image = self.aug.get_transform(image).apply_image(image)
        model_input: ModelInput = {
            "image": image_to_tensor(image),
            "height": height,
            "width": width,
        }
        # Not inference_mode: what a model caches between images, such as anchors, must stay usable
        # in training.
        with torch.no_grad(), self._prepared_weights.in_use():
            return self.model([model_input])[0]

    def _check(self, image: Any) -> None:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            found = (
                f"an array of {image.dtype}"
                if isinstance(image, np.ndarray)
                else f"a {type(image).__name__}"
            )
            raise TypeError(
                f"an image must be an (H, W, C) uint8 array, as read_image gives it; got {found}"
            )
        if image.ndim != 3 or image.shape[2] != self._num_channels or 0 in image.shape:
            raise ValueError(
                f"an image must have shape (H, W, {self._num_channels}), got {image.shape}"
            )


def _metadata(saved: dict[str, Any], cfg: CfgNode) -> Metadata:
    """Class names of a checkpoint, else of the test set.

    The checkpoint comes first: it says what the model was trained on, and the test set may be
    another one.
    """
    if saved.get("thing_classes") or saved.get("stuff_classes"):
        return Metadata(cfg.MODEL.WEIGHTS).set(**saved)
    if cfg.DATASETS.TEST:
        return MetadataCatalog.get(cfg.DATASETS.TEST[0])
    logger.warning(
        "neither %s nor DATASETS.TEST names the classes: they are shown by number",
        cfg.MODEL.WEIGHTS,
    )
    return Metadata("no data set")
