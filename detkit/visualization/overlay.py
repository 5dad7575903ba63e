"""What is drawn over a picture besides boxes and masks: labels, keypoints, segments.

Legend: H and W height and width of a segment map, K keypoints of an object.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from detkit.utils.errors import DataError
from detkit.visualization.canvas import Canvas, Color

# Of a prediction the third number is a score, of ground truth the visibility: 0, 1 or 2.
_MIN_VISIBLE = 0.05

# Longest side of an object in widths of its lines: more of them are thinner.
_LINES_ACROSS = 40

# A person's midline runs between keypoints that nobody annotates, so no rule can name it: from the
# middle of the shoulders to the nose and to the middle of the hips.
_SHOULDERS = ("left_shoulder", "right_shoulder")
_MIDLINE = ((_SHOULDERS, ("nose", "nose")), (_SHOULDERS, ("left_hip", "right_hip")))
_MIDLINE_COLOR = (255, 90, 60)

# Cells along the longer side of the grid on which `midst` looks for a place: finer than the length
# of any name.
_GRID = 64

# Largest share of the picture that labels of a dense scene take: more would hide what they name.
_DENSE_SHARE = 0.1
_SMALLEST_FONT = 8
# Objects below so many heights of a line of text would be hidden by a label: it goes beside them.
_SMALL_SIDE = 2

ConnectionRule = tuple[str, str, Sequence[int]]
"""Two names of keypoints, and the RGB colour of the line between them."""


def draw_labels(canvas: Canvas, labels: Iterable[tuple[str, Sequence[float], Color]]) -> None:
    """Write (text, XYXY box, colour) at the boxes, clear of other labels where possible.

    Of the places at a box, one is taken that hides no other label, then one that hides little of
    small objects. Labels that would take much of the picture are written smaller, and left out
    where they find no free place, or where those before them take a tenth of the picture.
    """
    labels = list(labels)
    sizes = [canvas.text_size(text) for text, _, _ in labels]
    share = sum(width * height for width, height in sizes) / (canvas.width * canvas.height)
    is_dense = share > _DENSE_SHARE
    font_size = canvas.font_size
    if is_dense:
        smallest = min(_SMALLEST_FONT, font_size)
        font_size = max(int(font_size * math.sqrt(_DENSE_SHARE / share)), smallest)
    room = _DENSE_SHARE * canvas.width * canvas.height
    frames = [canvas.frame(box) for _, box, _ in labels]
    largest = _SMALL_SIDE * canvas.font_size
    # An array: each label is compared with all of them, which may be thousands.
    small = np.array(
        [f for f in frames if f[2] - f[0] < largest and f[3] - f[1] < largest], dtype=np.float64
    )
    for (text, _, color), (x1, y1, x2, y2) in zip(labels, frames, strict=True):
        width, height = canvas.text_size(text, font_size)
        if is_dense and room < width * height:
            continue
        # In order of preference: above the box, inside it at the top, below it, inside it at the
        # bottom; left-aligned with it, then right-aligned; then beside it.
        places = [(x, y) for x in (x1, x2 - width) for y in (y1 - height, y1, y2, y2 - height)]
        places += [(x, y) for x in (x2, x1 - width) for y in (y1, y2 - height)]
        place = _best_place(canvas, places, (width, height), small, only_free=is_dense)
        if place is not None:
            room -= width * height
            canvas.draw_text(text, place, background=color, font_size=font_size)


def _best_place(
    canvas: Canvas,
    places: Sequence[tuple[float, float]],
    size: tuple[int, int],
    small: npt.ArrayLike = (),
    *,
    only_free: bool = False,
) -> tuple[float, float] | None:
    """Return the corner for a label that hides least, the first of equal ones, and keep it clear.

    Args:
        canvas: Knows the labels written so far.
        places: Top left corners, of which those are considered that the picture has the height for.
        size: Width and height of the label.
        small: (M, 4) boxes of objects that a label would hide.
        only_free: Return None where every place hides a part of another label.
    """
    right, bottom = max(canvas.width - size[0], 0), canvas.height - size[1]
    inside = [(min(max(x, 0), right), y) for x, y in places if 0 <= y <= bottom] or list(places)
    corners = np.array(inside, dtype=np.float64)
    rectangles = np.hstack([corners, corners + np.array(size)])
    hidden = _overlaps(rectangles, canvas.labels)
    if only_free and hidden.min() > 0:
        return None
    # Sorted by the second, then by the first.
    best = int(np.lexsort((_overlaps(rectangles, small), hidden))[0])
    canvas.labels = np.vstack([canvas.labels, rectangles[best]])
    return inside[best]


def _overlaps(
    rectangles: npt.NDArray[np.float64], others: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Return for each rectangle the area that it shares with the others, (N,)."""
    boxes = np.asarray(others, dtype=np.float64).reshape(-1, 4)
    # Of thousands in a dense scene, few are near.
    first, last = rectangles[:, :2].min(axis=0), rectangles[:, 2:].max(axis=0)
    boxes = boxes[((boxes[:, :2] < last) & (boxes[:, 2:] > first)).all(axis=1)]
    start = np.maximum(rectangles[:, None, :2], boxes[:, :2])
    end = np.minimum(rectangles[:, None, 2:], boxes[:, 2:])
    return (end - start).clip(0).prod(axis=2).sum(axis=1)


def draw_keypoints(
    canvas: Canvas,
    keypoints: npt.NDArray[np.float64],
    color: Color,
    *,
    names: Sequence[str] = (),
    connection_rules: Sequence[ConnectionRule] = (),
) -> None:
    """Draw the keypoints of one object: lines between those that are connected, and a dot on each.

    Args:
        canvas: Drawn into.
        keypoints: (K, 3): x, y in pixels of the canvas, and a score or visibility; those of 0.05
            and less are left out.
        color: Of the dots.
        names: K names. Without them no lines are drawn.
        connection_rules: Which keypoints are connected; a rule of a name that is not among `names`
            is left out.

    Raises:
        DataError: There are names, but not K.
    """
    if names and len(names) != len(keypoints):
        raise DataError(
            f"the metadata has {len(names)} keypoint_names, an object has {len(keypoints)}"
            " keypoints"
        )
    visible = keypoints[:, 2] > _MIN_VISIBLE
    if not visible.any():
        return
    # Thinner on a small object, which would be hidden.
    extent = np.ptp(keypoints[visible, :2], axis=0).max()
    line_width = min(max(extent / _LINES_ACROSS, 2), canvas.line_width)
    place = {}
    for name, xy, is_visible in zip(names, keypoints[:, :2].tolist(), visible, strict=False):
        if is_visible:
            place[name] = xy
    for start, end, line_color in connection_rules:
        if start in place and end in place:
            red, green, blue = line_color
            canvas.draw_line([place[start], place[end]], (red, green, blue), line_width=line_width)
    for start, end in _MIDLINE if connection_rules else ():
        if place.keys() >= {*start, *end}:
            ends = [np.mean([place[name] for name in pair], axis=0) for pair in (start, end)]
            canvas.draw_line(ends, _MIDLINE_COLOR, line_width=line_width)
    for xy in keypoints[visible, :2].tolist():
        # A dark rim, so that a dot stands out from a line or a mask of its colour.
        canvas.draw_circle(xy, (0, 0, 0), radius=line_width * 1.4)
        canvas.draw_circle(xy, color, radius=line_width)


class Segment(NamedTuple):
    """A segment to draw."""

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
    """Tint the pixels of each segment, draw a line where two meet, and write the names.

    Args:
        canvas: Drawn into.
        segment_map: (H, W) id per pixel; stretched over the canvas. Pixels of ids that `segments`
            lacks are not changed.
        segments: With ids of their own.
        alpha: Opacity of the tint.
        min_area: A segment of fewer pixels of the map gets no name.
    """
    colors = np.array([segment.color for segment in segments], dtype=np.uint8).reshape(-1, 3)
    if not segments:
        return
    # Ids of a panoptic png reach 2^24: looked up among those of the segments, not in a table.
    ids = np.array([segment.id for segment in segments], dtype=np.int64)
    ranks = np.argsort(ids).astype(np.int32)
    places = np.searchsorted(ids[ranks], segment_map).clip(max=len(ids) - 1)
    index_map = np.where(ids[ranks][places] == segment_map, ranks[places], np.int32(-1))
    shown = index_map >= 0
    if not shown.any():
        return
    canvas.tint(colors[index_map], shown, alpha=alpha)
    # Pixels whose right or lower neighbour is of another segment.
    edges = np.zeros(index_map.shape, bool)
    edges[:, :-1] |= index_map[:, :-1] != index_map[:, 1:]
    edges[:-1] |= index_map[:-1] != index_map[1:]
    canvas.tint(np.full_like(colors[index_map], 255), edges, alpha=0.8)
    stretch = np.array([canvas.width / segment_map.shape[1], canvas.height / segment_map.shape[0]])
    areas = np.bincount(index_map[shown], minlength=len(segments))
    for index in np.argsort(-areas, kind="stable").tolist():
        if areas[index] >= max(min_area, 1):
            _, color, text = segments[index]
            x, y = midst(index_map == index) * stretch
            width, height = canvas.text_size(text)
            # Higher or lower by a line where another name is in the way.
            places = [(x - width / 2, y + (line - 0.5) * height) for line in (0, -1, 1, -2, 2)]
            place = _best_place(canvas, places, (width, height)) or places[0]
            canvas.draw_text(text, place, background=color)


def midst(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return a point (x, y) deep inside a mask that is not empty, for a name to be centered on."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = rows[0], columns[0]
    cut = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    step = -(-max(cut.shape) // _GRID)
    coarse = cut[step // 2 :: step, step // 2 :: step]
    if not coarse.any():  # thinner than the grid: any of its pixels will do
        coarse, step = cut, 1
    # Erode until nothing is left: the last cells lie deepest.
    rest = last = np.pad(coarse, 1)
    while rest.any():
        last = rest
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            rest = rest & np.roll(last, shift, axis)
    # Of the cells that stay longest, the one in the middle.
    cells = np.argwhere(last[1:-1, 1:-1])
    y, x = cells[np.square(cells - cells.mean(axis=0)).sum(axis=1).argmin()]
    return np.array([left + (x + 0.5) * step, top + (y + 0.5) * step])
