"""The switch of the fast paths: the variable `DETKIT_CPU_KERNELS` and `cpu_kernels`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

_SWITCH: ContextVar[bool | None] = ContextVar("CPU kernels", default=None)


def cpu_kernels_enabled() -> bool:
    """Return whether layers may take their fast paths.

    They may, unless the environment variable `DETKIT_CPU_KERNELS` is 0; within `cpu_kernels` as its
    argument says.
    """
    enabled = _SWITCH.get()
    return os.environ.get("DETKIT_CPU_KERNELS", "1") != "0" if enabled is None else enabled


@contextmanager
def cpu_kernels(enabled: bool) -> Iterator[None]:
    """Turn the fast paths of all layers on or off in this thread.

    They are Winograd convolution, ROIAlign and deformable convolution by rows, and the weights that
    `PreparedWeights` keeps (these on any device). Without them the layers call torch and
    torchvision: the reference for numbers, and the first thing to try when a result looks wrong.
    In training, the backward pass belongs inside the context too.

    Example:
        >>> with cpu_kernels(False):
        ...     cpu_kernels_enabled()
        False
    """
    token = _SWITCH.set(enabled)
    try:
        yield
    finally:
        _SWITCH.reset(token)


def is_traced() -> bool:
    """Return whether torch records or transforms what is computed, and must know the operators.

    Exporters, `torch.compile`, and `torch.func` (vmap, grad, jvp, ...) do.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return True
    return torch._C._are_functorch_transforms_active()


def may_run_on(x: Tensor) -> bool:
    """Return whether a fast path may process `x`: on a CPU, switched on, in no recorded graph."""
    # `is_traced` first: a compiler that follows this function must not read the environment.
    if x.device.type != "cpu" or is_traced() or not cpu_kernels_enabled():
        return False
    # Tensors of other classes may have no numbers (fake), or compute in a way of their own. What
    # forward differentiation adds to a tensor, torch's own operators pass on.
    return type(x) in (Tensor, nn.Parameter) and unpack_dual(x).tangent is None
