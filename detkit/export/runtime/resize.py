"""The resizes of `DefaultPredictor` without torch.

Legend: H and W height and width, C channels, P pixels along a side of the result, T taps: pixels
    that one of them is mixed of.
"""

import math

import numpy as np

from detkit.utils.resize_rule import shortest_edge_size, torchvision_size

# What torch's kernel for uint8 has room for: weights are int16.
_LARGEST_WEIGHT = 2**15
_MOST_BITS = 22
# New pixels that are mixed by one product of matrices.
_BLOCK = 32


def output_size(
    height: int, width: int, rule: str, min_size: int, max_size: int
) -> tuple[int, int]:
    """Return the `(height, width)` that an image is resized to.

    Args:
        height: Of the image, in pixels.
        width: Likewise.
        rule: INPUT.RESIZE, "detectron2" or "torchvision"; they round differently.
        min_size: Wanted length of the shorter side; 0 leaves the image as it is.
        max_size: Largest length of the longer side.
    """
    if min_size == 0:
        return height, width
    new_size = torchvision_size if rule == "torchvision" else shortest_edge_size
    return new_size(height, width, min_size, max_size)


def resize_antialiased(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale an image bilinearly, with antialiasing where it gets smaller.

    The pixels of uint8 are exactly those of `torch.nn.functional.interpolate`, which mixes them
    in fixed point and rounds after the columns and again after the rows.

    Args:
        image: (H, W, C) uint8 or float32.
        size: `(height, width)` of the result.
    """
    height, width = size
    planes = image.transpose(2, 0, 1)
    if width != image.shape[1]:
        planes = _mixed(planes, width).transpose(0, 2, 1)
    else:
        planes = planes.transpose(0, 2, 1)
    if height != image.shape[0]:
        planes = _mixed(planes, height)
    return planes.transpose(2, 1, 0)


def _mixed(planes: np.ndarray, new_length: int) -> np.ndarray:
    """Return planes (C, ..., length) scaled along their last axis."""
    length = planes.shape[2]
    starts, weights = _antialiased_weights(length, new_length)
    is_fixed = planes.dtype == np.uint8
    bits = 0
    if is_fixed:
        while bits < _MOST_BITS and int(0.5 + weights.max() * 2 ** (bits + 1)) < _LARGEST_WEIGHT:
            bits += 1
        weights = np.floor(weights * 2**bits + 0.5)
    mixed = np.empty((*planes.shape[:2], new_length), planes.dtype)
    for first in range(0, new_length, _BLOCK):
        block = slice(first, first + _BLOCK)
        begin = starts[first]
        end = min(starts[block][-1] + weights.shape[1], length)
        # Neighbours are mixed of the same pixels: a small dense matrix multiplies faster than taps
        # are gathered.
        rows = zip(starts[block] - begin, weights[block], strict=True)
        matrix = np.zeros((end - begin, len(starts[block])), np.float32)
        for column, (start, row) in enumerate(rows):
            part = matrix[start : start + len(row), column]
            part[:] = row[: len(part)]
        sums = planes[:, :, begin:end].astype(np.float32) @ matrix
        if is_fixed:
            # Integers below 2^23, which float32 holds exactly, in any order of the sum.
            sums += 2 ** (bits - 1)
            sums *= 0.5**bits
            np.minimum(sums, 255, out=sums)  # its fraction is cut next, as by a shift of bits
        mixed[:, :, block] = sums
    return mixed


def _antialiased_weights(length: int, new_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the (P,) first pixel of each new pixel, and the (P, T) float64 weights from there.

    Source: the triangle filter of Pillow and torch, as wide as a new pixel and its neighbours.
    """
    scale = length / new_length
    support = max(scale, 1.0)
    num_taps = math.ceil(support) * 2 + 1
    centers = scale * (np.arange(new_length) + 0.5)
    starts = (centers - support + 0.5).astype(np.int64).clip(min=0)
    counts = (centers + support + 0.5).astype(np.int64).clip(max=length) - starts
    taps = np.arange(num_taps)
    distances = (taps + starts[:, None] - centers[:, None] + 0.5) * (1 / support)
    triangle = (1 - np.abs(distances)).clip(min=0)
    weights = np.where(taps < counts.clip(0, num_taps)[:, None], triangle, 0.0)
    # One after the other, as torch sums: a last digit decides how a weight is rounded.
    return starts, weights / weights.cumsum(axis=1)[:, -1:]


def resize_bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale (H, W, ...) bilinearly in float32 and without antialiasing.

    As torch's `interpolate` with `align_corners=False`.
    """
    resized = np.asarray(values, dtype=np.float32)
    for axis, new_length in enumerate(size):
        length = resized.shape[axis]
        if new_length != length:
            scale = np.float32(length / new_length)
            half = np.float32(0.5)
            position = scale * (np.arange(new_length, dtype=np.float32) + half) - half
            position = position.clip(min=0)
            low = np.minimum(position.astype(np.int64), length - 1)
            high = np.minimum(low + 1, length - 1)
            shape = tuple(-1 if i == axis else 1 for i in range(resized.ndim))
            share = (position - low).astype(np.float32).reshape(shape)
            resized = (
                np.take(resized, low, axis) * (1 - share) + np.take(resized, high, axis) * share
            )
    return resized
