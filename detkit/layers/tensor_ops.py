"""Tensor functions under Detectron2's names, for cases that torch's do not cover."""

from collections.abc import Sequence

import torch
from torch import Tensor


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate as `torch.cat` does, but return a single tensor as it is, without a copy.

    Raises:
        TypeError: `tensors` is not a list or tuple.
    """
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"cat takes a list or tuple of tensors: got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of non-zero elements, one (R,) int64 per dimension; a scalar has one."""
    return x.nonzero(as_tuple=True) if x.dim() > 0 else x.unsqueeze(0).nonzero(as_tuple=True)
