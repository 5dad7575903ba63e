"""Tensor functions under Detectron2's names, for cases that torch's do not cover."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from detkit.utils.errors import WrongTypeError


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate as `torch.cat` does, but return a single tensor as it is, without a copy.

    Raises:
        TypeError: `tensors` is not a list or tuple.
    """
    if not isinstance(tensors, (list, tuple)):
        raise WrongTypeError(f"cat takes a list or tuple of tensors: got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of non-zero elements, one (R,) int64 per dimension; a scalar has one."""
    return x.nonzero(as_tuple=True) if x.dim() > 0 else x.unsqueeze(0).nonzero(as_tuple=True)


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """Resize as `torch.nn.functional.interpolate` does, which takes empty batches by now."""
    return F.interpolate(input, size, scale_factor, mode, align_corners)


def shapes_to_tensor(x: Sequence[int | Tensor], device: torch.device | None = None) -> Tensor:
    """Return sizes, numbers or scalar tensors, as an (R,) tensor."""
    if any(isinstance(size, Tensor) for size in x):
        return torch.stack([torch.as_tensor(size, device=device) for size in x])
    return torch.as_tensor(x, device=device)


def move_device_like(src: Tensor, dst: Tensor) -> Tensor:
    """Return a tensor on the device of another."""
    return src.to(dst.device)


class NewEmptyTensor(torch.autograd.Function):
    """`NewEmptyTensor.apply(x, shape)`: an empty tensor of a shape that depends on the empty `x`.

    For layers of users' own that compute the shape of their output for a batch without images.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of this shape without values, of the type of `x` and on its device."""
        ctx.shape = x.shape
        return x.new_empty(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        """Return a gradient of 0."""
        return grads[0].new_zeros(ctx.shape), None


def split_nonzero(masks: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return the indices of the true entries of several masks, without waiting for the device.

    Args:
        masks: Each (R_i,) bool.
        counts: How many entries of each are true, as the caller has read them, all at once.

    Returns:
        For each mask its (count,) int64 indices, rising.
    """
    if not masks:
        return []
    joined, total = torch.cat(list(masks)), sum(counts)
    index = torch.cat([torch.arange(len(mask), device=joined.device) for mask in masks])
    # Each true entry goes to the place of its rank. All others go behind the end.
    place = torch.where(joined, joined.cumsum(0) - 1, total)
    found = index.new_empty(total + 1).scatter_(0, place, index)
    return list(found[:total].split(list(counts)))
