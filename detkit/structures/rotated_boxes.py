"""Boxes that are turned by an angle, and their overlaps.

A rotated box is XYWHA: `(center x, center y, width, height, angle)` in absolute pixels and degrees.
A positive angle turns the box counter-clockwise as seen in the image, whose y axis points down: the
side of length `width` runs along `(cos a, -sin a)`, the side `height` along `(sin a, cos a)`. An
angle and the same plus 180 degrees describe the same rectangle, of an object that faces the other
way.

Legend: N boxes, M boxes of a second set, P pairs of boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from detkit.structures.boxes import Boxes

# Pairs per step: those whose centers are compared take 10 bytes, those that may overlap 800. On a
# CPU the numbers of a step should stay in its cache.
_MAX_CANDIDATES = 1 << 21
_MAX_PAIRS = {"cpu": 1 << 13}
_MAX_PAIRS_ON_GPU = 1 << 18
# As in Detectron2, a box of a smaller area overlaps nothing.
_MIN_AREA = 1e-14


class RotatedBoxes(Boxes):
    """A set of N rotated boxes: a thin wrapper around `tensor`, (N, 5) float32 XYWHA.

    What is not listed is as in `Boxes`. As in Detectron2, what works in place changes the tensor
    that the boxes were made from.

    Example:
        >>> boxes = RotatedBoxes([[50, 50, 20, 10, 30], [10, 10, 4, 4, 0]])
        >>> boxes.area()
        tensor([200.,  16.])
        >>> boxes[1]
        RotatedBoxes(tensor([[10., 10.,  4.,  4.,  0.]]))
    """

    box_dim = 5

    def area(self) -> Tensor:
        """Return the (N,) areas in square pixels."""
        return self.tensor[:, 2] * self.tensor[:, 3]

    def normalize_angles(self) -> None:
        """Bring angles into [-180, 180), in place."""
        self.tensor[:, 4] = normalized(self.tensor[:, 4])

    def clip(self, box_size: tuple[int, int], clip_angle_threshold: float = 1.0) -> None:
        """Limit nearly upright boxes to the image, in place; normalize the angles of all.

        A turned box that is cut by the border is no rectangle any more, so it stays as it is.
        Detections near 0 degrees are cut, as those of an upright detector are.

        Args:
            box_size: `(height, width)` of the image.
            clip_angle_threshold: Boxes whose angle is at most this many degrees from 0 are cut as
                if it were 0.
        """
        height, width = box_size
        self.normalize_angles()
        x, y, w, h, angle = self.tensor.unbind(dim=1)
        x1, x2 = ((x + side * w / 2).clamp(0, width) for side in (-1, 1))
        y1, y2 = ((y + side * h / 2).clamp(0, height) for side in (-1, 1))
        # Rounding must not make a box larger than it was.
        cut = torch.stack(
            [(x1 + x2) / 2, (y1 + y2) / 2, torch.minimum(w, x2 - x1), torch.minimum(h, y2 - y1)], 1
        )
        is_cut = angle.abs() <= clip_angle_threshold
        self.tensor[:, :4] = torch.where(is_cut[:, None], cut, self.tensor[:, :4])

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Return (N,) bool: which boxes are wider and higher than `threshold` pixels."""
        return (self.tensor[:, 2:4] > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """Return (N,) bool: of which boxes all corners lie within the image; see `Boxes`."""
        return self.upright().inside_box(box_size, boundary_threshold)

    def get_centers(self) -> Tensor:
        """Return the (N, 2) centers `(x, y)`."""
        return self.tensor[:, :2]

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x and y, in place.

        If the factors differ, a turned rectangle becomes a parallelogram. The box keeps the
        direction of its sides of length `height`, and the lengths of both.
        """
        x, y, w, h, angle = self.tensor.unbind(dim=1)
        cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
        w = w * torch.hypot(scale_x * cos, scale_y * sin)
        h = h * torch.hypot(scale_x * sin, scale_y * cos)
        angle = torch.rad2deg(torch.atan2(scale_x * sin, scale_y * cos))
        self.tensor[:] = torch.stack([x * scale_x, y * scale_y, w, h, angle], dim=1)

    @torch.no_grad()
    def _pairwise_iou(self, other: Boxes) -> Tensor:
        ious = pairwise_iou_rotated(self.tensor, other.tensor)
        # All anchors of one area that an object lies within are equally good, and the RPN trains
        # those that are best. In Detectron2 rounding chooses some: here it is the same rounding.
        i, j = ious.nonzero().T
        areas, other_areas = self.area()[i], other.area()[j]
        smaller, larger = torch.minimum(areas, other_areas), torch.maximum(areas, other_areas)
        is_within = ious[i, j] * larger >= smaller * (1 - 1e-6)
        i, j, is_first = i[is_within], j[is_within], (areas == smaller)[is_within, None]
        first, second = self.tensor[i], other.tensor[j]
        inner, outer = torch.where(is_first, first, second), torch.where(is_first, second, first)
        ious[i, j] = _iou_of_inner(inner, outer)
        return ious

    def upright(self) -> Boxes:
        """Return the smallest upright box around each."""
        corners = rotated_box_corners(self.tensor)
        return Boxes(torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1))


def normalized(angle: Tensor, period: float = 360.0) -> Tensor:
    """Return angles in degrees, of any shape, brought into [-period / 2, period / 2)."""
    return (angle + period / 2) % period - period / 2


def rotated_box_corners(boxes: Tensor) -> Tensor:
    """Return the (N, 4, 2) corners `(x, y)` of XYWHA boxes.

    They are, at angle 0, upper left, upper right, lower right, lower left: clockwise as seen in the
    image.
    """
    # In float64: the sine of 180 degrees in float32 is 1e-7, which shows when times a long side.
    center, size, angle = boxes.double().split([2, 2, 1], dim=1)
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    along_width = torch.cat([cos, -sin], dim=1) * size[:, :1] / 2
    along_height = torch.cat([sin, cos], dim=1) * size[:, 1:] / 2
    offsets = [-along_width - along_height, along_width - along_height]
    offsets += [-offsets[0], -offsets[1]]
    return torch.stack([center + offset for offset in offsets], dim=1).to(boxes.dtype)


def rotated_boxes_around(points: Tensor) -> Tensor:
    """Return the (M, 5) smallest rotated boxes around quadrilaterals.

    Args:
        points: (M, 4, 2) corners `(x, y)`, in any order.

    Returns:
        XYWHA with `width >= height` and the angle in [-90, 90).

    Example:
        >>> rotated_boxes_around(torch.tensor([[[0.0, 0], [4, 0], [4, 2], [0, 2]]]))
        tensor([[2., 1., 4., 2., 0.]])
    """
    # The smallest box lies along a side of the convex hull: that is one of the six lines through
    # two of the points.
    first, second = torch.triu_indices(4, 4, offset=1).to(points.device)
    along = points[:, second] - points[:, first]
    length = along.norm(dim=2, keepdim=True)
    along = torch.where(length > 0, along / length, along.new_tensor([1.0, 0.0]))
    across = torch.stack([-along[..., 1], along[..., 0]], dim=2)
    # (M, 6 lines, along and across, 4 points)
    axes = torch.stack([along, across], dim=2)
    places = axes @ points[:, None].transpose(2, 3)
    low, high = places.amin(dim=3), places.amax(dim=3)
    best = (high - low).prod(dim=2).argmin(dim=1)
    rows = torch.arange(len(points), device=points.device)
    low, high, axes = low[rows, best], high[rows, best], axes[rows, best]
    center = ((low + high)[:, None] @ axes)[:, 0] / 2
    width, height = (high - low).unbind(dim=1)
    angle = torch.rad2deg(torch.atan2(-axes[:, 0, 1], axes[:, 0, 0]))
    angle = torch.where(height > width, angle + 90, angle)
    sides = torch.stack([torch.maximum(width, height), torch.minimum(width, height)], dim=1)
    return torch.cat([center, sides, normalized(angle, 180.0)[:, None]], dim=1)


@torch.no_grad()
def pairwise_iou_rotated(
    boxes1: Tensor | RotatedBoxes, boxes2: Tensor | RotatedBoxes, *, above: float = 0.0
) -> Tensor:
    """Return the (N, M) intersection over union of N and M rotated boxes, in [0, 1].

    Intersections are exact, computed in float64 whatever the dtype (on MPS in float32), and in
    bounded memory besides the result. Angles differing by 180 degrees make no difference. Boxes
    without an area, or with a number that is not finite, overlap nothing. There is no gradient.

    Args:
        boxes1: (N, 5) XYWHA, or `RotatedBoxes`.
        boxes2: (M, 5), likewise.
        above: The caller compares with this threshold: the result may be 0 where it is not higher,
            which saves most of the work.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> pairwise_iou_rotated(
        ...     torch.tensor([[5.0, 5, 10, 6, 55]]), torch.tensor([[5.0, 5, 10, 6, -35]])
        ... )
        tensor([[0.4286]])
    """
    if isinstance(boxes1, RotatedBoxes):
        boxes1 = boxes1.tensor
    if isinstance(boxes2, RotatedBoxes):
        boxes2 = boxes2.tensor
    for boxes in (boxes1, boxes2):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"rotated boxes are (N, 5) XYWHA: got {tuple(boxes.shape)}")
    ious = boxes1.new_zeros(len(boxes1), len(boxes2))
    outlines1, outlines2 = _outlines(boxes1), _outlines(boxes2)
    near = _near_pairs(outlines1, outlines2, above)
    for rows, columns, ious_i in _overlaps(outlines1, outlines2, near, above):
        ious[rows, columns] = ious_i.to(ious.dtype)
    return ious


# The name that it has in this module of Detectron2, whose package `structures` has the other one.
pairwise_iou = pairwise_iou_rotated


@torch.no_grad()
def overlapping_rotated_boxes(boxes: Tensor, counts: Sequence[int], above: float) -> Tensor:
    """Return the (P, 2) pairs `i < j` of boxes of the same run whose IoU is higher than `above`.

    Args:
        boxes: (N, 5) XYWHA.
        counts: Lengths of consecutive runs of boxes, N in all.
        above: An IoU in [0, 1].
    """
    outlines = _outlines(boxes)

    def near_pairs() -> Iterator[Tensor]:
        start = 0
        for count in counts:
            run = outlines[:, start : start + count]
            for pairs in _near_pairs(run, run, above, is_same=True):
                yield pairs + start
            start += count

    found = [torch.zeros(2, 0, dtype=torch.int64, device=boxes.device)]
    for i, j, ious in _overlaps(outlines, outlines, near_pairs(), above):
        found.append(torch.stack([i, j])[:, ious > above])
    return torch.cat(found, dim=1).T


def _outlines(boxes: Tensor) -> Tensor:
    """Return (6, N) center x and y, half the sides, cosine and sine: in float64, if there is."""
    x, y, w, h, angle = boxes.to(_wide_dtype(boxes)).unbind(dim=1)
    angle = torch.deg2rad(angle)
    return torch.stack([x, y, w / 2, h / 2, angle.cos(), angle.sin()])


def _wide_dtype(boxes: Tensor) -> torch.dtype:
    return torch.float32 if boxes.device.type == "mps" else torch.float64


def _near_pairs(
    outlines1: Tensor, outlines2: Tensor, above: float, is_same: bool = False
) -> Iterator[Tensor]:
    """Yield (2, P) indices of pairs whose centers are near enough for an IoU higher than `above`.

    That is, nearer than a share of r1 + r2, the radii of the circles around them. All others are
    out by one matrix product. Of the pairs of a set with itself only those `i < j` count.
    """
    # A share t of each box lies within the other. Seen along the line through both centers, boxes
    # reach p1 <= r1 and p2 <= r2 from their centers, and the first is cut off at the distance
    # s = d - p2 from its own. As its sections narrow on both sides of the middle, at most
    # (1 - s / p1) / 2 of it lie beyond s >= 0, and at most 1 - (1 - |s| / p1)^2 / 2 beyond s < 0.
    # Adding the limit of d for one box to that for the other gives d < share (p1 + p2).
    share = 1 - above if above < 0.5 else math.sqrt(max(0.0, 1 - above) / 2)
    # `norm` along the first dimension takes ten times as long as these three operations.
    radius1, radius2 = (
        share * (outlines[2] ** 2 + outlines[3] ** 2).sqrt() for outlines in (outlines1, outlines2)
    )
    # d^2 - (r1 + r2)^2, multiplied out.
    places = [outlines[0] ** 2 + outlines[1] ** 2 for outlines in (outlines1, outlines2)]
    rows = torch.stack(
        [*outlines1[:2], radius1, places[0] - radius1**2, torch.ones_like(radius1)], dim=1
    )
    other_ends = [torch.ones_like(radius2), places[1] - radius2**2]
    columns = torch.stack([*(-2 * outlines2[:2]), -2 * radius2, *other_ends])
    # Rounding must not lose a pair.
    sizes = torch.cat([places[0], places[1], radius1**2, radius2**2]).nan_to_num()
    margin = 64 * torch.finfo(rows.dtype).eps * (sizes.max() if len(sizes) > 0 else 0.0)
    num_rows = max(1, _MAX_CANDIDATES // max(1, columns.shape[1]))
    for start in range(0, max(1, len(rows)), num_rows):
        is_near = rows[start : start + num_rows] @ columns < margin
        if is_same:
            is_near = is_near.triu_(diagonal=start + 1)
        pairs = is_near.nonzero().T.contiguous()
        pairs[0] += start
        yield pairs


def _overlaps(
    outlines1: Tensor, outlines2: Tensor, pairs: Iterable[Tensor], above: float
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield indices into both sets, and the IoUs, of the pairs where it may be over `above`."""
    max_pairs = _MAX_PAIRS.get(outlines1.device.type, _MAX_PAIRS_ON_GPU)
    for some in _joined(pairs):
        kept = [
            i_j[:, _may_overlap(outlines1[:, i_j[0]], outlines2[:, i_j[1]], above)]
            for i_j in some.split(max_pairs, dim=1)
        ]
        for i, j in torch.cat(kept, dim=1).split(max_pairs, dim=1):
            yield i, j, _matched_iou(outlines1[:, i], outlines2[:, j])


def _joined(pairs: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield (2, P) pairs in fewer, larger parts."""
    parts: list[Tensor] = []
    for pairs_i in pairs:
        parts.append(pairs_i)
        if sum(part.shape[1] for part in parts) > _MAX_CANDIDATES // 8:
            yield torch.cat(parts, dim=1)
            parts = []
    if parts:
        yield torch.cat(parts, dim=1)


def _may_overlap(outlines1: Tensor, outlines2: Tensor, above: float) -> Tensor:
    """Return (P,) bool: which pairs may have an IoU higher than `above`.

    Two boxes share no more than each shares with the smallest box around the other along its own
    sides, and no more than the smaller one has.
    """
    x1, y1, w1, h1, cos1, sin1 = outlines1
    x2, y2, w2, h2, cos2, sin2 = outlines2
    dx, dy = x1 - x2, y1 - y2
    cos, sin = (cos1 * cos2 + sin1 * sin2).abs_(), (sin1 * cos2 - cos1 * sin2).abs_()
    area1, area2 = 4 * w1 * h1, 4 * w2 * h2
    shared = torch.minimum(area1, area2)
    for w, h, cos_a, sin_a, other_w, other_h in (
        (w2, h2, cos2, sin2, w1, h1),
        (w1, h1, cos1, sin1, w2, h2),
    ):
        along, across = (dx * cos_a - dy * sin_a).abs_(), (dx * sin_a + dy * cos_a).abs_()
        around_w, around_h = other_w * cos + other_h * sin, other_w * sin + other_h * cos
        width = torch.minimum(around_w + w - along, 2 * torch.minimum(around_w, w))
        height = torch.minimum(around_h + h - across, 2 * torch.minimum(around_h, h))
        shared = torch.minimum(shared, width.clamp_(min=0) * height.clamp_(min=0))
    # Rounding must not lose a pair.
    return shared > (area1 + area2 - shared) * (above * (1 - 1e-5))


@torch.no_grad()
def matched_pairwise_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the (P,) intersection over union of each rotated box, (P, 5), with its partner.

    It is exact, as described for `pairwise_iou_rotated`.
    """
    return _matched_iou(_outlines(boxes1), _outlines(boxes2)).to(boxes1.dtype)


def _matched_iou(outlines1: Tensor, outlines2: Tensor) -> Tensor:
    """Return the (P,) IoU of boxes given as (6, P) outlines."""
    # In the frame of the second box, that box is upright and centred. Its intersection with the
    # first has the area that the outline of the first encloses once each coordinate is limited to
    # the sides of the second: what lies outside collapses onto its border. Unlike clipping vertex
    # by vertex this has no cases to tell apart, and changes continuously with the boxes: touching,
    # parallel and coinciding sides need no tolerance.
    x1, y1, w1, h1, cos1, sin1 = outlines1
    x2, y2, w2, h2, cos2, sin2 = outlines2
    # Differences first: they are exact, and far from the origin the rest would lose its digits.
    dx, dy = x1 - x2, y1 - y2
    x, y = dx * cos2 - dy * sin2, dx * sin2 + dy * cos2
    cos, sin = cos1 * cos2 + sin1 * sin2, sin1 * cos2 - cos1 * sin2
    wx, wy = w1 * cos, -w1 * sin
    hx, hy = h1 * sin, h1 * cos
    # (4, P): clockwise in the image, from the upper left corner of an upright box.
    xs = x + torch.stack([-wx - hx, wx - hx, wx + hx, hx - wx])
    ys = y + torch.stack([-wy - hy, wy - hy, wy + hy, hy - wy])
    shared = _limited_integral(xs, ys, w2, h2)
    area1, area2 = 4 * w1 * h1, 4 * w2 * h2
    shared = torch.minimum(shared, torch.minimum(area1, area2)).clamp(min=0)
    is_box = (torch.minimum(area1, area2) >= _MIN_AREA) & (w1 > 0) & (w2 > 0)
    iou = torch.where(is_box, shared / (area1 + area2 - shared), 0.0)
    return iou.nan_to_num(nan=0.0)


def _iou_of_inner(inner: Tensor, outer: Tensor) -> Tensor:
    """Return the (P,) IoU of (P, 5) boxes with boxes around them, rounded as Detectron2 rounds.

    The shared area is that of two triangles from the uppermost corner of the inner box, of several
    the left one, with the middle between both centers as origin.
    """
    x, y = (inner[:, :2] - (inner[:, :2] + outer[:, :2]) / 2).unbind(dim=1)
    w, h = inner[:, 2], inner[:, 3]
    # Not pi / 180, but its first digits.
    angle = inner[:, 4].to(_wide_dtype(inner)) * 0.01745329251
    cos, sin = angle.cos().float() * 0.5, angle.sin().float() * 0.5
    right = torch.stack([x + sin * h + cos * w, y + cos * h - sin * w])
    upper = torch.stack([x - sin * h + cos * w, y - cos * h - sin * w])
    center = torch.stack([x, y])
    # (2, 4, P), around the box.
    corners = torch.stack([right, upper, 2 * center - right, 2 * center - upper], dim=1)
    is_uppermost = corners[1] == corners[1].amin(dim=0)
    start = torch.where(is_uppermost, corners[0], torch.inf).argmin(dim=0)
    others = (start + torch.arange(1, 4, device=inner.device)[:, None]) % 4
    xs, ys = corners.take_along_dim(others[None], 1) - corners.take_along_dim(start[None, None], 1)
    triangles = (xs[:2] * ys[1:] - xs[1:] * ys[:2]).abs()
    shared = (triangles[0] + triangles[1]) / 2
    return shared / (w * h + outer[:, 2] * outer[:, 3] - shared)


def _limited_integral(xs: Tensor, ys: Tensor, half_w: Tensor, half_h: Tensor) -> Tensor:
    """Return the (P,) integral of x dy around polygons, x limited to +-half_w, y to +-half_h.

    It is the area inside, as the polygons run from the x axis to the y axis.

    Args:
        xs: (4, P) corners.
        ys: (4, P)
        half_w: (P,)
        half_h: (P,)
    """
    dx, dy = xs.roll(-1, 0) - xs, ys.roll(-1, 0) - ys
    # The part of each side within the limits of y, from (x0, y0) to (x1, y1). A side along x has
    # none, or one whose integral is 0.
    slope = torch.where(dy == 0, 0.0, dx / dy)
    y0 = torch.clamp(ys, -half_h, half_h)
    y1 = torch.clamp(ys + dy, -half_h, half_h)
    x0, x1 = xs + (y0 - ys) * slope, xs + (y1 - ys) * slope
    # The mean of the limited x over that part, m0 and m1 at its ends. Both factors of the second
    # term are exact where x0 and x1 are close, which a difference of antiderivatives is not.
    m0, m1 = torch.clamp(x0, -half_w, half_w), torch.clamp(x1, -half_w, half_w)
    share = torch.where(x0 == x1, 0.0, (m1 - m0) / (x1 - x0))
    mean = m0 + share * (x1 - (m0 + m1) / 2)
    return ((y1 - y0) * mean).sum(dim=0)
