"""The three ways to write a mask down - polygons, run lengths, bitmap - and the conversions between them.

Polygons are arrays `[x0, y0, x1, y1, ...]` in pixels, the pixel in column c spanning [c, c + 1);
several make one mask together. Which pixels a polygon covers is decided by pycocotools, so that it
is what COCO evaluation decides. Run lengths are COCO's: pixels column by column, runs of 0 and of 1
in turn, 0 first.

Legend: H and W height and width of the image, P points of a polygon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from pycocotools import mask as coco_mask

from detkit.structures.records import RLERecord

# Its annotations know only one of the forms that its functions take.
_COCO: Any = coco_mask


def polygon_area(x: np.ndarray, y: np.ndarray) -> float:
    """Return the area inside a polygon of P points, whichever way round they go.

    Source: the shoelace formula.
    """
    return 0.5 * float(np.abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))))


def as_polygon(polygon: ArrayLike) -> np.ndarray:
    """Return a polygon as (2 P,) float64 `[x0, y0, ...]`; an array of that type is kept, not copied.

    Raises:
        ValueError: It is no flat list of finite numbers, has an x without a y, or fewer than 3
            points.
    """
    points = np.asarray(polygon, dtype=np.float64)
    if points.ndim != 1:
        raise ValueError(
            f"a polygon is a flat list [x0, y0, x1, y1, ...]: got shape {points.shape}"
        )
    if len(points) % 2 != 0:
        raise ValueError(f"a polygon has a y for every x: got {len(points)} numbers")
    if len(points) < 6:
        raise ValueError(f"a polygon needs at least 3 points: got {len(points) // 2}")
    if not np.isfinite(points).all():
        raise ValueError("a polygon has finite coordinates: got NaN or infinity")
    return points


def polygon_runs(polygons: Sequence[np.ndarray], height: int, width: int) -> list[Any]:
    """Return the run lengths of each polygon, at least one, as pycocotools holds them."""
    return _COCO.frPyObjects(polygons, height, width)


def decode_runs(runs: Sequence[Sequence[Any]]) -> np.ndarray:
    """Return (H, W, M) bool bitmaps of M masks, each the union of the parts that `polygon_runs`
    gives.
    """
    return _COCO.decode(
        [parts[0] if len(parts) == 1 else _COCO.merge(parts) for parts in runs]
    ).view(bool)


def polygons_to_rle(polygons: Sequence[ArrayLike], height: int, width: int) -> RLERecord:
    """Return the run lengths of the pixels that at least one of the polygons covers. No polygon
    gives an empty mask.
    """
    if len(polygons) == 0:
        return bitmask_to_rle(np.zeros((height, width), dtype=bool))
    return _readable(
        _COCO.merge(polygon_runs([as_polygon(polygon) for polygon in polygons], height, width))
    )


def polygons_to_bitmask(polygons: Sequence[ArrayLike], height: int, width: int) -> np.ndarray:
    """Return (H, W) bool: the pixels that at least one of the polygons covers. No polygon gives an
    empty mask.
    """
    if len(polygons) == 0:
        return np.zeros((height, width), dtype=bool)
    return decode_runs(
        [polygon_runs([as_polygon(polygon) for polygon in polygons], height, width)]
    )[:, :, 0]


def bitmask_to_rle(mask: ArrayLike) -> RLERecord:
    """Return the compressed run lengths of an (H, W) bitmap, where what is not 0 belongs to the mask.

    Raises:
        ValueError: It is not (H, W).
    """
    bitmap = np.asarray(mask)
    if bitmap.ndim != 2:
        raise ValueError(f"a bitmap is (H, W): got shape {bitmap.shape}")
    return _readable(_COCO.encode(np.asfortranarray(bitmap != 0, dtype=np.uint8)))


def rle_to_bitmask(
    rle: Mapping[str, Any], height: int | None = None, width: int | None = None
) -> np.ndarray:
    """Return the (H, W) bool bitmap of run lengths, compressed or not.

    Args:
        rle: `size` and `counts`; see `RLERecord`.
        height: What the height has to be. None takes that of `size`.
        width: What the width has to be. None takes that of `size`.

    Raises:
        ValueError: The size is another one, or the runs do not add up to it. pycocotools does not
            look, and reads beyond its memory.
    """
    rle_height, rle_width = _size_of(rle)
    wanted = (rle_height if height is None else height, rle_width if width is None else width)
    if (rle_height, rle_width) != wanted:
        raise ValueError(
            f"a run-length mask has the size of its image: got {rle_height} x {rle_width} (height x"
            f" width) for an image of {wanted[0]} x {wanted[1]}"
        )
    counts = rle_counts(rle)
    values = np.arange(len(counts)) % 2 == 1
    return np.ascontiguousarray(np.repeat(values, counts).reshape(rle_width, rle_height).T)


def rle_counts(rle: Mapping[str, Any]) -> np.ndarray:
    """Return the int64 lengths of the runs, of 0 and of 1 in turn; they add up to H * W.

    Raises:
        ValueError: They do not, or `counts` is no list of lengths and no text of COCO's form.
    """
    height, width = _size_of(rle)
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        lengths = _decompressed(
            counts.encode("latin-1", "replace") if isinstance(counts, str) else counts
        )
    elif isinstance(counts, (list, tuple, np.ndarray)):
        lengths = np.asarray(counts, dtype=np.int64)
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
    """Read COCO's text: each number in digits of 5 bits, lowest first, from the fourth on less the one two before.

    A character is 48 plus the digit, plus 32 where more digits follow. The highest bit of the last
    digit is the sign.
    """
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
    # Differences to the number two before become numbers; the third is none, so the even ones start
    # behind the first.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _readable(rle: dict[str, Any]) -> RLERecord:
    """Return run lengths of pycocotools as a record that JSON can hold."""
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}
