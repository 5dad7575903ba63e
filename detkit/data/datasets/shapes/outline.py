"""From a region of a grid to the polygons around it, for the masks of the generated data set.

COCO polygons know no holes. A hole is therefore joined to the outline around it by a cut of no
width, walked once in and once out: under the even-odd rule and under the winding rule alike the cut
vanishes.

Shapes: (H, W) grid of cells, (P, 2) corners of a loop in grid units, x before y.
"""

from operator import itemgetter

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# The four ways along the lines of the grid, each a right turn (seen on screen, y down) from the one
# before.
_EAST, _SOUTH, _WEST, _NORTH = range(4)


def _next_way(way: int, ways: int) -> int:
    """The way on from a grid point: the right turn first, so that the walk keeps to cells that
    share an edge.
    """
    choices = ((way + 1) % 4, way, (way + 3) % 4)
    return next((choice for choice in choices if ways >> choice & 1), way)


# _ON[way][ways]: where a walk that came along `way` leaves a point from which borders leave in the
# set `ways` (bits).
_ON = tuple(tuple(_next_way(way, ways) for ways in range(16)) for way in range(4))


def region_polygons(
    region: npt.NDArray[np.bool_], *, tolerance: float, min_area: float
) -> list[FloatArray]:
    """Return the outlines of a region, one polygon per connected part, holes cut in.

    The outermost corners of every loop are kept, so the polygons span exactly the box of the
    region.

    Args:
        region: (H, W) cells inside; cells that touch only at a corner are not connected.
        tolerance: How far a simplified outline may stray from the true one, in cells.
        min_area: Parts and holes of fewer cells are left out.

    Returns:
        (P, 2) corners per part, largest part first; cell (0, 0) covers [0, 1] x [0, 1]. Empty for
        an empty region.
    """
    loops = sorted(
        ((signed_area(loop), loop) for loop in trace_loops(region)), key=itemgetter(0), reverse=True
    )
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
    """Walk every border of a region with its cells on the right hand: outlines clockwise on screen, holes the other
    way.

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
    """Per grid point, row by row, the set of ways in which a border leaves it, as bits; and the
    points per row.
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
    """Area within a loop in cells: positive when it runs clockwise on screen (y down)."""
    x, y = loop.T
    # Without np.roll, which takes longer than all the rest.
    return float(x[:-1] @ y[1:] - y[:-1] @ x[1:] + x[-1] * y[0] - y[-1] * x[0]) / 2


def simplify_loop(loop: FloatArray, tolerance: float) -> FloatArray:
    """Leave out corners within `tolerance` of the line between their neighbours, never one of the outermost.

    Source: Ramer 1972; Douglas and Peucker 1973, on the arcs between the four outermost corners.
    """
    x, y = loop.T
    fixed = sorted({int(i) for i in (x.argmin(), y.argmin(), x.argmax(), y.argmax())})
    keep = np.zeros(len(loop), bool)
    keep[fixed] = True
    # As complex numbers: dividing by the chord turns it into the real segment from 0 to 1.
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
    """Index of the smallest outline around a hole; outlines come largest first."""
    # The middle of a cell beside the hole: never on a line of the grid, so inside or outside is not
    # in doubt. A hole is walked counter-clockwise, so at its northernmost, then westernmost corner
    # the cell to the north-west is the region's.
    corner = hole[np.lexsort((hole[:, 0], hole[:, 1]))[0]]
    middle = corner - 0.5
    around = [i for i, outline in enumerate(outlines) if _contains(outline, middle)]
    return around[-1] if around else 0


def _contains(loop: FloatArray, point: FloatArray) -> bool:
    """Whether a point lies within a loop of grid lines, by the parity of borders to its right."""
    (x, y), (next_x, next_y) = loop.T, np.roll(loop, -1, axis=0).T
    crosses = (x == next_x) & ((y > point[1]) != (next_y > point[1])) & (x > point[0])
    return bool(crosses.sum() % 2)


def _cut_holes(outline: FloatArray, holes: list[FloatArray]) -> FloatArray:
    for hole in holes:
        distance = np.linalg.norm(outline[:, None] - hole[None], axis=2)
        i, j = np.unravel_index(distance.argmin(), distance.shape)
        there_and_back = np.concatenate(
            [np.roll(hole, -j, axis=0), hole[j : j + 1], outline[i : i + 1]]
        )
        outline = np.concatenate([outline[: i + 1], there_and_back, outline[i + 1 :]])
    return outline
