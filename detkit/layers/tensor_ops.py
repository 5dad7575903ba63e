"""Small tensor functions that torch has in a less handy form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Join tensors as `torch.cat` does, but give a single one back as it is, without a copy.

    Raises:
        TypeError: If `tensors` is not a list or tuple.
    """
    if not isinstance(tensors, (list, tuple)):
        raise TypeError(f"cat takes a list or tuple of tensors: got {type(tensors).__name__}")
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def nonzero_tuple(x: Tensor) -> tuple[Tensor, ...]:
    """Return the indices of the non-zero elements: one (R,) int64 tensor per dimension of `x`; for
    a scalar, one.
    """
    return x.nonzero(as_tuple=True) if x.dim() > 0 else x.unsqueeze(0).nonzero(as_tuple=True)


def is_traced() -> bool:
    """Tell whether torch records a graph of what runs, which should hold plain operators and no
    numbers of today.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
