"""Pictures in which every pixel belongs to one segment: tints, edges and names.

Shapes: (H, W) picture.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detkit.visualization.canvas import Canvas, Color

# Cells along the longer side of the grid on which a place for a name is looked for: finer than any
# name is long.
_GRID = 64


class Segment(NamedTuple):
    """What to draw of one segment."""

    id: int
    """Value of its pixels in the map."""
    color: Color
    text: str


def draw_segments(
    canvas: Canvas,
    segment_map: npt.NDArray[np.integer],
    segments: Sequence[Segment],
    *,
    alpha: float,
    min_area: float,
) -> None:
    """Tint the pixels of each segment, draw a line where two meet, and write their names in their midst.

    Args:
        canvas: Drawn into.
        segment_map: (H, W) id per pixel; stretched over the canvas. Ids that `segments` lacks are
            left as they are.
        segments: With ids of their own.
        alpha: Opacity of the tint.
        min_area: A segment of fewer pixels of the map gets no name.
    """
    ids = np.array([segment.id for segment in segments], dtype=np.int64)
    colors = np.array([segment.color for segment in segments], dtype=np.uint8).reshape(-1, 3)
    known, places = np.unique(segment_map, return_inverse=True)
    index_of = {int(value): index for index, value in enumerate(ids)}
    indices = np.array([index_of.get(int(value), -1) for value in known], dtype=np.int64)
    index_map = indices[places.reshape(segment_map.shape)]
    shown = index_map >= 0
    if not shown.any():
        return
    canvas.tint(colors[index_map], shown, alpha=alpha)
    edges = _edges(index_map)
    canvas.tint(np.full_like(colors[index_map], 255), edges, alpha=0.8)
    stretch = np.array([canvas.width / segment_map.shape[1], canvas.height / segment_map.shape[0]])
    areas = np.bincount(index_map[shown], minlength=len(segments))
    for index in np.argsort(-areas, kind="stable").tolist():
        if areas[index] >= max(min_area, 1):
            x, y = midst(index_map == index) * stretch
            width, height = canvas.text_size(segments[index].text)
            canvas.draw_text(
                segments[index].text,
                (x - width / 2, y - height / 2),
                background=segments[index].color,
            )


def _edges(index_map: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """The pixels of segments whose right or lower neighbour is of another one."""
    edges = np.zeros(index_map.shape, bool)
    edges[:, :-1] |= index_map[:, :-1] != index_map[:, 1:]
    edges[:-1] |= index_map[:-1] != index_map[1:]
    return edges


def midst(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return a point (x, y) deep inside a mask that is not empty: where a name hides no neighbour.

    Found on a coarse grid, by peeling layers off until nothing is left.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = rows[0], columns[0]
    cut = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    step = -(-max(cut.shape) // _GRID)
    coarse = cut[step // 2 :: step, step // 2 :: step]
    if not coarse.any():  # thinner than the grid: any of its pixels will do
        coarse, step = cut, 1
    rest = np.pad(coarse, 1)
    while rest.any():
        last = rest
        rest = (
            rest
            & np.roll(rest, 1, 0)
            & np.roll(rest, -1, 0)
            & np.roll(rest, 1, 1)
            & np.roll(rest, -1, 1)
        )
    # Of the cells that stay longest, the one in the middle.
    cells = np.argwhere(last[1:-1, 1:-1])
    y, x = cells[np.square(cells - cells.mean(axis=0)).sum(axis=1).argmin()]
    return np.array([left + (x + 0.5) * step, top + (y + 0.5) * step])
