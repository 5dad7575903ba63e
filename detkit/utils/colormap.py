"""Palette for classes and instances, and colours of segment ids in panoptic pngs."""

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ImageColor

__all__ = [
    "as_shares",
    "class_colors",
    "colormap",
    "id2rgb",
    "random_color",
    "random_colors",
    "rgb2id",
    "skeleton_colors",
    "to_color",
]

_NUM_COLORS = 80
_MOST_IDS = 256**3

# Linear sRGB to cone responses, and their cube roots to OKLab. Source: Ottosson 2020, "A perceptual
# color space for image processing".
_RGB_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_LMS_TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)
# Without near-black, near-white and grey, which are common in images.
_LIGHTNESS = (0.5, 0.9)
_MIN_CHROMA = 0.07


def colormap(rgb: bool = False, maximum: float = 255) -> npt.NDArray[np.float32]:
    """Return the palette, (80, 3); the first colours are the most different.

    Args:
        rgb: Red first; otherwise blue first, as in OpenCV and Detectron2.
        maximum: Value of full intensity, 255 or 1.
    """
    palette = _palette(_NUM_COLORS) * np.float32(maximum)
    return palette if rgb else palette[:, ::-1].copy()


def class_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """Return an RGB colour in [0, 255] for each class; they repeat after some thousand classes."""
    palette = np.round(_palette(max(num_classes, _NUM_COLORS)) * 255).astype(int).tolist()
    colors = []
    for index in range(num_classes):
        red, green, blue = palette[index % len(palette)]
        colors.append((red, green, blue))
    return colors


def skeleton_colors(count: int) -> list[tuple[int, int, int]]:
    """Return RGB colours in [0, 255] for the lines between keypoints: light, and no class's."""
    # Off the grid of levels, multiples of 17, that colours of classes are chosen from.
    tints = []
    for red, green, blue in class_colors(count):
        tints.append((160 + red * 35 // 100, 160 + green * 35 // 100, 160 + blue * 35 // 100))
    return tints


AnyColor = str | Sequence[float] | npt.NDArray[Any]
"""What `to_color` takes."""

# Matplotlib's, which scripts of Detectron2's users have: one letter, and its cycle of ten.
_LETTERS = {
    "b": "#0000ff",
    "g": "#008000",
    "r": "#ff0000",
    "c": "#00bfbf",
    "m": "#bf00bf",
    "y": "#bfbf00",
    "k": "#000000",
    "w": "#ffffff",
}
_CYCLE = {
    "blue": "#1f77b4",
    "orange": "#ff7f0e",
    "green": "#2ca02c",
    "red": "#d62728",
    "purple": "#9467bd",
    "brown": "#8c564b",
    "pink": "#e377c2",
    "gray": "#7f7f7f",
    "olive": "#bcbd22",
    "cyan": "#17becf",
}


def to_color(color: AnyColor) -> tuple[int, int, int]:
    """Return a colour as RGB in 0 to 255.

    Args:
        color: A name as in CSS or matplotlib ("palegreen", "g", "tab:blue", "C0", "#ff8800"), or
            three or four numbers, of which the fourth, an opacity, is not used. Numbers that are
            all 1 or below are shares, others are levels from 0 to 255.

    Raises:
        ValueError: There is no colour of that name, or there are not three numbers.

    Example:
        >>> to_color("r"), to_color((1.0, 0.5, 0.0)), to_color([12, 200, 31])
        ((255, 0, 0), (255, 128, 0), (12, 200, 31))
    """
    if isinstance(color, str):
        name = _LETTERS.get(color, color)
        if re.fullmatch(r"C\d+", color):
            name = list(_CYCLE.values())[int(color[1:]) % len(_CYCLE)]
        name = _CYCLE.get(color.removeprefix("tab:"), name) if ":" in color else name
        return ImageColor.getrgb(name)[:3]
    levels = np.asarray(color, dtype=np.float64).reshape(-1)
    if len(levels) not in (3, 4):
        raise ValueError(f"a colour has three numbers or a name, got {color!r}")
    levels = levels[:3] * (255 if levels[:3].max() <= 1 else 1)
    red, green, blue = (int(level) for level in np.rint(levels).clip(0, 255))
    return red, green, blue


def as_shares(color: Sequence[int]) -> tuple[float, float, float]:
    """Return RGB in 0 to 255 as shares in [0, 1], which Detectron2's methods pass on."""
    red, green, blue = color
    return red / 255, green / 255, blue / 255


def random_color(rgb: bool = False, maximum: float = 255) -> npt.NDArray[np.float32]:
    """Return a random colour of the palette, (3,), drawn with NumPy's global generator."""
    return colormap(rgb, maximum)[np.random.randint(_NUM_COLORS)]


def random_colors(
    count: int, rgb: bool = False, maximum: float = 255
) -> list[npt.NDArray[np.float32]]:
    """Return `count` different random colours of the palette, each (3,).

    Raises:
        ValueError: `count` is larger than the palette.
    """
    if count > _NUM_COLORS:
        raise ValueError(f"the palette has {_NUM_COLORS} colours, {count} were asked for")
    chosen = np.random.permutation(_NUM_COLORS)[:count]
    return list(colormap(rgb, maximum)[chosen])


@functools.cache
def _palette(count: int) -> npt.NDArray[np.float32]:
    """Return colours, RGB in [0, 1], (count, 3) or fewer if there are no more."""
    # Greedy farthest-point sampling, for any length: each colour is the candidate farthest from all
    # previous ones in OKLab, where equal distances look equally different.
    steps = np.linspace(0, 1, 16)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    linear = np.where(
        candidates <= 0.04045, candidates / 12.92, ((candidates + 0.055) / 1.055) ** 2.4
    )
    lab = np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_OKLAB.T
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    usable = (lightness >= _LIGHTNESS[0]) & (lightness <= _LIGHTNESS[1]) & (chroma >= _MIN_CHROMA)
    candidates, lab = candidates[usable], lab[usable]
    # Start with the largest chroma, so that the palette is deterministic.
    chosen = [int(np.hypot(lab[:, 1], lab[:, 2]).argmax())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < min(count, len(candidates)):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen].astype(np.float32)


def rgb2id(color: np.ndarray) -> np.ndarray:
    """Return the (...,) int32 segment ids of (..., 3) RGB colours in [0, 255].

    Format: red + 256 green + 65536 blue, 0 for no segment:
        https://cocodataset.org/#format-data, panoptic segmentation.

    Example:
        >>> import numpy as np
        >>> from detkit.utils.colormap import id2rgb, rgb2id
        >>> rgb2id(id2rgb(np.array([[0, 70000]])))
        array([[    0, 70000]], dtype=int32)
    """
    channels = np.asarray(color).astype(np.int32)
    return channels[..., 0] + 256 * channels[..., 1] + 65536 * channels[..., 2]


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Return the (..., 3) uint8 colours of (...,) segment ids.

    Raises:
        ValueError: An id lies outside [0, 2**24).
    """
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= _MOST_IDS):
        raise ValueError(
            f"a png holds segment ids in [0, {_MOST_IDS}), got {ids.min()} to {ids.max()}"
        )
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
