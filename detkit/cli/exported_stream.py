"""An exported model as `detkit predict` runs it: what `detkit.engine.Predictor` is for checkpoints.

Nothing here imports torch.
"""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from detkit.export.runtime import ExportedPredictor, read_image
from detkit.utils.errors import DataError
from detkit.utils.image import convert_image_to_rgb
from detkit.utils.media_file import Video


class ExportedPrediction(NamedTuple):
    """What a model finds in one image; as `detkit.engine.Prediction`."""

    output: dict[str, Any]
    image: np.ndarray
    source: str
    frame: int | None = None
    seconds: float | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """`(height, width)`"""
        return self.image.shape[0], self.image.shape[1]


class _Image(NamedTuple):
    name: str
    pixels: np.ndarray
    """In the order of channels that the predictor takes."""
    frame: int | None = None
    seconds: float | None = None


class ExportedStream:
    """Runs an exported model on files and videos, with the interface of `detkit.engine.Predictor`.

    Attributes:
        metadata: Class names and colours.
        cfg: What pictures look like.
    """

    def __init__(self, path: str, *, score_threshold: float, show_labels: bool) -> None:
        """Open the file; errors as of `ExportedPredictor`."""
        self._predictor = ExportedPredictor(path, score_threshold=score_threshold)
        self.metadata = self._predictor.metadata
        self.cfg = SimpleNamespace(VIS_LABELS=show_labels, VIS_COLORS="class")
        order = self.metadata.input_format
        self._format = "BGR" if order == "RGB" else order

    def stream(
        self,
        inputs: Iterable[str] | Video,
        *,
        batch_size: int = 1,
        on_error: Callable[[Any, Exception], None] | None = None,
    ) -> Iterator[ExportedPrediction]:
        """Yield what is found in each file, or in each frame of a video, in order.

        Args:
            inputs: Names of files, or a video.
            batch_size: Images that run together.
            on_error: Called with a source, which has a `name`, that cannot be read; None lets the
                error end the stream.
        """
        batch: list[_Image] = []
        for image in self._images(inputs, on_error):
            batch.append(image)
            if len(batch) == batch_size:
                yield from self._predict(batch)
                batch = []
        yield from self._predict(batch)

    def _images(
        self,
        inputs: Iterable[str] | Video,
        on_error: Callable[[Any, Exception], None] | None,
    ) -> Iterator[_Image]:
        if isinstance(inputs, Video):
            for frame in inputs:
                pixels = frame.pixels[:, :, ::-1] if self._format == "BGR" else frame.pixels
                yield _Image(inputs.name, pixels, frame.index, frame.seconds)
            return
        for name in inputs:
            try:
                yield _Image(name, read_image(name, self._format))
            except (DataError, OSError) as error:
                if on_error is None:
                    raise
                on_error(SimpleNamespace(name=name), error)

    def _predict(self, batch: list[_Image]) -> Iterator[ExportedPrediction]:
        found = self._predictor.predict([image.pixels for image in batch])
        for image, output in zip(batch, found, strict=True):
            rgb = convert_image_to_rgb(image.pixels, self._format)
            yield ExportedPrediction(output, rgb, image.name, image.frame, image.seconds)
