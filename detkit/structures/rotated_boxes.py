"""Boxes that are turned by an angle, and their overlaps.

A rotated box is XYWHA: `(center x, center y, width, height, angle)` in absolute pixels and degrees.
A positive angle turns the box counter-clockwise as seen in the image, whose y axis points down: the
side of length `width` runs along `(cos a, -sin a)`, the side `height` along `(sin a, cos a)`. An
angle and the same plus 180 degrees describe the same rectangle, of an object that faces the other
way.

Legend: N boxes, M boxes of a second set, P pairs of boxes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from detkit.structures.boxes import Boxes

# Pairs per step. Candidates are found with three bytes per pair; each pair near enough to overlap
# then takes about 250 bytes. On a CPU the numbers of a step should stay in its cache.
_MAX_CANDIDATES = 1 << 23
_MAX_PAIRS = {"cpu": 1 << 14}
_MAX_PAIRS_ON_GPU = 1 << 20
# As in Detectron2, a box of a smaller area overlaps nothing.
_MIN_AREA = 1e-14


class RotatedBoxes(Boxes):
    """A set of N rotated boxes: a thin wrapper around `tensor`, (N, 5) float32 XYWHA.

    What is not listed is as in `Boxes`.

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
        self.tensor = torch.cat([self.tensor[:, :4], normalized(self.tensor[:, 4:])], dim=1)

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
        sides = torch.where(is_cut[:, None], cut, self.tensor[:, :4])
        self.tensor = torch.cat([sides, angle[:, None]], dim=1)

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
        self.tensor = torch.stack([x * scale_x, y * scale_y, w, h, angle], dim=1)

    def upright(self) -> Boxes:
        """Return the smallest upright box around each."""
        corners = rotated_box_corners(self.tensor)
        return Boxes(torch.cat([corners.amin(dim=1), corners.amax(dim=1)], dim=1))


def normalized(angle: Tensor) -> Tensor:
    """Return angles in degrees, of any shape, brought into [-180, 180)."""
    return (angle + 180.0) % 360.0 - 180.0


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


def pairwise_iou(boxes1: RotatedBoxes, boxes2: RotatedBoxes) -> Tensor:
    """Return the (N, M) intersection over union of rotated boxes; see `pairwise_iou_rotated`."""
    return pairwise_iou_rotated(boxes1.tensor, boxes2.tensor)


@torch.no_grad()
def pairwise_iou_rotated(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the (N, M) intersection over union of N and M rotated boxes, in [0, 1].

    Intersections are exact, computed in float64 whatever the dtype (on MPS in float32), and in
    bounded memory besides the result. Angles differing by 180 degrees make no difference. Boxes
    without an area, or with a number that is not finite, overlap nothing. There is no gradient.

    Args:
        boxes1: (N, 5) XYWHA.
        boxes2: (M, 5)

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> pairwise_iou_rotated(
        ...     torch.tensor([[5.0, 5, 10, 6, 55]]), torch.tensor([[5.0, 5, 10, 6, -35]])
        ... )
        tensor([[0.4286]])
    """
    for boxes in (boxes1, boxes2):
        if boxes.dim() != 2 or boxes.shape[1] != 5:
            raise ValueError(f"rotated boxes are (N, 5) XYWHA: got {tuple(boxes.shape)}")
    ious = boxes1.new_zeros(len(boxes1), len(boxes2))
    # MPS has no float64.
    precise = torch.float32 if boxes1.device.type == "mps" else torch.float64
    boxes1, boxes2 = boxes1.to(precise), boxes2.to(precise)
    for rows, columns in _overlap_candidates(boxes1, boxes2):
        found = _iou_of_pairs(boxes1[rows], boxes2[columns])
        ious[rows, columns] = found.to(ious.dtype)
    return ious


def _overlap_candidates(boxes1: Tensor, boxes2: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (P,) indices into both sets, of all pairs whose circumscribed circles meet."""
    # Most pairs are far apart: of 250,000 anchors and 20 objects one in a hundred is left.
    max_pairs = _MAX_PAIRS.get(boxes1.device.type, _MAX_PAIRS_ON_GPU)
    num_rows = max(1, _MAX_CANDIDATES // max(1, len(boxes2)))
    for start in range(0, len(boxes1) if len(boxes2) else 0, num_rows):
        group = boxes1[start : start + num_rows]
        distance = torch.cdist(
            group[:, :2], boxes2[:, :2], compute_mode="donot_use_mm_for_euclid_dist"
        )
        reach = (group[:, None, 2:4].norm(dim=2) + boxes2[:, 2:4].norm(dim=1)) / 2
        near = (distance < reach).nonzero()
        near[:, 0] += start
        for pairs in near.split(max_pairs):
            yield pairs[:, 0], pairs[:, 1]


def _iou_of_pairs(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Return the (P,) IoU of each box with its partner.

    In the frame of the second box, that box is upright and centred. Its intersection with the first
    has the area that the outline of the first encloses once each coordinate is limited to the sides
    of the second: what lies outside collapses onto its border. Unlike clipping vertex by vertex
    this has no cases to tell apart, and changes continuously with the boxes. So touching, parallel
    and coinciding sides need no tolerance.
    """
    x1, y1, w1, h1, angle1 = boxes1.unbind(dim=1)
    x2, y2, w2, h2, angle2 = boxes2.unbind(dim=1)
    # Differences first: they are exact, and far from the origin the rest would lose its digits.
    dx, dy = x1 - x2, y1 - y2
    cos, sin = torch.deg2rad(angle2).cos(), torch.deg2rad(angle2).sin()
    x, y = dx * cos - dy * sin, dx * sin + dy * cos
    cos, sin = torch.deg2rad(angle1 - angle2).cos(), torch.deg2rad(angle1 - angle2).sin()
    wx, wy = w1 / 2 * cos, -w1 / 2 * sin
    hx, hy = h1 / 2 * sin, h1 / 2 * cos
    corners = [
        (x - wx - hx, y - wy - hy),
        (x + wx - hx, y + wy - hy),
        (x + wx + hx, y + wy + hy),
        (x - wx + hx, y - wy + hy),
    ]
    shared = torch.zeros_like(x)
    for (xa, ya), (xb, yb) in zip(corners, corners[1:] + corners[:1], strict=True):
        shared += _limited_line_integral(xa, ya, xb, yb, w2 / 2, h2 / 2)
    area1, area2 = w1 * h1, w2 * h2
    shared = torch.minimum(shared, torch.minimum(area1, area2)).clamp(min=0)
    is_box = (torch.minimum(area1, area2) >= _MIN_AREA) & (w1 > 0) & (w2 > 0)
    return torch.where(is_box, shared / (area1 + area2 - shared), 0.0).nan_to_num(nan=0.0)


def _limited_line_integral(
    xa: Tensor, ya: Tensor, xb: Tensor, yb: Tensor, half_w: Tensor, half_h: Tensor
) -> Tensor:
    """Return the integral of x dy from a to b, x limited to +-half_w and y to +-half_h.

    Summed along a closed line that runs from the x axis to the y axis, it is the area inside.
    """
    dx, dy = xb - xa, yb - ya
    # The part of the line whose y is within the limits, from t to u in [0, 1]. A line along x has
    # no such part, or an integral of 0: what is divided by is 0 with it, and any t will do.
    inverse = torch.where(dy == 0, 0.0, 1 / dy)
    low, high = (-half_h - ya) * inverse, (half_h - ya) * inverse
    t = torch.minimum(low, high).clamp(0, 1)
    u = torch.maximum(low, high).clamp(0, 1)
    # Within it, x reaches its limits at r and s. The integral of x over t is then a sum of three
    # trapezoids; where x does not change, r and s do not matter.
    inverse = torch.where(dx == 0, 0.0, 1 / dx)
    first, last = (-half_w - xa) * inverse, (half_w - xa) * inverse
    r = torch.minimum(torch.maximum(torch.minimum(first, last), t), u)
    s = torch.minimum(torch.maximum(torch.maximum(first, last), t), u)
    xt, xr, xs, xu = (torch.clamp(xa + dx * p, -half_w, half_w) for p in (t, r, s, u))
    return dy * ((xt + xr) * (r - t) + (xr + xs) * (s - r) + (xs + xu) * (u - s)) / 2
