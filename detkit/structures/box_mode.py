"""The formats of a box as four or five numbers, and the conversions between them.

Legend: ... any leading dimensions, D numbers per box (4, or 5 with an angle).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum, unique
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from detkit.utils.errors import ContractError

BoxLike = TypeVar("BoxLike", list, tuple, np.ndarray, Tensor)


class NoConversionError(ContractError, NotImplementedError):
    """There is no conversion between two modes."""


@unique
class BoxMode(IntEnum):
    """Format of a box. The integers are stored in data set files: they never change.

    `ABS` is absolute pixels, `REL` a fraction of the image's width and height in [0, 1].
    `XYWHA_ABS` is `(center x, center y, width, height, angle)`; the angle is in degrees and turns
    counter-clockwise.
    """

    XYXY_ABS = 0
    XYWH_ABS = 1
    XYXY_REL = 2
    XYWH_REL = 3
    XYWHA_ABS = 4

    @staticmethod
    def convert(box: BoxLike, from_mode: BoxMode | int, to_mode: BoxMode | int) -> BoxLike:
        """Return a box, or array of boxes, in another mode.

        Args:
            box: One box as a list or tuple of D numbers, or an array or tensor (..., D). It is not
                changed.
            from_mode: The mode of `box`.
            to_mode: The mode to return. `XYWHA_ABS` to `XYXY_ABS` returns the smallest upright box
                around the rotated one.

        Returns:
            The same kind of container; the input itself when the modes are equal. Integers stay
            integers, except with an angle, whose center may lie at halves.

        Raises:
            ValueError: A box has the wrong number of coordinates.
            NoConversionError: There is none. Relative modes would need the image size.

        Example:
            >>> BoxMode.convert([10, 20, 5, 8], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            [10, 20, 15, 28]
        """
        from_mode, to_mode = BoxMode(from_mode), BoxMode(to_mode)
        if from_mode == to_mode:
            return box
        converter = _CONVERTERS.get((from_mode, to_mode))
        if converter is None:
            known = ", ".join(f"{a.name} to {b.name}" for a, b in _CONVERTERS)
            raise NoConversionError(
                f"no conversion from {from_mode.name} to {to_mode.name}; there are: {known}"
            )
        # Through NumPy: torch.tensor() would round Python floats to float32.
        boxes = box if isinstance(box, Tensor) else torch.from_numpy(np.asarray(box))
        size = 5 if from_mode == BoxMode.XYWHA_ABS else 4
        is_one = isinstance(box, list | tuple)
        if boxes.dim() == 0 or boxes.shape[-1] != size or (is_one and boxes.dim() != 1):
            raise ContractError(
                f"a box in mode {from_mode.name} has {size} numbers: got shape {tuple(boxes.shape)}"
            )
        converted = converter(boxes)
        if isinstance(box, Tensor):
            return converted
        if isinstance(box, np.ndarray):
            return converted.numpy()
        return type(box)(converted.tolist())


def _xyxy_from_xywh(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], dim=-1)


def _xywh_from_xyxy(boxes: Tensor) -> Tensor:
    return torch.cat([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], dim=-1)


def _xywha_from_xywh(boxes: Tensor) -> Tensor:
    boxes = boxes if boxes.is_floating_point() else boxes.double()
    size = boxes[..., 2:]
    return torch.cat([boxes[..., :2] + size / 2, size, torch.zeros_like(boxes[..., :1])], dim=-1)


def _xyxy_from_xywha(boxes: Tensor) -> Tensor:
    dtype = boxes.dtype if boxes.is_floating_point() else torch.float64
    # In float64: the sine of 180 degrees in float32 is 1e-7, which shows when times a long side.
    center, size, angle = boxes.double().split([2, 2, 1], dim=-1)
    cos, sin = torch.deg2rad(angle).cos().abs(), torch.deg2rad(angle).sin().abs()
    half = (size * cos + size.flip(-1) * sin) / 2
    return torch.cat([center - half, center + half], dim=-1).to(dtype)


_CONVERTERS: dict[tuple[BoxMode, BoxMode], Callable[[Tensor], Tensor]] = {
    (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS): _xyxy_from_xywh,
    (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS): _xywh_from_xyxy,
    (BoxMode.XYWH_ABS, BoxMode.XYWHA_ABS): _xywha_from_xywh,
    (BoxMode.XYWHA_ABS, BoxMode.XYXY_ABS): _xyxy_from_xywha,
}
