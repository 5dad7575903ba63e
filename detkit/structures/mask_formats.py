"""The three formats of a mask (polygons, run lengths, bitmap) and the conversions between them.

Polygons are arrays `[x0, y0, x1, y1, ...]` in pixels, the pixel in column c spanning [c, c + 1);
several make one mask together. pycocotools decides which pixels a polygon covers, as in COCO
evaluation. Run lengths are COCO's: pixels column by column, runs of 0 and of 1 in turn, 0 first.

Legend: H and W height and width of the image, P points of a polygon, E edges of an outline (sides
    of pixels that separate the mask from the rest).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as coco_mask

# Untyped: its annotations cover only one of the forms that its functions take.
_COCO: Any = coco_mask

# pycocotools holds every fifth of a pixel along an outline in memory, and counts them in 32 bits: a
# coordinate of 4e7 ends the process.
_MAX_COORDINATE = 1_000_000
_MAX_OUTLINE = 10_000_000

# Sides of pixels are walked with the mask at the right: directions in clockwise order, y pointing
# down.
_STEPS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])


class RLERecord(TypedDict):
    """A mask in COCO's run-length encoding."""

    size: list[int]
    """`[height, width]`."""
    counts: str | bytes | list[int]
    """Compressed (str or bytes), or the run lengths themselves."""


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Return the area inside a polygon of P points, in either direction.

    Source: the shoelace formula.
    """
    return 0.5 * float(np.abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def box_of_bitmask(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box XYXY around a bitmap (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def as_polygon(polygon: ArrayLike) -> np.ndarray:
    """Return a polygon as (2 P,) float64 `[x0, y0, ...]`; not a copy if it is one already.

    Raises:
        ValueError: It is not a flat list of numbers, or one is not finite or beyond a million.
        ValueError: Its outline is longer than ten million pixels.
        ValueError: An x has no y.
        ValueError: There are fewer than 3 points.
    """
    points = np.asarray(polygon, dtype=np.float64)
    if points.ndim != 1:
        raise ValueError(f"a polygon is a flat list [x0, y0, x1, ...]: got shape {points.shape}")
    if len(points) % 2 != 0:
        raise ValueError(f"a polygon has a y for every x: got {len(points)} numbers")
    if len(points) < 6:
        raise ValueError(f"a polygon needs at least 3 points: got {len(points) // 2}")
    farthest = float(np.abs(points).max())
    if not math.isfinite(farthest):
        raise ValueError("a polygon has finite coordinates: got NaN or infinity")
    if farthest > _MAX_COORDINATE:
        raise ValueError(
            f"a polygon has coordinates of at most {_MAX_COORDINATE:,} pixels: got {farthest:g}"
        )
    # Measured only where so many points could make an outline that long.
    if farthest * len(points) > _MAX_OUTLINE:
        corners = points.reshape(-1, 2)
        outline = float(np.abs(np.diff(corners, axis=0, append=corners[:1])).sum())
        if outline > _MAX_OUTLINE:
            raise ValueError(
                f"the outline of a polygon has at most {_MAX_OUTLINE:,} pixels: got {outline:.0f}"
            )
    return points


def polygon_runs(polygons: Sequence[np.ndarray], height: int, width: int) -> list[Any]:
    """Return the run lengths of each polygon, of which there is at least one, for pycocotools."""
    # Checked when they were read, but scaled since: on the grid of a tiny box, hugely.
    near = [np.clip(polygon, -_MAX_COORDINATE, _MAX_COORDINATE) for polygon in polygons]
    return _COCO.frPyObjects(near, height, width)


def decode_runs(runs: Sequence[Sequence[Any]]) -> np.ndarray:
    """Return (H, W, M) bool bitmaps of M masks, each the union of parts from `polygon_runs`."""
    merged = [parts[0] if len(parts) == 1 else _COCO.merge(parts) for parts in runs]
    return _COCO.decode(merged).view(bool)


def polygons_to_rle(polygons: Sequence[ArrayLike], height: int, width: int) -> RLERecord:
    """Return the run lengths of the union of polygons; without polygons, of an empty mask."""
    if len(polygons) == 0:
        return bitmask_to_rle(np.zeros((height, width), dtype=bool))
    checked = [as_polygon(polygon) for polygon in polygons]
    return rle_record(_COCO.merge(polygon_runs(checked, height, width)))


def polygons_to_bitmask(polygons: Sequence[ArrayLike], height: int, width: int) -> np.ndarray:
    """Return the (H, W) bool union of polygons; without polygons, an empty mask.

    Example:
        >>> polygons_to_bitmask([[1.0, 0, 3, 0, 3, 2, 1, 2]], height=2, width=4).astype(int)
        array([[0, 1, 1, 0],
               [0, 1, 1, 0]])
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    parts = polygon_runs([as_polygon(polygon) for polygon in polygons], height, width)
    # `decode` takes seven times as long for an object of 120 pixels in an image of 1024.
    merged = parts[0] if len(parts) == 1 else _COCO.merge(parts)
    return _bitmap(rle_counts(merged), height, width)


def bitmask_to_rle(mask: ArrayLike) -> RLERecord:
    """Return the compressed run lengths of an (H, W) bitmap, whose mask is what is not 0.

    Raises:
        ValueError: It is not (H, W).
    """
    bitmap = np.asarray(mask)
    if bitmap.ndim != 2:
        raise ValueError(f"a bitmap is (H, W): got shape {bitmap.shape}")
    return rle_record(_COCO.encode(np.asfortranarray(bitmap != 0, dtype=np.uint8)))


def window_to_rle(window: ArrayLike, top: int, left: int, image_size: tuple[int, int]) -> RLERecord:
    """Return the run lengths of a mask of which only a window is given; the rest is 0.

    The whole bitmap, 400 MB for 20,000 x 20,000 pixels, is never made.

    Args:
        window: (h, w); what is not 0 belongs to the mask.
        top: Row of the image that the window begins at.
        left: Column.
        image_size: `(height, width)`.
    """
    height, width = image_size
    bitmap = np.asarray(window) != 0
    if not bitmap.any():
        return rle_record(
            _COCO.frPyObjects({"size": [height, width], "counts": [height * width]}, height, width)
        )
    # Down each column, where the value changes: from 0 to 1 and from 1 to 0 in turn.
    edges = np.diff(np.pad(bitmap, ((1, 1), (0, 0))).astype(np.int8), axis=0)
    columns, rows = np.nonzero(edges.T)
    places = (columns + left) * height + rows + top
    # A run that ends at the bottom of a column and one that begins at the top of the next are one.
    joins = np.flatnonzero(places[1:-1:2] == places[2::2]) * 2 + 1
    places = np.delete(places, np.concatenate([joins, joins + 1]))
    ends = [height * width] * bool(places[-1] < height * width)
    counts = np.diff(np.concatenate([[0], places, ends])).astype(int).tolist()
    return rle_record(_COCO.frPyObjects({"size": [height, width], "counts": counts}, height, width))


def union_of_rles(rles: Sequence[RLERecord]) -> RLERecord:
    """Return the union of masks of one image."""
    return rle_record(_COCO.merge([dict(rle) for rle in rles]))


def rle_to_bitmask(
    rle: Mapping[str, Any], height: int | None = None, width: int | None = None
) -> np.ndarray:
    """Return the (H, W) bool bitmap of run lengths, compressed or not.

    Args:
        rle: `size` and `counts`; see `RLERecord`.
        height: Required height. None takes that of `size`.
        width: Required width. None takes that of `size`.

    Raises:
        ValueError: The size is another one.
        ValueError: The runs do not add up to it.
    """
    # Decoded here: pycocotools does not check the sizes, and reads beyond its memory.
    rle_height, rle_width = _size_of(rle)
    wanted = (rle_height if height is None else height, rle_width if width is None else width)
    if (rle_height, rle_width) != wanted:
        raise ValueError(
            f"a run-length mask has the size of its image: got {rle_height} x {rle_width}"
            f" (height x width) for an image of {wanted[0]} x {wanted[1]}"
        )
    return _bitmap(rle_counts(rle), rle_height, rle_width)


def _bitmap(counts: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the (H, W) bool bitmap of run lengths that add up to H * W."""
    bitmap = np.zeros((height, width), dtype=bool)
    runs = np.flatnonzero(counts[1::2]) * 2 + 1
    if len(runs) == 0:
        return bitmap
    # Only the window that holds the mask is written: the rest of the memory is not touched.
    ends = counts.cumsum()
    first, last = int(runs[0]), int(runs[-1])
    start, stop = int(ends[first - 1]), int(ends[last])
    left, right = start // height, -(-stop // height)
    inside = np.append(counts[first - 1 : last + 1], right * height - stop)
    inside[0] = start - left * height
    values = np.arange(len(inside)) % 2 == 1
    columns = np.repeat(values, inside).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    bitmap[top:bottom, left:right] = columns[:, top:bottom].T
    return bitmap


def rle_counts(rle: Mapping[str, Any]) -> np.ndarray:
    """Return the int64 lengths of the runs, of 0 and of 1 in turn; they add up to H * W.

    Raises:
        ValueError: They do not.
        ValueError: `counts` is neither a list of lengths nor a text in COCO's encoding.
    """
    height, width = _size_of(rle)
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        lengths = _decompressed(
            counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
        )
    elif isinstance(counts, (list, tuple, np.ndarray)):
        lengths = np.asarray(counts)
        if lengths.size and (lengths.dtype.kind not in "iuf" or (lengths % 1 != 0).any()):
            raise ValueError(f"the runs of a mask are whole numbers: got {str(counts)[:60]}")
        with np.errstate(invalid="ignore"):  # beyond 64 bits: the sum is wrong then
            lengths = lengths.astype(np.int64)
    else:
        raise ValueError(
            "counts of a run-length mask are a list of lengths or a text: got"
            f" {type(counts).__name__}"
        )
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(
            f"the runs of a mask of {height} x {width} (height x width) must add up to"
            f" {height * width}: got {len(lengths)} runs that add up to {lengths.sum()}"
            + (", some negative" if (lengths < 0).any() else "")
        )
    return lengths


def _size_of(rle: Mapping[str, Any]) -> tuple[int, int]:
    size = rle.get("size")
    if not isinstance(size, (list, tuple, np.ndarray)) or len(size) != 2:
        raise ValueError(f"a run-length mask has a size [height, width]: got {size!r}")
    return int(size[0]), int(size[1])


def _decompressed(text: bytes) -> np.ndarray:
    """Return the run lengths that COCO's text encodes."""
    # Each number is written in digits of 5 bits, lowest first; a character is 48 plus the digit,
    # plus 32 where more digits follow. The highest bit of the last digit is the sign. From the
    # fourth number on, what is written is the difference to the number two before.
    digits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - 48
    if len(digits) == 0:
        return digits
    starts = np.concatenate([[0], np.flatnonzero(digits & 32 == 0) + 1])
    num_digits = np.diff(starts)
    is_readable = (
        digits.min() >= 0
        and digits.max() < 64
        and starts[-1] == len(digits)
        and num_digits.max() <= 12
    )
    if not is_readable:
        raise ValueError(f"counts of a run-length mask are no text of COCO's form: {text[:40]!r}")
    place = np.arange(len(digits)) - np.repeat(starts[:-1], num_digits)
    numbers = np.add.reduceat((digits & 31) << (5 * place), starts[:-1])
    numbers -= np.where(digits[starts[1:] - 1] & 16, np.int64(1) << (5 * num_digits), 0)
    # The third number is no difference yet, so the sums over even places start behind the first.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def rle_record(rle: Mapping[str, Any]) -> RLERecord:
    """Return run lengths of pycocotools as a record that JSON can store."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def has_holes(mask: ArrayLike) -> bool:
    """Return whether an (H, W) bitmap encloses pixels that are not in it."""
    return any(_is_hole(loop) for loop in bitmask_outlines(np.asarray(mask) != 0))


def bitmask_to_polygons(mask: ArrayLike) -> list[np.ndarray]:
    """Return polygons along the sides of pixels that cover exactly an (H, W) bitmap.

    They do not overlap, and `polygons_to_bitmask` returns the same bitmap.

    Args:
        mask: (H, W); what is not 0 belongs to the mask.

    Returns:
        (2 P,) float64 arrays `[x0, y0, ...]`, one per part whose pixels are connected by their
        sides. None for an empty mask.

    Raises:
        ValueError: It is not (H, W).
    """
    bitmap = np.asarray(mask) != 0
    if bitmap.ndim != 2:
        raise ValueError(f"a bitmap is (H, W): got shape {bitmap.shape}")
    polygons = []
    # A union of polygons cannot leave out a hole: so a mask is cut from top to bottom at each.
    cuts = sorted({int(loop[:, 0].min()) for loop in bitmask_outlines(bitmap) if _is_hole(loop)})
    for start, end in zip([0, *cuts], [*cuts, bitmap.shape[1]], strict=True):
        # A hole of a strip would be one of the mask, and so begin at a cut: strips have none.
        for loop in bitmask_outlines(bitmap[:, start:end]):
            polygons.append((loop + np.array([start, 0])).reshape(-1).astype(np.float64))
    return polygons


def _is_hole(loop: np.ndarray) -> bool:
    """Return whether a (P, 2) outline runs around a hole."""
    # Then it is counter-clockwise, and its signed area negative: the mask at its right is outside.
    x, y = loop[:, 0], loop[:, 1]
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) < 0


def bitmask_outlines(bitmap: np.ndarray) -> Iterator[np.ndarray]:
    """Return the outlines of a (H, W) bool bitmap and of its holes, as (P, 2) int64 corners."""
    # Above, right, below and left of a pixel: its neighbour there, and the corner that the side
    # between them starts at.
    padded = np.pad(bitmap, 1)
    inside = padded[1:-1, 1:-1]
    neighbours = (padded[:-2, 1:-1], padded[1:-1, 2:], padded[2:, 1:-1], padded[1:-1, :-2])
    corners_of_sides = ([0, 0], [1, 0], [1, 1], [0, 1])
    starts_of_sides, directions_of_sides = [], []
    for direction in range(4):
        pixels = np.argwhere(inside & ~neighbours[direction])[:, ::-1]
        starts_of_sides.append(pixels + corners_of_sides[direction])
        directions_of_sides.append(np.full(len(pixels), direction))
    starts = np.concatenate(starts_of_sides)
    directions = np.concatenate(directions_of_sides)
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


def _followers(starts: np.ndarray, directions: np.ndarray, stride: int) -> np.ndarray:
    """Return the (E,) index of the edge that follows each edge.

    Args:
        starts: (E, 2) as `(x, y)`.
        directions: (E,) index into `_STEPS`.
        stride: Corners in a row.
    """
    ends = starts + _STEPS[directions]
    start_keys = (starts[:, 1] * stride + starts[:, 0]) * 4 + directions
    end_keys = (ends[:, 1] * stride + ends[:, 0]) * 4
    order = np.argsort(start_keys)
    ordered = start_keys[order]
    followers = np.full(len(starts), -1)
    # Right, straight on, left. Right first: where two pixels touch at a corner only, the outline
    # stays with its own pixel, for such pixels are not connected.
    for turn in (1, 0, 3):
        keys = end_keys + (directions + turn) % 4
        position = np.minimum(np.searchsorted(ordered, keys), max(len(ordered) - 1, 0))
        is_there = (followers < 0) & (ordered[position] == keys) if len(ordered) else followers < 0
        followers[is_there] = order[position[is_there]]
    return followers
