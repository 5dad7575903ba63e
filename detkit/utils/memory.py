"""Functions that go on when a GPU's memory is full."""

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def retry_if_cuda_oom(func: Function) -> Function:
    """Return a function that is tried again where a GPU's memory is full.

    First after the memory that torch keeps was freed, then with all tensors of the arguments on
    the CPU: the function must work there, and its result may be on the CPU.

    Args:
        func: Takes tensors as arguments, not within other objects.

    Example:
        >>> retry_if_cuda_oom(torch.matmul)(torch.ones(1, 2), torch.ones(2, 1)).item()
        2.0
    """

    @functools.wraps(func)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        for prepare in (lambda: None, torch.cuda.empty_cache):
            prepare()
            try:
                return func(*args, **kwargs)
            except torch.OutOfMemoryError:
                pass
        name = getattr(func, "__name__", repr(func))
        logger.warning("the GPU's memory is full: %s runs on the CPU", name)
        return func(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})

    return cast(Function, wrapped)


def _on_cpu(value: Any) -> Any:
    return value.to("cpu") if isinstance(value, Tensor) and value.is_cuda else value
