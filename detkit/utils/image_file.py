"""Opening of image files with limits on their formats and their number of pixels.

A file of a kilobyte may have a header with 60,000 x 60,000 pixels, which decode to 10 GB.
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

# fmt: off
# Formats of photographs and label maps. Others may start programs: EPS runs Ghostscript.
_FORMATS = (
    "JPEG", "PNG", "MPO", "BMP", "DIB", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM", "TGA",
    "PCX", "SGI",
)
# Raised by PIL for damaged files, depending on the format and on the place of the damage.
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
    """An image file that cannot be used."""


@contextlib.contextmanager
def opened_image(
    data: bytes, file_name: str, max_pixels: int = MAX_IMAGE_PIXELS
) -> Iterator[Image.Image]:
    """Open an image with PIL, which reads its header.

    Args:
        data: The bytes of the file.
        file_name: For messages.
        max_pixels: Largest number of pixels.

    Raises:
        BadImageError: The file is empty, damaged, of an unknown format, or has more pixels; or PIL
            raises an error inside the block.
    """
    try:
        with _open(data) as image:
            require_pixels(image.size, file_name, max_pixels)
            yield image
    except BadImageError:
        raise
    except PIL_ERRORS as error:
        if not data:
            problem = f"image file {file_name} is empty (0 bytes)"
        elif isinstance(error, Image.UnidentifiedImageError):
            start = f"its {len(data)} bytes start {data[:12]!r}"
            problem = f"{file_name} is not an image that can be read: {start}"
        else:
            problem = f"image file {file_name} is damaged or truncated ({len(data)} bytes): {error}"
        raise BadImageError(problem) from error


def require_pixels(size: tuple[int, int], file_name: str, max_pixels: int) -> None:
    """Raise a BadImageError if `(width, height)` is more than `max_pixels`."""
    if size[0] * size[1] > max_pixels:
        raise BadImageError(
            f"image file {file_name} claims to be {size[0]}x{size[1]} (width x height), more than"
            f" the {max_pixels} pixels that INPUT.MAX_IMAGE_PIXELS allows"
        )


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return `(width, height)` from the header of a JPEG file, or None if it is irregular."""
    for marker, position in jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, position + 5)
            return width, height
    return None


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield marker and position of each segment of a JPEG file before the start of scan.

    Source: ITU-T T.81, annex B: a segment is 0xFF, a marker, a length of two bytes, and content.
    """
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _JPEG_START_OF_SCAN:
            return
        if marker == 0xFF:  # any number of these may precede a marker
            position += 1
            continue
        yield marker, position
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    # Pillow's own limit is a global variable, which a config cannot raise: it is replaced by
    # `require_pixels`.
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data), formats=_known_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = limit
