"""The polygons around a region of a grid, for the masks of the generated data set.

COCO polygons have no holes. A hole is therefore joined to the outline around it by a cut of zero
width, once in and once out, which covers no pixel under the even-odd rule and the winding rule.

Legend: (H, W) grid of cells, (P, 2) corners of a loop in grid units, x before y.
"""

from operator import itemgetter

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# The four directions along the lines of the grid, each a right turn (on screen, y down) from the
# last one.
_EAST, _SOUTH, _WEST, _NORTH = range(4)


def _next_way(way: int, ways: int) -> int:
    """Return the direction in which a walk that came along `way` leaves a point.

    `ways` are the directions in which borders leave the point, as bits.
    """
    # The right turn first, so that the walk stays with cells that share an edge.
    choices = ((way + 1) % 4, way, (way + 3) % 4)
    return next((choice for choice in choices if ways >> choice & 1), way)


# A table of `_next_way`, looked up once for each point of a border: _ON[way][ways].
_ON = tuple(tuple(_next_way(way, ways) for ways in range(16)) for way in range(4))


def region_polygons(
    region: npt.NDArray[np.bool_], *, tolerance: float, min_area: float
) -> list[FloatArray]:
    """Return the outlines of a region, one polygon per connected part, with holes cut in.

    Args:
        region: (H, W) cells inside; cells that touch only at a corner are not connected.
        tolerance: Largest distance of a simplified outline from the exact one, in cells.
        min_area: Parts and holes of fewer cells are left out.

    Returns:
        (P, 2) corners per part, largest part first; cell (0, 0) covers [0, 1] x [0, 1]. They span
        exactly the box of the region. Empty for an empty region.
    """
    loops = [(signed_area(loop), loop) for loop in trace_loops(region)]
    loops.sort(key=itemgetter(0), reverse=True)
    outlines = [loop for area, loop in loops if area >= min_area]
    holes: list[list[FloatArray]] = [[] for _ in outlines]
    for area, loop in loops:
        if area <= -min_area and outlines:
            holes[_innermost_outline(loop, outlines)].append(simplify_loop(loop, tolerance))
    return [
        _cut_holes(simplify_loop(outline, tolerance), holes_i)
        for outline, holes_i in zip(outlines, holes, strict=True)
    ]


def trace_loops(region: npt.NDArray[np.bool_]) -> list[FloatArray]:
    """Return the borders of a region: outlines clockwise on screen, holes counter-clockwise.

    Returns:
        (P, 2) corners per loop, in no particular order.
    """
    ways, width = _border_ways(region)
    step = (1, width, -1, -width)
    walked: set[int] = set()
    loops = []
    # Every loop, outline or hole, runs east somewhere.
    for start in np.flatnonzero(np.frombuffer(ways, np.uint8) & (1 << _EAST)).tolist():
        if start in walked:
            continue
        corners = []
        vertex, way = start, _EAST
        while True:
            if way == _EAST:
                walked.add(vertex)
            vertex += step[way]
            turned = _ON[way][ways[vertex]]
            if turned != way:
                corners.append(vertex)
                way = turned
            if vertex == start and way == _EAST:
                break
        flat = np.array(corners)
        loops.append(np.stack([flat % width, flat // width], axis=1).astype(np.float64))
    return loops


def _border_ways(region: npt.NDArray[np.bool_]) -> tuple[bytes, int]:
    """Return the directions in which borders leave each grid point, and the points per row.

    The directions are bits of one byte per point, row by row; a border has its cells on the right.
    """
    height, width = region.shape
    inside = np.zeros((height + 2, width + 2), bool)
    inside[1:-1, 1:-1] = region
    north_west, north_east = inside[:-1, :-1], inside[:-1, 1:]
    south_west, south_east = inside[1:, :-1], inside[1:, 1:]
    ways = (
        ((south_east & ~north_east).astype(np.uint8) << _EAST)
        | ((south_west & ~south_east).astype(np.uint8) << _SOUTH)
        | ((north_west & ~south_west).astype(np.uint8) << _WEST)
        | ((north_east & ~north_west).astype(np.uint8) << _NORTH)
    )
    return ways.tobytes(), width + 1


def signed_area(loop: FloatArray) -> float:
    """Return the area of a loop in cells, positive if it runs clockwise on screen (y down)."""
    x, y = loop.T
    # Without `np.roll`, which takes longer than all the rest.
    return float(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) / 2


def simplify_loop(loop: FloatArray, tolerance: float) -> FloatArray:
    """Return a loop without corners that lie within `tolerance` of the line between others.

    The outermost corners are kept, so that the box stays the same.

    Source: Ramer 1972; Douglas and Peucker 1973, on the arcs between the four outermost corners.
    """
    x, y = loop.T
    fixed = sorted({int(i) for i in (x.argmin(), y.argmin(), x.argmax(), y.argmax())})
    keep = np.zeros(len(loop), bool)
    keep[fixed] = True
    # As complex numbers: dividing by the chord maps it to the real segment from 0 to 1.
    points = np.concatenate([loop, loop]) @ (1, 1j)
    arcs = list(zip(fixed, [*fixed[1:], fixed[0] + len(loop)], strict=True))
    while arcs:
        first, last = arcs.pop()
        if last - first < 2:
            continue
        chord = points[last] - points[first] or 1e-9
        offset = (points[first + 1 : last] - points[first]) / chord
        distance = np.abs(offset - offset.real.clip(0, 1)) * abs(chord)
        farthest = int(distance.argmax())
        if distance[farthest] > tolerance:
            middle = first + 1 + farthest
            keep[middle % len(loop)] = True
            arcs += [(first, middle), (middle, last)]
    return loop[keep]


def _innermost_outline(hole: FloatArray, outlines: list[FloatArray]) -> int:
    """Return the index of the smallest outline around a hole; outlines come largest first."""
    # The middle of a cell beside the hole never lies on a line of the grid. A hole runs
    # counter-clockwise, so the cell to the north-west of its northernmost, then westernmost corner
    # belongs to the region.
    corner = hole[np.lexsort((hole[:, 0], hole[:, 1]))[0]]
    middle = corner - 0.5
    around = [i for i, outline in enumerate(outlines) if _contains(outline, middle)]
    return around[-1] if around else 0


def _contains(loop: FloatArray, point: FloatArray) -> bool:
    """Return whether a point lies within a loop, by the parity of borders to its right."""
    (x, y), (next_x, next_y) = loop.T, np.roll(loop, -1, axis=0).T
    crosses = (x == next_x) & ((y > point[1]) != (next_y > point[1])) & (x > point[0])
    return bool(crosses.sum() % 2)


def _cut_holes(outline: FloatArray, holes: list[FloatArray]) -> FloatArray:
    """Return an outline with each hole joined to it at the closest pair of corners."""
    for hole in holes:
        distance = np.linalg.norm(outline[:, None] - hole[None], axis=2)
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        there_and_back = np.concatenate(
            [np.roll(hole, -j, axis=0), hole[j : j + 1], outline[i : i + 1]]
        )
        outline = np.concatenate([outline[: i + 1], there_and_back, outline[i + 1 :]])
    return outline
