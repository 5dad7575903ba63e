"""From a bitmap to polygons: the outlines of its pixels.

Legend: H and W height and width of the bitmap, E sides of pixels that separate the mask from the
    rest.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

# Sides of pixels are walked with the mask at the right: directions in clockwise order, y pointing
# down.
_STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])


def bitmask_to_polygons(mask: ArrayLike) -> list[np.ndarray]:
    """Return polygons along the sides of pixels that cover an (H, W) bitmap, and nothing else.

    A mask with holes is cut from top to bottom at each hole, since polygons that are joined cannot
    leave one out: the polygons of a mask do not overlap, and `polygons_to_bitmask` gives back the
    same bitmap.

    Args:
        mask: (H, W), where what is not 0 belongs to the mask.

    Returns:
        (2 P,) float64 arrays `[x0, y0, ...]`, one per part that hangs together by sides of pixels.
        None for an empty mask.

    Raises:
        ValueError: It is not (H, W).
    """
    bitmap = np.asarray(mask) != 0
    if bitmap.ndim != 2:
        raise ValueError(f"a bitmap is (H, W): got shape {bitmap.shape}")
    polygons = []
    cuts = sorted({int(loop[:, 0].min()) for loop in _outlines(bitmap) if _is_hole(loop)})
    for start, end in zip([0, *cuts], [*cuts, bitmap.shape[1]], strict=True):
        # What is a hole of the strip is one of the mask, and begins at a cut: so within the strips
        # there is none.
        for loop in _outlines(bitmap[:, start:end]):
            polygons.append((loop + np.array([start, 0])).reshape(-1).astype(np.float64))
    return polygons


def _is_hole(loop: np.ndarray) -> bool:
    """Tell whether a (P, 2) outline goes round counter-clockwise: the mask at its right is then
    around it.
    """
    x, y = loop[:, 0], loop[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) < 0


def _outlines(bitmap: np.ndarray) -> Iterator[np.ndarray]:
    """Return the outlines of a bitmap and of its holes, as (P, 2) int64 corners in order."""
    starts, directions = _sides(bitmap)
    followers = _followers(starts, directions, bitmap.shape[1] + 1)
    is_corner = (directions != directions[followers]).tolist()
    next_side, is_seen = followers.tolist(), [False] * len(starts)
    ends = starts + _STEPS[directions]
    for first in range(len(starts)):
        corners, side = [], first
        while not is_seen[side]:
            is_seen[side] = True
            if is_corner[side]:
                corners.append(side)
            side = next_side[side]
        if corners:
            yield ends[corners]


def _sides(bitmap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (E, 2) where the sides of the mask's pixels start, as `(x, y)`, and (E,) their
    directions.
    """
    padded = np.pad(bitmap, 1)
    inside = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    # Above, right, below and left of a pixel: the corner that its side starts at.
    corners = ([0, 0], [1, 0], [1, 1], [0, 1])
    starts = [
        np.argwhere(inside & ~beside)[:, ::-1] + corner
        for beside, corner in zip(neighbours, corners, strict=True)
    ]
    directions = np.repeat(np.arange(4), [len(starts_d) for starts_d in starts])
    return np.concatenate(starts), directions


def _followers(starts: np.ndarray, directions: np.ndarray, stride: int) -> np.ndarray:
    """Return (E,) the side that each side is followed by.

    Where two pixels touch at a corner only, that is the next one of the same pixel, to the right:
    such pixels do not hang together.
    """
    ends = starts + _STEPS[directions]
    start_keys = (starts[:, 1] * stride + starts[:, 0]) * 4 + directions
    end_keys = (ends[:, 1] * stride + ends[:, 0]) * 4
    order = np.argsort(start_keys)
    ordered = start_keys[order]
    followers = np.full(len(starts), -1)
    for turn in (1, 0, 3):  # right, straight on, left
        keys = end_keys + (directions + turn) % 4
        position = np.minimum(np.searchsorted(ordered, keys), max(len(ordered) - 1, 0))
        is_there = (followers < 0) & (ordered[position] == keys) if len(ordered) else followers < 0
        followers[is_there] = order[position[is_there]]
    return followers
