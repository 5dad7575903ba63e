"""A finished picture, to be saved or shown.

Shapes: (H, W) picture.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image


class VisImage:
    """A finished picture."""

    def __init__(self, image: npt.NDArray[np.uint8]) -> None:
        """Hold an (H, W, 3) uint8 RGB picture."""
        self._image = image

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self._image.shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self._image.shape[1]

    def get_image(self) -> npt.NDArray[np.uint8]:
        """Return the picture, (H, W, 3) uint8 RGB."""
        return self._image

    def save(self, filepath: str | os.PathLike[str]) -> None:
        """Write the picture; the file's suffix says the format. Its folder is made if absent.

        Raises:
            ValueError: Pillow knows no format of that suffix.
        """
        path = Path(filepath)
        if path.suffix.lower() not in Image.registered_extensions():
            raise ValueError(
                f"cannot tell an image format from the suffix {path.suffix!r} of {path}; .jpg or"
                " .png will do"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        # 4:4:4 where it is a JPEG: thin coloured lines would smear otherwise. Other formats ignore
        # both settings.
        Image.fromarray(self._image).save(path, quality=92, subsampling=0)
