"""`ExportedPredictor`: `DefaultPredictor` for exported models.

Legend: N images, H and W height and width of an image, C channels, M objects in one image.
"""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from detkit.export.runtime.model_file import Arrays, ModelFileError, one_line, open_model
from detkit.export.runtime.resize import output_size, resize_antialiased, resize_bilinear
from detkit.export.runtime.results import merged_segments, rescaled_detections
from detkit.utils.errors import ConfigError, DataError, UserError
from detkit.utils.image_file import MAX_IMAGE_PIXELS

logger = logging.getLogger(__name__)


class ImageTypeError(UserError, TypeError):
    """An image whose values are not of a type that the model takes."""


class ExportedPredictor:
    """Runs an exported model on images; needs neither torch, nor a config, nor weights.

    Example:
        ```python
        predictor = ExportedPredictor("deploy/model.onnx")
        found = predictor(read_image("street.jpg", format="BGR"))["instances"]
        print(found.pred_boxes, found.scores, predictor.metadata.thing_classes)
        ```

    Attributes:
        metadata: Class names and settings; see `ModelMetadata`.
        score_threshold: Objects below it are left out, in merging things and stuff, too; None for
            the thresholds of the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        score_threshold: float | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Open the file.

        Args:
            path: A `.onnx` file, or the `.xml` of OpenVINO.
            score_threshold: See above; it cannot find what is below that of the file.
            num_threads: Threads that the model runs in; None for as many as there are cores.

        Raises:
            MissingFileError: There is no such file.
            MissingPackageError: The library that runs it is not installed.
            ModelFileError: It is no exported model.
        """
        self.metadata, self._run = open_model(path, num_threads)
        self.score_threshold = score_threshold
        lowest = self.metadata.score_threshold
        if score_threshold is not None and score_threshold < lowest:
            logger.warning("%s was exported to find nothing below a score of %g", path, lowest)
        self._path = os.fspath(path)

    def __call__(self, original_image: np.ndarray) -> dict[str, Any]:
        """Return what the model finds in an image.

        Args:
            original_image: (H, W, C) uint8, BGR if the model takes three channels; with a format
                RAW, as the file holds it, uint8 or float32. Not changed.

        Returns:
            In pixels of the image, as far as the model predicts it: `instances`, a `Detections`;
            `sem_seg`, (classes, H, W) float32 scores; `panoptic_seg`, the (H, W) int32 segment of
            every pixel and a dict per segment. Of a proposal network `proposals`, a `Detections`
            without classes.

        Raises:
            ImageTypeError: The image is not an array of uint8.
            DataError: The image does not have the number of channels that the model takes.
            ModelFileError: The outputs are not those that the file announces.
        """
        return self.predict([original_image])[0]

    def predict(self, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
        """Return what the model finds in each of N images, which run as one batch.

        Smaller images are padded to the size of the largest. Arguments and errors as above.
        """
        if not images:
            return []
        inputs = self.inputs_of(images)
        shape, sizes = inputs["images"].shape, inputs["image_sizes"]
        try:
            outputs = self._run(inputs)
        except Exception as error:  # of either library; ours have been raised before
            reason = f"fails at a batch of shape {shape}: {one_line(error)}"
            raise ModelFileError(f"{self._path} {reason}") from error
        self._check(outputs, shape)
        return [
            self._result(
                {name: outputs[name][i] for name in self.metadata.outputs},
                (int(size[0]), int(size[1])),
                image.shape[:2],
            )
            for i, (size, image) in enumerate(zip(sizes, images, strict=True))
        ]

    def inputs_of(self, images: Sequence[np.ndarray]) -> Arrays:
        """Return the inputs of the graph for N images, resized and padded; errors as above."""
        resized = [self._resized(image) for image in images]
        sizes = np.array([image.shape[:2] for image in resized], np.int64)
        height, width = sizes.max(axis=0)
        shape = (len(resized), self.metadata.channels, height, width)
        batch = np.zeros(shape, self.metadata.dtype)
        for planes, image in zip(batch, resized, strict=True):
            planes[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        return {"images": batch, "image_sizes": sizes}

    def _resized(self, image: Any) -> np.ndarray:
        """Return an image as the model takes it, (H, W, C)."""
        metadata = self.metadata
        dtypes = (np.uint8, np.float32) if metadata.input_format == "RAW" else (np.uint8,)
        if not isinstance(image, np.ndarray) or image.dtype not in dtypes:
            kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
            raise ImageTypeError(f"an image must be an (H, W, C) uint8 array, got {kind}")
        if image.dtype == np.float32 and metadata.dtype == "uint8":
            raise ImageTypeError(
                "this model takes uint8 only: export it with --input-dtype float32"
            )
        if image.ndim != 3 or image.shape[2] != metadata.channels or 0 in image.shape:
            raise DataError(
                f"an image must have shape (H, W, {metadata.channels}), got {image.shape}"
            )
        if metadata.input_format == "RGB":
            image = image[:, :, ::-1]
        rule, lengths = metadata.resize_rule, (metadata.min_size, metadata.max_size)
        size = output_size(image.shape[0], image.shape[1], rule, *lengths)
        if size == image.shape[:2]:
            return image
        if size[0] * size[1] > MAX_IMAGE_PIXELS:
            raise ConfigError(
                f"the model resizes an image of {image.shape[0]}x{image.shape[1]} to"
                f" {size[0]}x{size[1]} (height x width), more than {MAX_IMAGE_PIXELS} pixels"
            )
        is_float = metadata.resize_rule == "torchvision"
        return resize_bilinear(image, size) if is_float else resize_antialiased(image, size)

    def _check(self, outputs: Arrays, batch_shape: tuple[int, ...]) -> None:
        """Raise an error for outputs that would be read wrongly."""
        num_images, _, height, width = batch_shape
        dims = {"boxes": 3, "scores": 2, "classes": 2, "num_detections": 1}
        dims |= {"masks": 4, "keypoints": 4, "sem_seg": 4}
        for name in self.metadata.outputs:
            shape = outputs[name].shape
            rows = outputs["boxes"].shape[1] if name not in ("num_detections", "sem_seg") else None
            kinds = "iu" if name in ("classes", "num_detections") else "fb"
            is_right = (
                outputs[name].dtype.kind in kinds
                and len(shape) == dims[name]
                and shape[0] == num_images
                and (rows is None or shape[1] == rows)
                and 0 not in shape[1 if name == "sem_seg" else 2 :]
                and (name != "boxes" or shape[2] == 4)
                and (name != "keypoints" or shape[3] == 3)
                and (name != "sem_seg" or (shape[2] >= height and shape[3] >= width))
            )
            if not is_right:
                raise ModelFileError(
                    f"{self._path}: output {name!r} is {outputs[name].dtype} of shape {shape}"
                )
        if "boxes" in self.metadata.outputs:
            counts, rows = outputs["num_detections"], outputs["boxes"].shape[1]
            if rows > self.metadata.max_detections:
                raise ModelFileError(
                    f"{self._path}: it returns {rows} objects per image, more than the"
                    f" {self.metadata.max_detections} that its metadata allows"
                )
            if counts.min() < 0 or counts.max() > rows:
                raise ModelFileError(f"{self._path}: num_detections is {counts.tolist()}")
            if "classes" in outputs and outputs["classes"].min(initial=0) < 0:
                raise ModelFileError(f"{self._path}: it predicts a class below 0")

    def _result(
        self, outputs: Arrays, size: tuple[int, int], original_size: tuple[int, int]
    ) -> dict[str, Any]:
        """Return the result of an image, given its outputs and the size that the model saw."""
        metadata, result = self.metadata, {}
        if "boxes" in outputs:
            count = int(outputs["num_detections"])
            rows = {
                name: values[:count]
                for name, values in outputs.items()
                if name not in ("num_detections", "sem_seg")
            }
            found = rescaled_detections(
                rows,
                size,
                original_size,
                score_threshold=-np.inf if self.score_threshold is None else self.score_threshold,
                mask_threshold=metadata.mask_threshold,
                mask_pasted=metadata.mask_pasted,
            )
            result["instances" if "classes" in outputs else "proposals"] = found
        if "sem_seg" in outputs:
            # The padding is cut off first, so that it does not bleed in.
            scores = outputs["sem_seg"][:, : size[0], : size[1]].transpose(1, 2, 0)
            result["sem_seg"] = resize_bilinear(scores, original_size).transpose(2, 0, 1)
        if metadata.panoptic is not None:
            limits = dict(metadata.panoptic)
            if self.score_threshold is not None:
                limits["instances_score_threshold"] = self.score_threshold
            labels = result["sem_seg"].argmax(axis=0)
            result["panoptic_seg"] = merged_segments(result["instances"], labels, **limits)
        return result
