"""Axis-aligned boxes, and measures between two sets of them.

Boxes are XYXY in absolute pixels, `x1 < x2` and `y1 < y2` unless degenerate. Coordinates are
continuous: the width is `x2 - x1`, and the pixel in column c spans [c, c + 1).

Legend: N boxes, M boxes of a second set, P points.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from detkit.utils.errors import ContractError, WrongTypeError

AnyBoxes = TypeVar("AnyBoxes", bound="Boxes")


class Boxes:
    """A set of N boxes: a thin wrapper around `tensor`, (N, 4) float32.

    Indexing, `len` and iteration work as for a list of boxes. Boxes are always float32, also under
    autocast and in half-precision models: at coordinate 1000, float16 has steps of half a pixel.

    Example:
        >>> boxes = Boxes([[0, 0, 10, 20], [5, 5, 6, 6]])
        >>> boxes.area()
        tensor([200.,   1.])
        >>> boxes[boxes.area() > 100]
        Boxes(tensor([[ 0.,  0., 10., 20.]]))
    """

    tensor: Tensor
    box_dim: ClassVar[int] = 4
    """Numbers per box; `RotatedBoxes`, a subclass, has 5."""

    def __init__(self, tensor: Tensor | Sequence[Sequence[float]] | Any) -> None:
        """Hold (N, 4) coordinates; a float32 tensor is kept, anything else converted.

        An empty tensor or list of any shape gives no boxes.

        Raises:
            ValueError: The coordinates are not (N, 4).
        """
        coordinates = torch.as_tensor(tensor).to(torch.float32)
        if coordinates.numel() == 0:
            coordinates = coordinates.reshape(-1, self.box_dim)
        if coordinates.dim() != 2 or coordinates.shape[1] != self.box_dim:
            shape = tuple(coordinates.shape)
            raise ContractError(f"boxes need coordinates of shape (N, {self.box_dim}): got {shape}")
        self.tensor = coordinates

    def clone(self: AnyBoxes) -> AnyBoxes:
        """Return a copy with its own memory."""
        return type(self)(self.tensor.clone())

    def to(self: AnyBoxes, device: torch.device | str, non_blocking: bool = False) -> AnyBoxes:
        """Return the boxes on another device. Not a copy when they are there already."""
        return type(self)(self.tensor.to(device=device, non_blocking=non_blocking))

    def area(self) -> Tensor:
        """Return the (N,) areas in square pixels."""
        x1, y1, x2, y2 = self.tensor.unbind(dim=1)
        return (x2 - x1) * (y2 - y1)

    def clip(self, box_size: tuple[int, int]) -> None:
        """Limit x to [0, width] and y to [0, height], in place.

        Args:
            box_size: `(height, width)` of the image.
        """
        height, width = box_size
        # A new tensor: the one that the boxes were made from is the caller's.
        x = self.tensor[:, 0::2].clamp(min=0, max=width)
        y = self.tensor[:, 1::2].clamp(min=0, max=height)
        self.tensor = torch.stack([x, y], dim=2).flatten(1)

    def image_index(self, position: int) -> Tensor:
        """Return (N, 1) float32: the index of the image in the batch, for each box.

        Args:
            position: That of these boxes in a list over the images.
        """
        # Filled from a number on the host: repeat_interleave would fetch lengths from the device.
        return self.tensor.new_full((len(self), 1), position)

    def nonempty(self, threshold: float = 0.0) -> Tensor:
        """Return (N,) bool: which boxes are wider and higher than `threshold` pixels."""
        sides = self.tensor[:, 2:] - self.tensor[:, :2]
        return (sides > threshold).all(dim=1)

    def inside_box(self, box_size: tuple[int, int], boundary_threshold: int = 0) -> Tensor:
        """Return (N,) bool: which boxes lie within the image.

        As in Detectron2 the left and upper border belong to the image, the right and lower do not:
        `-t <= x1`, `-t <= y1`, `x2 < width + t` and `y2 < height + t`.

        Args:
            box_size: `(height, width)` of the image.
            boundary_threshold: t, the pixels by which a box may extend beyond the image.
        """
        height, width = box_size
        x1, y1, x2, y2 = self.tensor.unbind(dim=1)
        return (
            (x1 >= -boundary_threshold)
            & (y1 >= -boundary_threshold)
            & (x2 < width + boundary_threshold)
            & (y2 < height + boundary_threshold)
        )

    def get_centers(self) -> Tensor:
        """Return the (N, 2) centers `(x, y)`."""
        return (self.tensor[:, :2] + self.tensor[:, 2:]) / 2

    def scale(self, scale_x: float, scale_y: float) -> None:
        """Multiply x and y, in place: in the tensor that the boxes were made from, too."""
        self.tensor[:, 0::2] *= scale_x
        self.tensor[:, 1::2] *= scale_y

    @classmethod
    def cat(cls: type[AnyBoxes], boxes_list: Sequence[AnyBoxes]) -> AnyBoxes:
        """Join several sets into one with its own memory. No sets give no boxes (on the CPU)."""
        # Boxes of a subclass of the user's own may be joined with plain ones.
        kind = next(base for base in cls.__mro__ if "box_dim" in vars(base))
        check_class(kind, boxes_list)
        if len(boxes_list) == 0:
            return cls(torch.empty(0, cls.box_dim))
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]))

    def _pairwise_iou(self, other: Boxes) -> Tensor:
        intersection = pairwise_intersection(self, other)
        union = (self.area()[:, None] + other.area()).sub_(intersection)
        return intersection.div_(_positive(union))

    @property
    def device(self) -> torch.device:
        """The device that holds the coordinates."""
        return self.tensor.device

    def __getitem__(self: AnyBoxes, item: int | slice | Tensor | Sequence[int]) -> AnyBoxes:
        """Select boxes by an index (giving one box), a slice, a bool mask, or int64 indices.

        Raises:
            IndexError: There is no such box.
            ValueError: The result is not a set of boxes.
        """
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"box {item} of {len(self)}")
            return type(self)(self.tensor[item].unsqueeze(0))
        selected = self.tensor[item]
        if selected.dim() != 2:
            shape = tuple(selected.shape)
            raise ContractError(
                f"indexing {len(self)} boxes with {item} gives shape {shape}, not boxes"
            )
        return type(self)(selected)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        """Iterate over the boxes, each a tensor (box_dim,)."""
        yield from self.tensor

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.tensor})"


def check_class(cls: type, items: Sequence[object]) -> None:
    """Check that all items that `cls.cat` is to join are of its class."""
    for index, item in enumerate(items):
        if not isinstance(item, cls):
            kind = type(item).__name__
            raise WrongTypeError(f"{cls.__name__}.cat takes {cls.__name__}: item {index} is {kind}")


def check_boxes_of(what: str, count: int, boxes: Tensor) -> None:
    """Check that there is one box (x1, y1, x2, y2) for each of `count` masks or objects."""
    if boxes.shape != (count, 4):
        shape = tuple(boxes.shape)
        raise ContractError(
            f"need a box (x1, y1, x2, y2) per {what}: got {shape} for {count} {what}s"
        )


def pairwise_intersection(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Return the (N, M) areas that N boxes share with M boxes."""
    # One coordinate at a time: four (N, M) temporaries of which at most two live, where the usual
    # (N, M, 2) form keeps three times as much, and strides over it.
    x1, y1, x2, y2 = (column[:, None] for column in boxes1.tensor.unbind(dim=1))
    x1_, y1_, x2_, y2_ = boxes2.tensor.unbind(dim=1)
    width = torch.minimum(x2, x2_).sub_(torch.maximum(x1, x1_)).clamp_(min=0)
    height = torch.minimum(y2, y2_).sub_(torch.maximum(y1, y1_)).clamp_(min=0)
    return width.mul_(height)


def pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Return the (N, M) intersection over union of N and M boxes, in [0, 1]; 0 if degenerate.

    Of `RotatedBoxes`, that of `pairwise_iou_rotated`; where a box lies within the other, it is
    rounded in float32 as in Detectron2, so that the same anchors are matched.

    Example:
        >>> pairwise_iou(Boxes([[0, 0, 2, 2]]), Boxes([[0, 0, 2, 1], [5, 5, 6, 6]]))
        tensor([[0.5000, 0.0000]])
    """
    return boxes1._pairwise_iou(boxes2)


def pairwise_ioa(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Return the (N, M) fractions, in [0, 1], of M `boxes2` that N `boxes1` cover."""
    return pairwise_intersection(boxes1, boxes2).div_(_positive(boxes2.area()))


def pairwise_point_box_distance(points: Tensor, boxes: Boxes) -> Tensor:
    """Return the (P, M, 4) distances of points from left, top, right and bottom sides of boxes.

    A value is negative where the point lies outside that side.

    Args:
        points: (P, 2) as `(x, y)`.
        boxes: M boxes.
    """
    points = points[:, None, :]
    return torch.cat([points - boxes.tensor[:, :2], boxes.tensor[:, 2:] - points], dim=2)


def matched_pairwise_iou(boxes1: Boxes, boxes2: Boxes) -> Tensor:
    """Return the (N,) intersection over union of each box with its partner.

    Raises:
        ValueError: The two sets differ in size.
    """
    if len(boxes1) != len(boxes2):
        raise ContractError(f"need as many boxes as partners: got {len(boxes1)} and {len(boxes2)}")
    top_left = torch.maximum(boxes1.tensor[:, :2], boxes2.tensor[:, :2])
    bottom_right = torch.minimum(boxes1.tensor[:, 2:], boxes2.tensor[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    return intersection / _positive(boxes1.area() + boxes2.area() - intersection)


def _positive(area: Tensor) -> Tensor:
    # An area that is not positive has no intersection with anything, so any positive divisor gives
    # the 0 wanted.
    return area.clamp(min=torch.finfo(area.dtype).tiny)
