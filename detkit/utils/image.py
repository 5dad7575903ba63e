"""Reading of image files as upright arrays in a given channel order.

Legend: H and W height and width of the upright image, C channels.
"""

import contextlib
import logging
import sys
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from detkit.utils.errors import ConfigError
from detkit.utils.image_file import (
    JPEG_MARK,
    MAX_IMAGE_PIXELS,
    BadImageError,
    jpeg_segments,
    jpeg_size,
    opened_image,
    read_image_bytes,
    require_pixels,
)
from detkit.utils.text import did_you_mean

with contextlib.suppress(ImportError):
    import torchvision.io  # noqa: F401 - registers torch.ops.image

logger = logging.getLogger(__name__)

# "BGR" is the order of Caffe2's models; the others are PIL modes of 8 bits per channel.
IMAGE_FORMATS = ("BGR", "RGB", "L", "RGBA", "CMYK", "YCbCr", "HSV")

# torchvision's decoder as an operator: since 0.29, its Python function spends 0.04 ms on a
# deprecation warning. Once torchvision has removed its decoders, this is None, and PIL decodes.
_decode_jpeg_operator = getattr(torch.ops.image, "decode_jpeg", None)
_UNCHANGED = 0  # torchvision.io.ImageReadMode.UNCHANGED: keep the number of channels

_JPEG_APP1 = 0xE1
_EXIF_ORIENTATION = 0x0112


class SizeMismatchError(BadImageError):
    """An image whose size differs from that of its record."""


def read_image(
    file_name: str, format: str = "BGR", *, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Read an image file as an array, turned upright by the orientation in its metadata.

    Palettes and CMYK are converted, transparency is dropped, 16-bit grey keeps its upper 8 bits,
    and the first frame of an animation is read.

    Args:
        file_name: Path or address that `PathManager` opens.
        format: One of `IMAGE_FORMATS`.
        max_pixels: Largest number of pixels: INPUT.MAX_IMAGE_PIXELS.

    Returns:
        (H, W, C) uint8; C is 1 for "L". As in Detectron2, it may be a view with negative strides,
        which `np.ascontiguousarray` copies.

    Raises:
        MissingFileError: The file does not exist.
        BadImageError: The file is empty, truncated, not an image, or has more pixels.
        ConfigError: The format is unknown.
    """
    if format not in IMAGE_FORMATS:
        raise ConfigError(
            f"image format (INPUT.FORMAT) must be one of {', '.join(IMAGE_FORMATS)}, got"
            f" {format!r}.{did_you_mean(str(format), IMAGE_FORMATS)}"
        )
    data = read_image_bytes(file_name)
    size = jpeg_size(data) if data.startswith(JPEG_MARK) else None
    if size is not None:
        require_pixels(data, size, file_name, max_pixels)
    pixels = _decode_jpeg(data, format) if size is not None else None
    if pixels is None:
        with opened_image(data, file_name, max_pixels) as image:
            pixels = upright_pixels(image, "RGB" if format == "BGR" else format)
        if format == "L":
            pixels = pixels[:, :, None]
        return pixels[:, :, ::-1] if format == "BGR" else pixels
    # PIL takes 0.1 ms to find the orientation, which is in one of these segments (EXIF or XMP).
    if all(marker != _JPEG_APP1 for marker, _ in jpeg_segments(data)):
        return pixels
    with opened_image(data, file_name, max_pixels) as image:
        return _turned(pixels, _orientation(image))


def read_label_map(file_name: str, *, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """Read a png of labels as an upright (H, W) array of integers; of a palette, the indices.

    Raises:
        MissingFileError: The file does not exist.
        BadImageError: The file is empty, truncated, not an image, has several channels, or has more
            than `max_pixels`.
    """
    data = read_image_bytes(file_name)
    with opened_image(data, file_name, max_pixels) as image:
        labels = upright_pixels(image)
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        raise BadImageError(
            f"label map {file_name} must hold one integer per pixel; it has mode {image.mode},"
            f" shape {labels.shape}"
        )
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def read_image_size(file_name: str) -> tuple[int, int]:
    """Read `(height, width)` of the upright image from the header of a file.

    Raises:
        MissingFileError: The file does not exist.
        BadImageError: The file is empty or not an image.
    """
    data = read_image_bytes(file_name)
    # Without a limit of pixels, as nothing is decoded.
    with opened_image(data, file_name, sys.maxsize, header_only=True) as image:
        # As stored: depending on its version and on the tag, PIL's size of a TIFF is the upright
        # one.
        is_tiff = isinstance(image, TiffImageFile)
        width, height = (image.tag_v2[256], image.tag_v2[257]) if is_tiff else image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def upright_pixels(image: Image.Image, mode: str | None = None) -> np.ndarray:
    """Return a copy of the pixels of an opened image, turned upright.

    Args:
        image: As opened.
        mode: The PIL mode of 8 bits per channel to convert to; None returns the values as stored.
    """
    # Before the orientation is asked for: PIL turns a TIFF upright as it loads it, and then takes
    # the orientation out of the metadata.
    image.load()
    # Without `convert` where there is nothing to convert: it would copy.
    is_ready = mode is None or image.mode == mode
    pixels = np.array(image if is_ready else _to_eight_bits(image).convert(mode))
    return _turned(pixels, _orientation(image))


def convert_image_to_rgb(image: np.ndarray | torch.Tensor, format: str) -> np.ndarray:
    """Convert an (H, W, C) image in `format` to (H, W, 3) uint8 RGB."""
    pixels = np.asarray(image)
    if format == "RGB":
        return pixels.astype(np.uint8, copy=False)
    if format == "BGR":
        return pixels[:, :, ::-1].astype(np.uint8, copy=False)
    pixels = np.ascontiguousarray(pixels[:, :, 0] if format == "L" else pixels, dtype=np.uint8)
    size = pixels.shape[1], pixels.shape[0]
    return np.array(Image.frombytes(format, size, pixels.tobytes()).convert("RGB"))


def _decode_jpeg(data: bytes, format: str) -> np.ndarray | None:
    """Decode a JPEG file with torchvision, or return None if PIL must decode it."""
    # Both call libjpeg-turbo with the same settings and return the same pixels, which a test
    # compares. torchvision takes 1.0 ms for 640x480, PIL 1.6, as it copies the pixels twice. PIL
    # decodes CMYK, as it knows Adobe's inverted inks, and grey output, which it converts from RGB.
    if _decode_jpeg_operator is None or format not in ("RGB", "BGR"):
        return None
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        decoded: torch.Tensor = _decode_jpeg_operator(encoded, _UNCHANGED, False)
    except RuntimeError as error:
        # The file is damaged, or torchvision is built without libjpeg.
        logger.debug("torchvision did not decode a JPEG file, PIL tries: %s", error)
        return None
    if len(decoded) != 3:
        return None
    rgb = decoded.permute(1, 2, 0).numpy()  # a view: the pixels lie in memory as (H, W, C)
    return rgb[:, :, ::-1] if format == "BGR" else rgb


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Convert an image of a mode that PIL's `convert` clips or warns about."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= 2**16:
            raise ValueError(
                f"its values range from {low} to {high}, which neither 8 nor 16 bits can hold"
            )
        # The upper byte, as PIL does for 16-bit colour; `convert` would clip all values above 255.
        return Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError(
            "it has floating point values of unknown range: convert it to 8 or 16 bits"
        )
    if image.mode in ("P", "PA") and "transparency" in image.info:
        # Converted directly to RGB, PIL would warn that the transparent entry is lost.
        return image.convert("RGBA")
    return image


def _orientation(image: Image.Image) -> int:
    """Return how to turn the image upright: 1 (not at all) to 8, of its EXIF data, else of XMP.

    For sizes and pixels of every format.
    """
    try:
        # Not `image.getexif`, which decodes a PNG file.
        value: Any = Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF blocks raise anything, and are ignored
        return 1
    return int(value) if value in range(1, 9) else 1


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate (H, W) or (H, W, C) pixels upright: CIPA DC-008 (Exif 2.3), tag 0x0112."""
    if orientation == 1:
        return pixels
    if orientation >= 5:  # a transposition, then the flips below
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
