"""A picture to draw into: boxes, lines, polygons, circles, masks and text, with smooth edges.

Points are (x, y) in pixels of the picture; the pixel in column c spans [c, c + 1). Colours are RGB,
0 to 255.

Legend: H and W height and width of the picture, P points.
"""

import contextlib
import functools
import logging
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from detkit.utils.logger import log_first_n
from detkit.utils.text import printable

Color = tuple[int, int, int]
Points = npt.ArrayLike
Rectangle = tuple[int, int, int, int]

# Pillow draws without anti-aliasing. Everything slanted or round is therefore drawn as coverage,
# this many times finer, within its own bounds only, and blended in from there.
_FINE = 4

# The font that comes with Pillow has ASCII letters only. Other names are written with the first of
# these that the system (Windows, macOS, Linux) and the name's letters have.
_WIDE_FONTS = (
    "DejaVuSans.ttf",
    "arial.ttf",
    "NotoSans-Regular.ttf",
    "msyh.ttc",
    "malgun.ttf",
    "Nirmala.ttc",
    "Nirmala.ttf",
    "LeelawUI.ttf",
    "Arial Unicode.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "FreeSans.ttf",
    "NotoSansArabic-Regular.ttf",
    "NotoSansBengali-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansTamil-Regular.ttf",
    "NotoSansThai-Regular.ttf",
)
_LONGEST_TEXT = 200
_NO_CHARACTER = "\uffff"  # which no font has: drawn as what the font shows in place of a letter


class Canvas:
    """A picture that can be drawn into.

    Attributes:
        line_width: Default width of lines in pixels; it grows with the picture.
        font_size: Default height of text in pixels; it grows with the picture.
        labels: (L, 4) rectangles, XYXY, of the names written so far, for others to keep clear.

    Example:
        >>> canvas = Canvas(np.zeros((48, 64, 3), np.uint8))
        >>> canvas.draw_box((8, 8, 40, 30), (255, 0, 0))
        >>> canvas.to_array()[8, 8].tolist()
        [255, 0, 0]
    """

    def __init__(self, image: npt.NDArray[np.uint8], scale: float = 1.0) -> None:
        """Start from a copy of an (H, W, 3) uint8 RGB picture, `scale` times its size.

        Raises:
            ValueError: The picture has another shape or type, or `scale` is not positive.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"need a picture (H, W, 3) of uint8, got {image.shape} of {image.dtype}"
            )
        if scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self._image = Image.fromarray(image).copy()
        if scale != 1:
            size = (max(round(image.shape[1] * scale), 1), max(round(image.shape[0] * scale), 1))
            self._image = self._image.resize(size, Image.Resampling.BICUBIC)
        side = math.sqrt(self.width * self.height)
        self.font_size = max(11, round(side / 45))
        self.line_width = max(2, round(side / 320))
        self.labels: npt.NDArray[np.float64] = np.zeros((0, 4))

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self._image.width

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self._image.height

    def reset(self, picture: Image.Image) -> None:
        """Begin again with a picture of the same size."""
        self._image = picture
        self.labels = np.zeros((0, 4))

    def to_array(self) -> npt.NDArray[np.uint8]:
        """Return a copy of the picture, (H, W, 3) uint8 RGB."""
        return np.array(self._image)

    # -- shapes

    def draw_box(
        self,
        box: Sequence[float],
        color: Color,
        *,
        alpha: float = 1.0,
        line_width: int | None = None,
    ) -> None:
        """Draw the border of a box.

        Args:
            box: XYXY. The outer edge of the border lies on it, so that the border hides nothing
                around the object; that of a small object lies around it, so that it can be seen.
            color: Of the border.
            alpha: Opacity, 0 to 1.
            line_width: In pixels.
        """
        w = line_width or self.line_width
        x1, y1, x2, y2 = self.frame(box, w)
        for bar in (
            (x1, y1, x2, y1 + w),
            (x1, y2 - w, x2, y2),
            (x1, y1 + w, x1 + w, y2 - w),
            (x2 - w, y1 + w, x2, y2 - w),
        ):
            self._fill_rectangle(bar, color, alpha)

    def frame(self, box: Sequence[float], line_width: int | None = None) -> Rectangle:
        """Return the outer edge of the border that `draw_box` draws."""
        # Snapped to whole pixels: a horizontal line is sharpest without anti-aliasing.
        x1, y1, x2, y2 = (round(v) for v in box)
        w = line_width or self.line_width
        x1, x2 = _around(x1, x2, w)
        y1, y2 = _around(y1, y2, w)
        return x1, y1, x2, y2

    def draw_line(
        self, points: Points, color: Color, *, alpha: float = 1.0, line_width: float | None = None
    ) -> None:
        """Draw straight lines from point to point (P, 2), with round ends and joints."""
        width = line_width or self.line_width
        self._draw_smooth(points, width, color, alpha, functools.partial(_stroke, width=width))

    def draw_polygon(
        self,
        points: Points,
        color: Color,
        *,
        edge_color: Color | None = None,
        alpha: float = 0.5,
        line_width: float | None = None,
    ) -> None:
        """Fill a polygon (P, 2) at opacity `alpha`. The border is opaque."""
        points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        if len(points) < 3:
            return  # no area: nothing to fill, and its box is drawn anyway
        self._draw_smooth(
            points, 0, color, alpha, lambda draw, p: draw.polygon([tuple(q) for q in p], fill=255)
        )
        width = line_width or max(1, self.line_width / 2)
        closed = np.concatenate([points, points[:1]])
        self._draw_smooth(
            closed, width, edge_color or color, 1.0, functools.partial(_stroke, width=width)
        )

    def draw_circle(
        self, center: Sequence[float], color: Color, *, radius: float, alpha: float = 1.0
    ) -> None:
        """Fill a circle."""
        x, y = center
        corners = np.array([(x - radius, y - radius), (x + radius, y + radius)])
        self._draw_smooth(
            corners, 0, color, alpha, lambda draw, p: _fill_ellipse(draw, [*p[0], *p[1]])
        )

    def draw_mask(
        self,
        mask: npt.NDArray[np.bool_],
        color: Color,
        *,
        alpha: float = 0.5,
        edge_color: Color | None = None,
    ) -> None:
        """Tint the pixels where `mask` is set.

        Args:
            mask: (H, W) bool; of another size, it is stretched over the picture.
            color: Of the tint.
            alpha: Opacity, 0 to 1.
            edge_color: Of a line along the edge, inside the mask; None draws none.
        """
        is_stretched = mask.shape != (self.height, self.width)
        if is_stretched:
            image = Image.fromarray(mask.astype(np.uint8) * 255)
            mask = np.asarray(image.resize(self._image.size, Image.Resampling.BILINEAR))
        bounds = mask_bounds(mask)
        if bounds is None:
            return
        width = max(1, self.line_width // 2)
        # With a rim, so that the edge is seen to be one; where the picture ends, a mask has none.
        x1, y1 = max(bounds[0] - width, 0), max(bounds[1] - width, 0)
        levels = mask[y1 : bounds[3] + width, x1 : bounds[2] + width].astype(np.uint8)
        levels *= 1 if is_stretched else 255
        self._blend(Image.fromarray(levels), (x1, y1), color, alpha)
        if edge_color is not None:
            edge = levels - _eroded(levels, width)
            self._blend(Image.fromarray(edge), (x1, y1), edge_color, 1.0)

    def tint(
        self, colors: npt.NDArray[np.uint8], where: npt.NDArray[Any], *, alpha: float = 0.5
    ) -> None:
        """Blend in `colors` (H, W, 3) in the pixels `where` (H, W); other sizes are stretched.

        `where` is bool, or the share of each pixel that is tinted, in [0, 1].
        """
        overlay = Image.fromarray(colors).resize(self._image.size, Image.Resampling.NEAREST)
        coverage = Image.fromarray(np.rint(where * (255 * alpha)).astype(np.uint8))
        self._image.paste(
            overlay, (0, 0), coverage.resize(self._image.size, Image.Resampling.NEAREST)
        )

    def grey_out(self, keep: npt.NDArray[np.bool_]) -> None:
        """Turn all pixels grey except where `keep` is set; another size is stretched."""
        grey = self._image.convert("L").convert("RGB")
        mask = Image.fromarray(keep.astype(np.uint8) * 255).resize(
            self._image.size, Image.Resampling.NEAREST
        )
        self._image = Image.composite(self._image, grey, mask)

    # -- text

    def text_size(self, text: str, font_size: int | None = None) -> tuple[int, int]:
        """Return width and height in pixels of a text with its background."""
        font_size = font_size or self.font_size
        text, font = _written(text, font_size)
        padding = _padding(font_size)
        ascent, descent = font.getmetrics()
        return math.ceil(font.getlength(text)) + 2 * padding, ascent + descent + padding

    def draw_text(
        self,
        text: str,
        position: Sequence[float],
        *,
        color: Color | None = None,
        background: Color | None = None,
        font_size: int | None = None,
        alpha: float = 0.85,
    ) -> None:
        """Write one line of text.

        Args:
            text: What to write.
            position: Top left corner of the background; moved as far as needed to keep the text
                inside the picture.
            color: Of the letters; None takes black or white, whichever is easier to read.
            background: Of the rectangle behind them; None draws none.
            font_size: In pixels.
            alpha: Opacity of the background.
        """
        font_size = font_size or self.font_size
        width, height = self.text_size(text, font_size)
        x = max(min(round(position[0]), self.width - width), 0)
        y = max(min(round(position[1]), self.height - height), 0)
        if background is not None:
            self._fill_rectangle((x, y, x + width, y + height), background, alpha)
        color = color or readable_on(background or (0, 0, 0))
        padding = _padding(font_size)
        text, font = _written(text, font_size)
        ImageDraw.Draw(self._image).text(
            (x + padding, y + padding // 2), text, font=font, fill=color
        )

    # -- painting

    def _draw_smooth(
        self,
        points: Points,
        margin: float,
        color: Color,
        alpha: float,
        draw_coverage: Callable[[ImageDraw.ImageDraw, list[list[float]]], None],
    ) -> None:
        """Blend in what `draw_coverage` draws of the points on a finer grid."""
        points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        x1, y1 = np.floor(points.min(axis=0) - margin)
        x2, y2 = np.ceil(points.max(axis=0) + margin)
        x1, y1 = max(int(x1), 0), max(int(y1), 0)
        x2, y2 = min(int(x2) + 1, self.width), min(int(y2) + 1, self.height)
        if x1 >= x2 or y1 >= y2:
            return
        coverage = Image.new("L", ((x2 - x1) * _FINE, (y2 - y1) * _FINE))
        # Integer coordinates are centers of cells in Pillow, corners here.
        draw_coverage(ImageDraw.Draw(coverage), ((points - (x1, y1)) * _FINE - 0.5).tolist())
        self._blend(coverage.reduce(_FINE), (x1, y1), color, alpha)

    def _fill_rectangle(self, rectangle: Rectangle, color: Color, alpha: float) -> None:
        """Blend in a rectangle of whole pixels (x1, y1, x2, y2), with x2 and y2 excluded."""
        x1, y1 = max(rectangle[0], 0), max(rectangle[1], 0)
        x2, y2 = min(rectangle[2], self.width), min(rectangle[3], self.height)
        if x1 < x2 and y1 < y2:
            self._blend(Image.new("L", (x2 - x1, y2 - y1), 255), (x1, y1), color, alpha)

    def _blend(
        self, coverage: Image.Image, corner: tuple[int, int], color: Color, alpha: float
    ) -> None:
        if alpha < 1:
            coverage = coverage.point([round(level * alpha) for level in range(256)])
        self._image.paste(
            color, (*corner, corner[0] + coverage.width, corner[1] + coverage.height), coverage
        )


def mask_bounds(mask: npt.NDArray[Any]) -> Rectangle | None:
    """Return (x1, y1, x2, y2) around the pixels that are set, x2 and y2 excluded; None for none."""
    rows = np.flatnonzero(mask.any(axis=1))
    if len(rows) == 0:
        return None
    y1, y2 = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[y1:y2].any(axis=0))
    return int(columns[0]), y1, int(columns[-1]) + 1, y2


def _eroded(levels: npt.NDArray[np.uint8], reach: int) -> npt.NDArray[np.uint8]:
    """Return the least level within `reach` pixels, in rows and columns, inside the picture."""
    # Rows, then columns: many times faster than Pillow's MinFilter, which sorts each window.
    height, width = levels.shape
    padded = np.pad(levels, reach, mode="edge")
    rows = padded[:height]
    for shift in range(1, 2 * reach + 1):
        rows = np.minimum(rows, padded[shift : shift + height])
    least = rows[:, :width]
    for shift in range(1, 2 * reach + 1):
        least = np.minimum(least, rows[:, shift : shift + width])
    return least


def _around(start: int, end: int, width: int) -> tuple[int, int]:
    """Return where the border of an object begins and ends in one direction."""
    if end - start >= 4 * width:
        return start, end
    # Outside of the object, and far enough apart for something to be seen between the lines.
    gap = max(2 * width - (end - start), 0)
    return start - width - gap // 2, end + width + (gap + 1) // 2


def readable_on(background: Color) -> Color:
    """Return black or white, whichever has more contrast with a colour."""
    red, green, blue = background
    # Luma of Rec. 601; the bound lies above the middle because white letters on a strong colour
    # look crisper.
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _stroke(draw: ImageDraw.ImageDraw, points: list[list[float]], width: float) -> None:
    """Draw the coverage of a line `width` pixels wide."""
    radius = width * _FINE / 2
    draw.line([tuple(p) for p in points], fill=255, width=max(round(2 * radius), 1))
    # Discs make round ends and fill the gaps at joints.
    for x, y in points:
        _fill_ellipse(draw, [x - radius, y - radius, x + radius, y + radius])


def _fill_ellipse(draw: ImageDraw.ImageDraw, box: list[float]) -> None:
    x1, y1, x2, y2 = (round(v) for v in box)  # Pillow would round all of them down
    draw.ellipse((x1, y1, max(x1, x2), max(y1, y2)), fill=255)


def _padding(font_size: int) -> int:
    return max(2, font_size // 5)


@functools.lru_cache(maxsize=1024)
def _written(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text as it can be written, and the font for it."""
    text = printable(text[:_LONGEST_TEXT])  # Pillow measures no text with a line break
    if text.isascii():
        return text, _default_font(size)
    lacking = {font: _missing(text, font) for font in (*_wide_fonts(size), _default_font(size))}
    font = min(lacking, key=lambda font: len(lacking[font]))
    if lacking[font]:
        log_first_n(
            logging.WARNING,
            f"no font here has all letters of {text!r}, which pictures show as numbers: install one"
            " that has, such as Noto Sans",
            key="letters without a font",
        )
    written, is_lacking = [], False
    for c in text:
        if unicodedata.category(c)[0] != "M":  # a mark goes with the letter before it
            is_lacking = c in lacking[font]
        written.append(c.encode("unicode_escape").decode() if is_lacking else c)
    return "".join(written), font


def _missing(text: str, font: ImageFont.FreeTypeFont) -> set[str]:
    """Return the letters and signs that a font lacks; marks on letters are not looked for."""

    def drawn(character: str) -> bytes:
        return bytes(cast(Any, font.getmask(character)))

    placeholder = drawn(_NO_CHARACTER)
    letters = {c for c in text if unicodedata.category(c)[0] in "LNPS"}
    return {c for c in letters if drawn(c) == placeholder}


@functools.cache
def _wide_fonts(size: int) -> list[ImageFont.FreeTypeFont]:
    fonts = []
    for name in _WIDE_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


@functools.cache
def _default_font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "this Pillow was built without FreeType; install the one from PyPI to write text into"
            " pictures"
        )
    return font
