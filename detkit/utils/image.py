"""Image files as arrays: upright, in a given channel order, or a clear error.

Legend: H and W height and width of the upright image, C channels.
"""

import contextlib
import logging
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image

from detkit.utils.errors import ConfigError, MissingFileError
from detkit.utils.file_io import PathManager
from detkit.utils.image_file import (
    MAX_IMAGE_PIXELS,
    BadImageError,
    jpeg_size,
    opened_image,
    require_pixels,
)
from detkit.utils.near_miss import did_you_mean

with contextlib.suppress(ImportError):
    import torchvision.io  # noqa: F401 - registers torch.ops.image

logger = logging.getLogger(__name__)

# "BGR" is the order of the Caffe2 models; the others are PIL modes of 8 bits per channel.
IMAGE_FORMATS = ("BGR", "RGB", "L", "RGBA", "CMYK", "YCbCr", "HSV")

# torchvision's decoder as an operator: from 0.29 on its Python function spends 0.04 ms on a warning
# that the decoders will be removed. Once they are, this is None, and PIL decodes.
_decode_jpeg_operator = getattr(torch.ops.image, "decode_jpeg", None)
_UNCHANGED = 0  # torchvision.io.ImageReadMode.UNCHANGED: grey stays grey, CMYK stays CMYK

_JPEG_MARK = b"\xff\xd8\xff"
_EXIF_MARK = b"Exif\x00\x00"
_EXIF_ORIENTATION = 0x0112


class SizeMismatchError(BadImageError):
    """An image whose size differs from that of its record."""


def read_image(
    file_name: str, format: str = "BGR", *, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Read an image file as an array, upright by its EXIF orientation.

    Palettes are looked up, transparency is dropped, CMYK is converted, and 16-bit grey keeps its
    upper 8 bits. Of an animation, the first frame is read.

    Args:
        file_name: Path or anything else that `PathManager` opens.
        format: One of `IMAGE_FORMATS`.
        max_pixels: Most pixels that it may have: INPUT.MAX_IMAGE_PIXELS.

    Returns:
        (H, W, C) uint8; C is 1 for "L". It may be a view with negative strides, as in Detectron2:
        `np.ascontiguousarray` makes a plain copy where one is needed.

    Raises:
        MissingFileError: There is no such file.
        BadImageError: The file is empty, truncated, no image, or claims more pixels.
        ConfigError: The format is unknown.
    """
    if format not in IMAGE_FORMATS:
        raise ConfigError(
            f"image format (INPUT.FORMAT) must be one of {', '.join(IMAGE_FORMATS)}, got"
            f" {format!r}.{did_you_mean(str(format), IMAGE_FORMATS)}"
        )
    data = _read_bytes(file_name)
    size = jpeg_size(data) if data.startswith(_JPEG_MARK) else None
    if size is not None:
        require_pixels(size, file_name, max_pixels)
    pixels = _decode_jpeg(data, format) if size is not None else None
    if pixels is not None and not _jpeg_has_exif(data):
        return pixels
    with opened_image(data, file_name, max_pixels) as image:
        orientation = _orientation(image)
        if pixels is None:
            pixels = _decode_with_pil(image, format)
    return _upright(pixels, orientation)


def read_label_map(file_name: str, *, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Read a png of labels as an (H, W) array of integers: of a palette, the numbers, not colours.

    Raises:
        MissingFileError: There is no such file.
        BadImageError: The file is empty, truncated, no image, has several channels, or claims more
            than `max_pixels`.
    """
    data = _read_bytes(file_name)
    with opened_image(data, file_name, max_pixels) as image:
        image.load()
        labels = np.array(image)
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        raise BadImageError(
            f"label map {file_name} must hold one integer per pixel; it is an image of mode"
            f" {image.mode}, shape {labels.shape}"
        )
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_image_size(file_name: str) -> tuple[int, int]:
    """Read `(height, width)` of an image file, as `read_image` returns it, from the header alone.

    Raises:
        MissingFileError: There is no such file.
        BadImageError: The file is empty or no image.
    """
    # No limit of pixels: nothing is decoded.
    with opened_image(_read_bytes(file_name), file_name, sys.maxsize) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """Convert an (H, W, C) image that is in `format` to (H, W, 3) uint8 RGB, for display."""
    pixels = np.asarray(image)
    if format == "RGB":
        return pixels.astype(np.uint8, copy=False)
    if format == "BGR":
        return pixels[:, :, ::-1].astype(np.uint8, copy=False)
    pixels = np.ascontiguousarray(pixels[:, :, 0] if format == "L" else pixels, dtype=np.uint8)
    return np.array(
        Image.frombytes(format, (pixels.shape[1], pixels.shape[0]), pixels.tobytes()).convert("RGB")
    )


def _read_bytes(file_name: str) -> bytes:
    try:
        with PathManager.open(file_name, "rb") as file:
            data = file.read()
    except FileNotFoundError as error:
        raise MissingFileError(f"image file {file_name} does not exist") from error
    assert isinstance(data, bytes)
    return data


def _decode_jpeg(data: bytes, format: str) -> np.ndarray | None:
    """Decode with torchvision, not yet upright, or return None where PIL has to decode."""
    # Both call libjpeg-turbo with the same settings and return the same pixels, which a test
    # compares. torchvision takes 1.0 ms for 640x480, PIL 1.6, since it copies the pixels twice.
    # CMYK is left to PIL, which knows Adobe's inverted inks, and grey output, which PIL weighs
    # after decoding.
    if _decode_jpeg_operator is None or format not in ("RGB", "BGR"):
        return None
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        decoded: torch.Tensor = _decode_jpeg_operator(encoded, _UNCHANGED, False)
    except RuntimeError as error:
        # A torchvision built without libjpeg, or a damaged file: PIL decides which.
        logger.debug("torchvision did not decode a JPEG file, PIL tries: %s", error)
        return None
    if len(decoded) != 3:
        return None
    rgb = decoded.permute(1, 2, 0).numpy()  # a view: the pixels lie in memory as (H, W, C)
    return rgb[:, :, ::-1] if format == "BGR" else rgb


def _jpeg_has_exif(data: bytes) -> bool:
    """Return whether a JPEG file has an EXIF block.

    Source: ITU-T T.81, annex B: segments of a marker and a length follow each other up to the start
        of scan (0xDA).
    """
    # Asked before PIL, which takes 0.1 ms to find out.
    position = 2
    while position + 10 <= len(data):
        marker = data[position + 1]
        if marker == 0xDA:
            return False
        if marker == 0xE1 and data.startswith(_EXIF_MARK, position + 4):
            return True
        # Any number of 0xFF bytes may stand before a marker.
        position += (
            1 if marker == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        )
    return False


def _decode_with_pil(image: Image.Image, format: str) -> np.ndarray:
    converted = _to_eight_bits(image).convert("RGB" if format == "BGR" else format)
    pixels = np.array(converted)
    if format == "L":
        return pixels[:, :, None]
    return pixels[:, :, ::-1] if format == "BGR" else pixels


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert modes that PIL's `convert` would clip, or warn about, to one that it keeps."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise ValueError(
                f"its values run from {low} to {high}; grey images of 8 and of 16 bits can be read"
            )
        # The upper byte, as PIL does for 16-bit colour; `convert` would make everything above 255
        # white.
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError(
            "it holds floating point values, whose range is not known; convert it to 8 or 16 bits"
        )
    if image.mode in ("P", "PA") and "transparency" in image.info:
        return image.convert(
            "RGBA"
        )  # straight to RGB, PIL warns that the transparent entry is lost
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) to 8."""
    try:
        value: Any = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # EXIF blocks break in many ways; a broken one has no orientation
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the orientation of stored (H, W, C) pixels: CIPA DC-008 (Exif 2.3), tag 0x0112."""
    if orientation == 1:
        return pixels
    if orientation >= 5:  # rows and columns are exchanged; what remains are the mirrorings
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
