"""Reading of image files as upright arrays in a given channel order.

Legend: H and W height and width of the upright image, C channels.
"""

import contextlib
import importlib.util
import io
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from detkit.utils.errors import ConfigError
from detkit.utils.image_file import (
    JPEG_MARK,
    MAX_IMAGE_PIXELS,
    PIL_ERRORS,
    PNG_MARK,
    TIFF_MARKS,
    BadImageError,
    jpeg_segments,
    jpeg_size,
    opened_image,
    read_image_bytes,
    require_pixels,
)
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)

# "BGR" is the order of Caffe2's models, "RAW" what the file holds; the others are PIL modes of 8
# bits per channel.
IMAGE_FORMATS = ("BGR", "RGB", "L", "RGBA", "CMYK", "YCbCr", "HSV", "RAW")

_UNCHANGED = 0  # torchvision.io.ImageReadMode.UNCHANGED: keep the number of channels

_NPY_MARK = b"\x93NUMPY"
_PNG_DEPTH = 24  # position of the bits per channel

_JPEG_APP1 = 0xE1
_EXIF_ORIENTATION = 0x0112


class SizeMismatchError(BadImageError):
    """An image whose size differs from that of its record."""


def read_image(
    file_name: str, format: str = "BGR", *, max_pixels: int = MAX_IMAGE_PIXELS
) -> np.ndarray:
    """Read an image file as an array, turned upright by the orientation in its metadata.

    With the format RAW, values and channels are those of the file: 8 or 16 bits, or floating point;
    of PNG, TIFF (with tifffile, if that is installed, which reads any number of channels) and NPY,
    an array (H, W) or (H, W, C). Otherwise palettes and CMYK are converted, transparency is
    dropped, and 16-bit grey keeps its upper 8 bits. Of an animation, the first frame is read.

    Args:
        file_name: Path or address that `PathManager` opens.
        format: One of `IMAGE_FORMATS`.
        max_pixels: Largest number of pixels: INPUT.MAX_IMAGE_PIXELS.

    Returns:
        (H, W, C) uint8; C is 1 for "L". With RAW, float32 unless the file has 8 bits. As in
        Detectron2, it may be a view with negative strides, which `np.ascontiguousarray` copies.

    Raises:
        MissingFileError: The file does not exist.
        BadImageError: The file is empty, truncated, not an image, or has more pixels.
        ConfigError: The format is unknown.
    """
    _check_format(format)
    return decode_image(read_image_bytes(file_name), file_name, format, max_pixels=max_pixels)


def _check_format(format: str) -> None:
    if format not in IMAGE_FORMATS:
        raise ConfigError(
            f"image format (INPUT.FORMAT) must be one of {', '.join(IMAGE_FORMATS)}, got"
            f" {format!r}.{did_you_mean(str(format), IMAGE_FORMATS)}"
        )


def decode_image(
    data: bytes,
    file_name: str = "bytes",
    format: str = "BGR",
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> np.ndarray:
    """Decode the content of an image file; see `read_image`.

    Args:
        data: The bytes of the file.
        file_name: For messages.
        format: One of `IMAGE_FORMATS`.
        max_pixels: Largest number of pixels.
    """
    _check_format(format)
    if format == "RAW":
        return _stored_values(data, file_name, max_pixels)
    if data.startswith(_NPY_MARK):
        raise BadImageError(f"{file_name} is an array: set INPUT.FORMAT RAW to read it")
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
        return _turned(pixels, orientation_of(image))


def read_reduced_image(
    file_name: str,
    format: str,
    size_needed: Callable[[int, int], tuple[int, int]],
    *,
    max_pixels: int = MAX_IMAGE_PIXELS,
) -> tuple[np.ndarray, tuple[int, int]]:
    """Read an image; a JPEG as RGB or BGR at 1/2, 1/4 or 1/8 of its sides where that is enough.

    libjpeg then decodes fewer frequencies, which takes half the time or less.

    Args:
        file_name: Path or address.
        format: See `read_image`.
        size_needed: Takes height and width, and returns those that the result must at least have.
        max_pixels: Largest number of pixels of the whole image.

    Returns:
        The image as `read_image` returns it, and `(height, width)` of the whole one.
    """
    _check_format(format)
    data = read_image_bytes(file_name)
    if data.startswith(JPEG_MARK) and format in ("RGB", "BGR"):
        with opened_image(data, file_name, max_pixels) as image:
            whole_w, whole_h = image.size
            is_turned = orientation_of(image) >= 5
            height, width = (whole_w, whole_h) if is_turned else (whole_h, whole_w)
            least_h, least_w = size_needed(height, width)
            for part in (8, 4, 2):
                # Multiples alone: of others, the last row or column covers more than the image.
                fits = height // part >= least_h and width // part >= least_w
                if not fits or height % part or width % part:
                    continue
                image.draft(None, (whole_w // part, whole_h // part))
                rgb = upright_pixels(image, "RGB")
                return rgb[:, :, ::-1] if format == "BGR" else rgb, (height, width)
    pixels = decode_image(data, file_name, format, max_pixels=max_pixels)
    return pixels, (pixels.shape[0], pixels.shape[1])


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
    if data.startswith(_NPY_MARK):
        height, width = _npy(data, file_name).shape[:2]
        return height, width
    try:
        # Without a limit of pixels, as nothing is decoded.
        with opened_image(data, file_name, sys.maxsize, header_only=True) as image:
            # As stored: depending on its version and on the tag, PIL's size of a TIFF is the
            # upright one.
            is_tiff = isinstance(image, TiffImageFile)
            width, height = (image.tag_v2[256], image.tag_v2[257]) if is_tiff else image.size
            orientation = orientation_of(image)
    except BadImageError:
        if not _is_for_tifffile(data):
            raise
        # PIL knows few of the TIFF files with other channels than RGB.
        with _tiff_page(data, file_name) as page:
            height, width, orientation = page.imagelength, page.imagewidth, _tiff_orientation(page)
    return (width, height) if orientation >= 5 else (height, width)


def _stored_values(data: bytes, file_name: str, max_pixels: int) -> np.ndarray:
    """Return the upright values of an image file, (H, W, C): uint8, or float32 for all others."""
    if data.startswith(_NPY_MARK):
        pixels = _npy(data, file_name)
        require_pixels(data, (pixels.shape[1], pixels.shape[0]), file_name, max_pixels)
    elif _is_for_tifffile(data):
        pixels = _tiff(data, file_name, max_pixels)
    else:
        with opened_image(data, file_name, max_pixels) as image:
            pixels = _pixels_as_stored(image, data)
    if pixels.dtype != np.uint8:
        # What every kernel takes; 16 bits are exact.
        pixels = pixels.astype(np.float32)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _is_for_tifffile(data: bytes) -> bool:
    return data.startswith(TIFF_MARKS) and importlib.util.find_spec("tifffile") is not None


def _tiff(data: bytes, file_name: str, max_pixels: int) -> np.ndarray:
    """Return the values of the first page; channels may lie in planes."""
    with _tiff_page(data, file_name) as page:
        require_pixels(data, (page.imagewidth, page.imagelength), file_name, max_pixels)
        pixels, orientation = page.asarray(), _tiff_orientation(page)
    if page.planarconfig == 2 and pixels.ndim == 3:
        pixels = np.moveaxis(pixels, 0, 2)
    return _turned(np.ascontiguousarray(pixels), orientation)


@contextlib.contextmanager
def _tiff_page(data: bytes, file_name: str) -> Iterator[Any]:
    import tifffile

    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            yield file.pages.first
    except (tifffile.TiffFileError, *PIL_ERRORS) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError(f"image file {file_name} is damaged: {error}") from error


def _tiff_orientation(page: Any) -> int:
    tag = page.tags.get(_EXIF_ORIENTATION)
    return 1 if tag is None else int(tag.value)


def _npy(data: bytes, file_name: str) -> np.ndarray:
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise BadImageError(f"array file {file_name} cannot be read: {error}") from error
    if values.ndim not in (2, 3) or values.size == 0 or values.dtype.kind not in "uif":
        raise BadImageError(
            f"array file {file_name} must hold numbers (H, W) or (H, W, C), has {values.dtype} of"
            f" shape {values.shape}"
        )
    return values


def _pixels_as_stored(image: Image.Image, data: bytes) -> np.ndarray:
    # PIL reads colour of 16 bits as 8.
    if data.startswith(PNG_MARK) and data[_PNG_DEPTH] == 16 and len(image.getbands()) > 1:
        decode = _operator("decode_png")
        if decode is None:
            raise ValueError("colour of 16 bits needs torchvision with libpng")
        pixels = decode(_bytes_tensor(data), _UNCHANGED, False).permute(1, 2, 0).numpy()
        return _turned(pixels, orientation_of(image))
    if image.mode in ("P", "PA", "1"):
        return upright_pixels(image, "L" if image.mode == "1" else "RGB")
    return upright_pixels(image)


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
    return _turned(pixels, orientation_of(image))


# Luma and colour differences of RGB in [0, 1]. Source: ITU-R BT.601.
RGB_TO_YUV = np.array(
    [[0.299, 0.587, 0.114], [-0.14713, -0.28886, 0.436], [0.615, -0.51499, -0.10001]]
)


def convert_image_to_rgb(image: npt.ArrayLike, format: str) -> np.ndarray:
    """Convert an (H, W, C) image in `format` to (H, W, 3) uint8 RGB.

    RAW shows the first three channels, or the first one of fewer; values other than bytes are
    stretched from black to white. "YUV-BT.601" is a format of `detection_utils.read_image`.
    """
    pixels = np.asarray(image)
    if format == "YUV-BT.601":
        rgb = 255 * pixels @ np.linalg.inv(RGB_TO_YUV).T
        return rgb.round().clip(0, 255).astype(np.uint8)
    if format == "RAW":
        pixels = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, [0, 0, 0]]
        if pixels.dtype == np.uint8:
            return np.ascontiguousarray(pixels)
        low, high = np.nanmin(pixels), np.nanmax(pixels)
        scaled = (np.nan_to_num(pixels) - low) * (255 / max(high - low, 1e-12))
        return scaled.clip(0, 255).astype(np.uint8)
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
    decode = _operator("decode_jpeg")
    if decode is None or format not in ("RGB", "BGR"):
        return None
    try:
        decoded = decode(_bytes_tensor(data), _UNCHANGED, False)
    except RuntimeError as error:
        # The file is damaged, or torchvision is built without libjpeg.
        logger.debug("torchvision did not decode a JPEG file, PIL tries: %s", error)
        return None
    if len(decoded) != 3:
        return None
    rgb = decoded.permute(1, 2, 0).numpy()  # a view: the pixels lie in memory as (H, W, C)
    return rgb[:, :, ::-1] if format == "BGR" else rgb


def _operator(name: str) -> Any:
    """Return a decoder of torchvision, or None where it has none, or torch is not loaded.

    torch is not loaded for it: an exported model runs without, and PIL decodes.
    """
    if sys.modules.get("torch") is None:
        return None
    import torch

    with contextlib.suppress(ImportError):
        import torchvision.io  # noqa: F401 - registers torch.ops.image
    # The operator: since 0.29, torchvision's Python function spends 0.04 ms on a deprecation
    # warning. Once torchvision has removed its decoders, there is none.
    return getattr(torch.ops.image, name, None)


def _bytes_tensor(data: bytes) -> Any:
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


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


def orientation_of(image: Image.Image) -> int:
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
