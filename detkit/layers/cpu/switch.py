"""The switch of the fast paths: the variable `DETKIT_CPU_KERNELS` and `cpu_kernels`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

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
    """Return whether torch records a graph, which should hold operators that exporters know."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]


def may_run_on(x: Tensor) -> bool:
    """Return whether a fast path may process `x`: on a CPU, switched on, in no recorded graph."""
    # `is_traced` first: a compiler that follows this function must not read the environment.
    return x.device.type == "cpu" and not is_traced() and cpu_kernels_enabled()
