"""Polygons cut at the border of an image.

Legend: P points of a polygon, x before y.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Square pixels: what is smaller is a line along the border, left over by rounding.
_MIN_AREA = 1e-9


def clip_polygons(polygons: Sequence[np.ndarray], image_size: tuple[int, int]) -> list[np.ndarray]:
    """Return what of each polygon, (P, 2), lies in an image of `(height, width)`: nothing, itself,
    or parts of it.
    """
    height, width = image_size
    clipped = []
    for polygon in polygons:
        parts = [polygon]
        for axis, bound, is_upper in (
            (0, 0, False),
            (1, 0, False),
            (0, width, True),
            (1, height, True),
        ):
            parts = [piece for part in parts for piece in _cut(part, axis, bound, is_upper)]
        clipped += parts
    return clipped


def _cut(polygon: np.ndarray, axis: int, bound: float, is_upper: bool) -> list[np.ndarray]:
    """Return the parts of a polygon on one side of a line x = bound (axis 0) or y = bound (axis 1).

    The corners inside form chains, each from where the outline comes in to where it goes out. Along
    the line, the polygon's inside lies between the first crossing and the second, between the third
    and the fourth, and so on: there one chain is joined to the next. A polygon that crosses itself
    may pair two crossings of the same direction; its chains are then joined in their order, which
    covers the same pixels.
    """
    depth = bound - polygon[:, axis] if is_upper else polygon[:, axis] - bound
    is_inside = depth >= 0
    if is_inside.all():
        return [polygon]
    if not is_inside.any():
        return []
    chains = _chains_inside(polygon, depth, is_inside, axis, bound)
    pieces = [np.concatenate([chains[i] for i in loop]) for loop in _loops(chains, 1 - axis)]
    return [piece for piece in pieces if len(piece) >= 3 and _area(piece) > _MIN_AREA]


def _chains_inside(
    polygon: np.ndarray, depth: np.ndarray, is_inside: np.ndarray, axis: int, bound: float
) -> list[np.ndarray]:
    """Return the runs of corners inside, each between the points at which the outline crosses the
    line.
    """
    # Turned so that it starts outside: no run then goes over the end.
    start = int(np.flatnonzero(~is_inside)[0])
    polygon, depth, is_inside = (np.roll(a, -start, axis=0) for a in (polygon, depth, is_inside))
    following, depth_after = np.roll(polygon, -1, axis=0), np.roll(depth, -1)
    crosses = np.flatnonzero(is_inside != np.roll(is_inside, -1))
    share = (depth[crosses] / (depth[crosses] - depth_after[crosses]))[:, None]
    points = polygon[crosses] + share * (following[crosses] - polygon[crosses])
    points[:, axis] = bound
    return [
        np.concatenate(
            [points[k : k + 1], polygon[crosses[k] + 1 : crosses[k + 1] + 1], points[k + 1 : k + 2]]
        )
        for k in range(0, len(crosses), 2)
    ]


def _loops(chains: Sequence[np.ndarray], along: int) -> list[list[int]]:
    """Return which chains, one behind the other, make each part."""
    if len(chains) == 1:
        return [[0]]
    # Crossings 2i and 2i + 1 are where chain i starts and ends.
    places = np.array([chain[end, along] for chain in chains for end in (0, -1)])
    order = np.argsort(places, kind="stable")
    partner = np.empty(len(places), dtype=np.int64)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    following = partner[1::2]
    if (following % 2).any():
        return [list(range(len(chains)))]
    following = following // 2
    left, loops = set(range(len(chains))), []
    while left:
        loop = [left.pop()]
        while (chain := int(following[loop[-1]])) != loop[0]:
            left.discard(chain)
            loop.append(chain)
        loops.append(loop)
    return loops


def _area(polygon: np.ndarray) -> float:
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
