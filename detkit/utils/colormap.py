"""Colours that can be told apart, for classes and instances in pictures.

The palette is not a list of numbers but made here: each next colour is the one farthest from all
before it, measured in a space where equal distances look equally different.
"""

import functools

import numpy as np
import numpy.typing as npt

__all__ = ["class_colors", "colormap", "random_color", "random_colors"]

_NUM_COLORS = 80

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
# Near-black, near-white and grey are left to the picture itself.
_LIGHTNESS = (0.5, 0.9)
_MIN_CHROMA = 0.07


def colormap(rgb: bool = False, maximum: float = 255) -> npt.NDArray[np.float32]:
    """Return the palette, (80, 3): any first colours of it are as different as so many can be.

    Args:
        rgb: Red first; otherwise blue first, as OpenCV and Detectron2 have it.
        maximum: Value of full intensity, 255 or 1.
    """
    palette = _palette(_NUM_COLORS) * np.float32(maximum)
    return palette if rgb else palette[:, ::-1].copy()


def class_colors(num_classes: int) -> list[tuple[int, int, int]]:
    """Return a colour for each class, RGB in 0 to 255: the first colours of the palette, which goes on as far as needed.

    Beyond some thousand classes no more colours can be told apart, and they come again from the
    first one on.
    """
    palette = np.round(_palette(max(num_classes, _NUM_COLORS)) * 255).astype(int).tolist()
    chosen = (palette[index % len(palette)] for index in range(num_classes))
    return [(red, green, blue) for red, green, blue in chosen]


def random_color(rgb: bool = False, maximum: float = 255) -> npt.NDArray[np.float32]:
    """Return one colour of the palette at random (NumPy's global generator), (3,)."""
    return colormap(rgb, maximum)[np.random.randint(_NUM_COLORS)]


def random_colors(
    count: int, rgb: bool = False, maximum: float = 255
) -> list[npt.NDArray[np.float32]]:
    """Return `count` different colours of the palette at random, each (3,).

    Raises:
        ValueError: More are asked for than the palette has.
    """
    if count > _NUM_COLORS:
        raise ValueError(f"the palette has {_NUM_COLORS} colours, {count} were asked for")
    chosen = np.random.permutation(_NUM_COLORS)[:count]
    return list(colormap(rgb, maximum)[chosen])


@functools.cache
def _palette(count: int) -> npt.NDArray[np.float32]:
    """RGB in [0, 1], (count, 3) or fewer if there are no more, farthest first."""
    steps = np.linspace(0, 1, 16)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab(candidates)
    lightness, chroma = lab[:, 0], np.hypot(lab[:, 1], lab[:, 2])
    usable = (lightness >= _LIGHTNESS[0]) & (lightness <= _LIGHTNESS[1]) & (chroma >= _MIN_CHROMA)
    candidates, lab = candidates[usable], lab[usable]
    # The most colourful one starts; which it is matters little, as long as it is always the same.
    chosen = [int(np.hypot(lab[:, 1], lab[:, 2]).argmax())]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < min(count, len(candidates)):
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
        chosen.append(int(distance.argmax()))
    return candidates[chosen].astype(np.float32)


def _oklab(rgb: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ _RGB_TO_LMS.T) @ _LMS_TO_OKLAB.T
