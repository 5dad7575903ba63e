"""Image files before decoding: which formats are opened, and how many pixels they may claim.

A file of a kilobyte may claim to be 60,000 pixels wide and high; decoding it would take 10 GB.
"""

import contextlib
import functools
import io
import struct
import threading
from collections.abc import Iterator

from PIL import Image

from detkit.utils.errors import DataError

MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own limit: half a gigabyte as RGB."""

# Formats of photographs and label maps. Others of Pillow's start programs: EPS runs Ghostscript.
# fmt: off
_FORMATS = (
    "JPEG", "PNG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA",
    "PCX", "SGI",
)
# fmt: on
# What PIL raises on damaged files; which one depends on the format and on the place of the damage.
# fmt: off
PIL_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, AttributeError,
    struct.error, OverflowError, ZeroDivisionError, MemoryError, RuntimeError,
    Image.DecompressionBombError,
)
# fmt: on
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_START_OF_SCAN = 0xDA
_pillow = threading.Lock()


class BadImageError(DataError):
    """An image file that cannot be used; the message names it."""


@contextlib.contextmanager
def opened_image(
    data: bytes, file_name: str, max_pixels: int = MAX_IMAGE_PIXELS
) -> Iterator[Image.Image]:
    """Open an image with PIL, which reads its header.

    Args:
        data: The bytes of the file.
        file_name: For messages.
        max_pixels: Most pixels that it may have.

    Raises:
        BadImageError: The file is empty, damaged, larger, or of no known format. Errors of PIL
            inside the block become one as well.
    """
    try:
        with _open(data) as image:
            require_pixels(image.size, file_name, max_pixels)
            yield image
    except BadImageError:
        raise
    except PIL_ERRORS as error:
        raise _unreadable(file_name, data, error) from error


def require_pixels(size: tuple[int, int], file_name: str, max_pixels: int) -> None:
    """Raise a BadImageError if `(width, height)` is more than `max_pixels`."""
    if size[0] * size[1] > max_pixels:
        raise BadImageError(
            f"image file {file_name} claims to be {size[0]}x{size[1]} (width x height), more than"
            f" the {max_pixels} pixels that INPUT.MAX_IMAGE_PIXELS allows"
        )


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return `(width, height)` from the header of a JPEG file, or None if it is irregular.

    Source: ITU-T T.81, annex B: segments of a marker and a length follow each other up to the start
        of scan (0xDA).
    """
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
        if marker == _JPEG_START_OF_SCAN:
            return None
        # Any number of 0xFF bytes may stand before a marker.
        position += (
            1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        )
    return None


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    # Pillow's own limit is a global that no config could raise; ours is checked by the caller.
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_known_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _unreadable(file_name: str, data: bytes, error: Exception) -> BadImageError:
    if len(data) == 0:
        return BadImageError(f"image file {file_name} is empty (0 bytes)")
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImageError(
            f"{file_name} is not an image that can be read: its {len(data)} bytes start"
            f" {data[:12]!r}"
        )
    return BadImageError(
        f"image file {file_name} is damaged or truncated ({len(data)} bytes): {error}"
    )
