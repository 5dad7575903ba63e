"""Two pictures beside each other, large enough to be read."""

import math

import numpy as np
import numpy.typing as npt

from detkit.visualization.canvas import Canvas
from detkit.visualization.vis_image import VisImage

# The longer side that `readable_scale` aims at: labels of several neighbours fit there, and on a
# screen.
_READABLE_SIDE = 640
_TITLE_COLOR = (32, 32, 32)


def readable_scale(image_size: tuple[int, int]) -> float:
    """Return the scale at which labels of a picture of `(height, width)` are readable: 1, or more
    for a small one.
    """
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
    columns = [
        _with_title(picture, title)
        for picture, title in zip((truth, prediction), titles, strict=True)
    ]
    gap = np.full((columns[0].shape[0], max(4, truth.width // 100), 3), 255, np.uint8)
    return VisImage(np.concatenate([columns[0], gap, columns[1]], axis=1))


def _with_title(picture: VisImage, title: str) -> npt.NDArray[np.uint8]:
    font_size = Canvas(picture.get_image()).font_size
    bar_height = math.ceil(font_size * 1.8)
    bar = Canvas(np.full((bar_height, picture.width, 3), 255, np.uint8))
    width, height = bar.text_size(title, font_size)
    corner = ((picture.width - width) / 2, (bar_height - height) / 2)
    bar.draw_text(title, corner, color=_TITLE_COLOR, font_size=font_size)
    return np.concatenate([bar.to_array(), picture.get_image()], axis=0)
