"""Windows of a TIFF file, of which only the tiles or strips that they touch are decoded."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from detkit.utils.image_file import BadImageError

_TIFF_SUFFIXES = (".tif", ".tiff")
_ORIENTATION = 274
_CHUNKY = 1


class TiffWindows:
    """An 8-bit colour TIFF, indexed as an array: `windows[y0:y1, x0:x1]` is (h, w, 3) uint8.

    What is decoded is kept while the next window touches the same rows: windows should be asked for
    row by row.
    """

    def __init__(self, path: str, page: Any, is_bgr: bool) -> None:
        """Take the first page of a file; see `open_tiff_windows`."""
        self._path, self._page, self._is_bgr = path, page, is_bgr
        self.shape = (int(page.imagelength), int(page.imagewidth), 3)
        is_tiled = page.is_tiled
        self._height = page.tilelength if is_tiled else min(page.rowsperstrip, page.imagelength)
        self._width = page.tilewidth if is_tiled else page.imagewidth
        self._decoded: dict[int, np.ndarray] = {}

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        height, width, channels = self.shape
        y0, y1, _ = window[0].indices(height)
        x0, x1, _ = window[1].indices(width)
        pixels = np.zeros((y1 - y0, x1 - x0, channels), dtype=np.uint8)
        across = -(-width // self._width)
        rows = range(y0 // self._height, -(-y1 // self._height))
        self._decoded = {k: v for k, v in self._decoded.items() if k // across in rows}
        for row in rows:
            for column in range(x0 // self._width, -(-x1 // self._width)):
                segment = self._segment(row * across + column)
                top, left = row * self._height, column * self._width
                bottom = min(top + segment.shape[0], y1)
                right = min(left + segment.shape[1], x1)
                part = segment[max(y0 - top, 0) : bottom - top, max(x0 - left, 0) : right - left]
                y, x = max(top - y0, 0), max(left - x0, 0)
                pixels[y : y + part.shape[0], x : x + part.shape[1]] = part
        return pixels[:, :, ::-1] if self._is_bgr else pixels

    def _segment(self, index: int) -> np.ndarray:
        if index not in self._decoded:
            page = self._page
            try:
                with Path(self._path).open("rb") as file:
                    file.seek(page.dataoffsets[index])
                    data = file.read(page.databytecounts[index])
                decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
            except Exception as error:  # damaged files raise anything
                raise BadImageError(f"image file {self._path} is damaged: {error}") from error
            if decoded is None:  # a tile that the file leaves out is black
                decoded = np.zeros((1, self._height, self._width, 3), dtype=np.uint8)
            self._decoded[index] = decoded[0]
        return self._decoded[index]


def open_tiff_windows(path: str, format: str) -> TiffWindows | None:
    """Return the windows of an image file, or None if it has to be decoded as a whole.

    Windows need a TIFF file with upright 8-bit RGB pixels, and tifffile (the extra `tiff`).

    Args:
        path: Of the file.
        format: The order of channels to return, `BGR` or `RGB`; for others, None is returned.
    """
    if not path.lower().endswith(_TIFF_SUFFIXES) or format not in ("BGR", "RGB"):
        return None
    if not Path(path).is_file() or importlib.util.find_spec("tifffile") is None:
        return None
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages.first
            orientation = page.tags.get(_ORIENTATION)
            is_upright = orientation is None or int(orientation.value) == 1
            is_rgb = page.dtype == np.uint8 and page.samplesperpixel == 3
            is_rgb &= page.planarconfig == _CHUNKY and page.photometric.name in ("RGB", "YCBCR")
            return TiffWindows(path, page, format == "BGR") if is_rgb and is_upright else None
    except Exception:  # `read_image` says what is wrong
        return None
