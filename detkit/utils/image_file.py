"""Opening of image files with limits on their formats and their number of pixels.

A file of a kilobyte may have a header with 60,000 x 60,000 pixels, which decode to 10 GB.
"""

import contextlib
import functools
import io
import struct
import sys
import threading
from collections.abc import Iterator

from PIL import Image

from detkit.utils.errors import DataError
from detkit.utils.file_io import read_file

MAX_IMAGE_PIXELS = 178_956_970
"""Pillow's own limit: half a gigabyte as RGB, and three times as much while it is decoded."""
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".npy")
"""Endings, in small letters, of the files in a folder that count as images."""
MAX_SCANS = 32
"""Scans that a JPEG of the largest number of pixels may have; a smaller one may have more."""

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
_JPEG_SCAN_MARK = bytes((0xFF, _JPEG_START_OF_SCAN))
JPEG_MARK = b"\xff\xd8\xff"
TIFF_MARKS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_MARK = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"IHDR", b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
_pillow = threading.RLock()


class BadImageError(DataError):
    """An image file that cannot be used."""


def read_image_bytes(file_name: str, kind: str = "image file") -> bytes:
    """Return the content of a file; see `read_file`.

    Raises:
        MissingFileError: The file does not exist.
        BadImageError: It is a folder, a pipe or a device.
    """
    return read_file(file_name, kind, BadImageError)


@contextlib.contextmanager
def opened_image(
    data: bytes,
    file_name: str,
    max_pixels: int = MAX_IMAGE_PIXELS,
    *,
    header_only: bool = False,
) -> Iterator[Image.Image]:
    """Open an image with PIL, which reads its header.

    Args:
        data: The bytes of the file.
        file_name: For messages.
        max_pixels: Largest number of pixels.
        header_only: Whether size and metadata are wanted alone.

    Raises:
        BadImageError: The file is empty, damaged, of an unknown format, or has more pixels; or PIL
            raises an error inside the block.
    """
    try:
        with _open(_png_metadata(data) if header_only else data) as image:
            require_pixels(data, image.size, file_name, max_pixels)
            # A TIFF is held against Pillow's limit again when it is decoded. Off for a large one
            # alone: other threads wait meanwhile.
            with _pillow:
                is_large = image.width * image.height > (Image.MAX_IMAGE_PIXELS or sys.maxsize)
            with _without_pillows_limit() if is_large else contextlib.nullcontext():
                yield image
    except BadImageError:
        raise
    except PIL_ERRORS as error:
        if not data:
            problem = f"image file {file_name} is empty (0 bytes)"
        elif isinstance(error, Image.UnidentifiedImageError):
            start = f"its {len(data)} bytes start {data[:12]!r}"
            problem = f"{file_name} is not an image that can be read: {start}"
            if data.startswith(TIFF_MARKS):
                problem += (
                    ". TIFF of any channels is read with INPUT.FORMAT RAW, and"
                    " pip install 'detkit-vision[tiff]'"
                )
        else:
            problem = f"image file {file_name} is damaged or truncated ({len(data)} bytes): {error}"
        raise BadImageError(problem) from error


def require_pixels(data: bytes, size: tuple[int, int], file_name: str, max_pixels: int) -> None:
    """Raise a BadImageError if an image of `(width, height)` is too large to decode.

    Args:
        data: The bytes of the file, whose scans are counted if it is a JPEG.
        size: What its header says.
        file_name: For messages.
        max_pixels: Largest number of pixels, and a thirty-second of the largest number of pixels
            in all scans.
    """
    width, height = size
    if width * height > max_pixels:
        raise BadImageError(
            f"image file {file_name} claims to be {width}x{height} (width x height), more than"
            f" the {max_pixels} pixels that INPUT.MAX_IMAGE_PIXELS allows"
        )
    # An empty scan is ten bytes long, and makes libjpeg go over all pixels once more. Programs
    # write about ten scans. The mark cannot occur within one; counting takes 0.2 ms for a file of
    # 640x480, most of which are too small to need it.
    limit = MAX_SCANS * max_pixels // max(width * height, 1)
    if not data.startswith(JPEG_MARK) or len(data) <= 10 * limit:
        return
    scans = data.count(_JPEG_SCAN_MARK)
    if scans > limit:
        raise BadImageError(
            f"image file {file_name} has {scans} scans of {width}x{height} pixels (width x"
            f" height), more than {MAX_SCANS} times the {max_pixels} pixels that"
            " INPUT.MAX_IMAGE_PIXELS allows: save it as a baseline JPEG"
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


def _png_metadata(data: bytes) -> bytes:
    """Return a PNG file without its pixels, and other files as they are."""
    # EXIF data and texts may follow the pixels, and PIL decodes all of them to get there.
    if not data.startswith(PNG_MARK):
        return data
    kept = [PNG_MARK]
    position = len(PNG_MARK)
    while position + 8 <= len(data):
        end = position + 12 + int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] in _PNG_METADATA:
            kept.append(data[position:end])
        position = end
    return b"".join([*kept, _PNG_END])


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(data: bytes) -> Image.Image:
    with _without_pillows_limit():
        return Image.open(io.BytesIO(data), formats=_known_formats())


@contextlib.contextmanager
def _without_pillows_limit() -> Iterator[None]:
    # A global variable, which a config cannot raise: it is replaced by `require_pixels`.
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
