"""A finished picture, to be saved, shown, or put beside another."""

import math
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import Image

from detkit.utils.errors import ConfigError
from detkit.visualization.canvas import Canvas

# The longer side that `readable_scale` aims at: labels of several neighbours fit there, and the
# picture fits on a screen.
_READABLE_SIDE = 640
_TITLE_COLOR = (32, 32, 32)


class VisImage:
    """A finished picture.

    Example:
        >>> picture = VisImage(np.zeros((48, 64, 3), np.uint8))
        >>> picture.height, picture.width
        (48, 64)
    """

    def __init__(self, image: npt.NDArray[np.uint8] | Canvas, scale: float = 1.0) -> None:
        """Hold an (H, W, 3) uint8 RGB picture, or a canvas as it is at each time.

        Args:
            image: The picture.
            scale: Size of the output relative to the picture.
        """
        if not isinstance(image, Canvas) and scale != 1.0:
            image = Canvas(image, scale).to_array()
        self._image = image
        self.scale = scale

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.get_image().shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.get_image().shape[1]

    @property
    def fig(self) -> NoReturn:
        """Not here: Detectron2's figure of matplotlib."""
        raise AttributeError(
            "pictures are drawn without matplotlib: draw by the methods of Visualizer, and show"
            " get_image()"
        )

    ax = canvas = fig

    def get_image(self) -> npt.NDArray[np.uint8]:
        """Return the picture, (H, W, 3) uint8 RGB."""
        return self._image.to_array() if isinstance(self._image, Canvas) else self._image

    def reset_image(self, img: npt.NDArray[Any]) -> None:
        """Begin again with an (H, W, 3) picture, brought to this size; what was drawn is lost."""
        picture = Image.fromarray(np.asarray(img).clip(0, 255).astype(np.uint8))
        picture = picture.resize((self.width, self.height), Image.Resampling.BICUBIC)
        if isinstance(self._image, Canvas):
            self._image.reset(picture)
        else:
            self._image = np.asarray(picture)

    def save(self, filepath: str | os.PathLike[str]) -> None:
        """Write the picture in the format of the file's suffix; create its folder if needed.

        Raises:
            ConfigError: Pillow knows no format of that suffix.
        """
        path = Path(filepath)
        if path.suffix.lower() not in Image.registered_extensions():
            raise ConfigError(f"no image format has the suffix {path.suffix!r} of {path}: use .png")
        path.parent.mkdir(parents=True, exist_ok=True)
        # 4:4:4 where it is a JPEG: thin coloured lines would smear otherwise. Other formats ignore
        # both settings.
        Image.fromarray(self.get_image()).save(path, quality=92, subsampling=0)


def readable_scale(image_size: tuple[int, int]) -> float:
    """Return the scale (at least 1) at which labels on a picture (height, width) are readable."""
    return max(1.0, _READABLE_SIDE / max(image_size))


def side_by_side(
    truth: VisImage, prediction: VisImage, titles: tuple[str, str] = ("ground truth", "prediction")
) -> VisImage:
    """Put two pictures beside each other, each under its title.

    Raises:
        ValueError: They differ in height.
    """
    if truth.height != prediction.height:
        raise ValueError(
            f"pictures side by side need one height, got {truth.height} and {prediction.height}"
        )
    columns = []
    for picture, title in zip((truth, prediction), titles, strict=True):
        font_size = Canvas(picture.get_image()).font_size
        bar_height = math.ceil(font_size * 1.8)
        bar = Canvas(np.full((bar_height, picture.width, 3), 255, np.uint8))
        width, height = bar.text_size(title, font_size)
        corner = ((picture.width - width) / 2, (bar_height - height) / 2)
        bar.draw_text(title, corner, color=_TITLE_COLOR, font_size=font_size)
        columns.append(np.concatenate([bar.to_array(), picture.get_image()], axis=0))
    gap = np.full((columns[0].shape[0], max(4, truth.width // 100), 3), 255, np.uint8)
    return VisImage(np.concatenate([columns[0], gap, columns[1]], axis=1))
