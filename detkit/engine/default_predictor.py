"""`DefaultPredictor`: run a trained model on one image at a time."""

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from detkit.checkpoint import DetectionCheckpointer
from detkit.config import CfgNode
from detkit.data import Metadata, MetadataCatalog
from detkit.data.dataset_mapper import image_to_tensor
from detkit.data.transforms.build import build_test_resize
from detkit.engine.evaluations import testing_precision, with_test_time_augmentation
from detkit.engine.run_config import prepare
from detkit.engine.tiling import TiledModel
from detkit.layers import PreparedWeights
from detkit.modeling import build_model
from detkit.structures import ModelInput, ModelOutput
from detkit.utils.env import resolve_device, reuse_freed_memory

logger = logging.getLogger(__name__)


class DefaultPredictor:
    """Runs a trained model on one image at a time.

    You give a config whose MODEL.WEIGHTS names a checkpoint, and an image as a BGR array, as
    `read_image` or OpenCV load it. You get the objects of the image, in its own pixels. The image
    is resized as in testing and converted to the channel order of the model.

    Example:
        ```python
        predictor = DefaultPredictor(cfg)
        instances = predictor(read_image("street.jpg", format="BGR"))["instances"]
        ```

    Attributes:
        model: In eval mode; with TEST.AUG.ENABLED the one with test-time augmentation, with
            TEST.TILES.SIZE the `TiledModel`.
        metadata: Class names as `thing_classes`: those in the checkpoint, else those of
            DATASETS.TEST.
        cfg: The settings, a copy.
        input_format: Channel order of the model, INPUT.FORMAT.
    """

    def __init__(self, cfg: CfgNode, *, allow_partial: bool = False) -> None:
        """Build the model and load MODEL.WEIGHTS.

        Args:
            cfg: The settings of the model; not changed.
            allow_partial: Accept weights that leave a part of the model at random values.

        Raises:
            CheckpointError: The weights do not fill the model.
            WeightsError: MODEL.WEIGHTS is empty.
        """
        self.cfg = cfg = cfg.clone()
        prepare(cfg)
        self.model = build_model(cfg).eval()
        if resolve_device(cfg.MODEL.DEVICE).type == "cpu":
            reuse_freed_memory()
        checkpoint = DetectionCheckpointer(self.model).load(
            cfg.MODEL.WEIGHTS,
            checkpointables=[],
            strict=not allow_partial,
            averaged=cfg.MODEL_EMA.get("USE_FOR_PREDICTION", False),  # a project's own group
        )
        if cfg.TEST.AUG.ENABLED:
            self.model = with_test_time_augmentation(cfg, self.model)
        if cfg.TEST.TILES.SIZE:
            self.model = TiledModel(cfg, self.model)
        self.metadata = _metadata(checkpoint.get("metadata", {}), cfg)
        self.aug = self.transform_gen = build_test_resize(cfg)  # the second is an older name
        self.input_format = cfg.INPUT.FORMAT
        self._num_channels = len(cfg.MODEL.PIXEL_MEAN)
        self._precision = testing_precision(cfg)
        # Keeps what convolutions compute from their weights: 430 MB for R50-FPN on a CPU, the size
        # of the model on other devices. It notices weights that are loaded or changed between two
        # images, except through `tensor.data` or by a fused optimizer, which torch does not count.
        self._prepared_weights = PreparedWeights()

    def __call__(self, original_image: np.ndarray) -> ModelOutput:
        """Return the predictions of the model for an image.

        Args:
            original_image: (H, W, C) uint8, BGR if the model takes three channels; with
                INPUT.FORMAT RAW, as the file holds it, uint8 or float32. Not changed.

        Returns:
            The output of the model, in pixels of the given image: `instances` with `pred_boxes`,
            `scores` and `pred_classes`, and the other fields of `ModelOutput`.

        Raises:
            TypeError: The image is not an array of uint8.
            ValueError: The image does not have the number of channels that the model takes.
        """
        self._check(original_image)
        image = original_image[:, :, ::-1] if self.input_format == "RGB" else original_image
        return self._run([self._model_input(image)])[0]

    def _model_input(self, image: np.ndarray) -> ModelInput:
        """Resize an image in the model's channel order as in testing."""
        height, width = image.shape[:2]
        if isinstance(self.model, TiledModel):  # which resizes its tiles
            return {"image": cast(Tensor, image), "height": height, "width": width}
        resized = self.aug.get_transform(image).apply_image(image)
        return {"image": image_to_tensor(resized), "height": height, "width": width}

    def _run(self, inputs: list[ModelInput]) -> list[ModelOutput]:
        # Not inference_mode: tensors that a model caches between images, such as anchors, must stay
        # usable in training.
        with torch.no_grad(), self._prepared_weights.in_use(), self._precision():
            return self.model(inputs)

    def _check(self, image: Any) -> None:
        dtypes = (np.uint8, np.float32) if self.input_format == "RAW" else (np.uint8,)
        if not isinstance(image, np.ndarray) or image.dtype not in dtypes:
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


def _metadata(saved: Mapping[str, Any], cfg: CfgNode) -> Metadata:
    """Return the class names of a checkpoint, else those of the test set."""
    own = {*dir(Metadata), "name"}
    saved = {key: value for key, value in saved.items() if key not in own}
    # The checkpoint comes first: it says what the model was trained on, and DATASETS.TEST may name
    # a data set of other classes.
    if saved.get("thing_classes") or saved.get("stuff_classes"):
        return Metadata(cfg.MODEL.WEIGHTS).set(**saved)
    if cfg.DATASETS.TEST:
        return MetadataCatalog.get(cfg.DATASETS.TEST[0])
    logger.warning(
        "neither %s nor DATASETS.TEST names the classes: they are shown by number",
        cfg.MODEL.WEIGHTS,
    )
    return Metadata("no data set")
