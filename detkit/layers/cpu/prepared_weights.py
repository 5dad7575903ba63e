"""What layers compute from their weights, kept while a model is only used.

A convolution folds its norm into its weight, and `detkit.layers.cpu.winograd` transforms the
weight, in every forward pass, because the weights may have changed. In an evaluation or a predictor
they do not, and once is enough. This works on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from detkit.layers.cpu.switch import cpu_kernels_enabled, is_traced

T = TypeVar("T")

_REAL = (Tensor, nn.Parameter)
_IN_USE: ContextVar[PreparedWeights | None] = ContextVar("prepared weights in use", default=None)


class PreparedWeights:
    """A store of what layers have computed from their weights.

    A value is computed anew when a tensor that it comes from was replaced, or changed in place:
    torch counts changes for autograd. What is written through `tensor.data`, through NumPy or by a
    fused optimizer is not counted, and must not happen from one use of the store to the next.

    Example:
        >>> model, weights = nn.Conv2d(3, 8, 3), PreparedWeights()
        >>> with weights.in_use(), torch.no_grad():
        ...     for image in torch.zeros(2, 1, 3, 32, 32):
        ...         output = model(image)
    """

    def __init__(self) -> None:
        self._of_layer: WeakKeyDictionary[nn.Module, dict[str, _Prepared]] = WeakKeyDictionary()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the layers that run in this thread take their values from this store."""
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def get(
        self, layer: nn.Module, name: str, sources: Sequence[Tensor], compute: Callable[[], T]
    ) -> T:
        """Return a layer's value of that name; compute it, without gradients, if stale."""
        # The counter tells changes in place, the address what `tensor.data = ...` replaced.
        states = [(tensor._version, tensor.data_ptr()) for tensor in sources]
        values = self._of_layer.setdefault(layer, {})
        found = values.get(name)
        if found is not None and found.is_of(sources, states):
            return found.value
        # Tensors made in inference mode could not take part in a later pass with gradients.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        # A CUDA graph that is being recorded has not computed it yet; fake tensors have no numbers.
        parts = value if isinstance(value, tuple) else (value,)
        has_numbers = all(type(p) in _REAL for p in parts if isinstance(p, Tensor))
        on_gpu = any(tensor.is_cuda for tensor in sources)
        if not has_numbers or (on_gpu and torch.cuda.is_current_stream_capturing()):
            return value
        storages = [tensor.untyped_storage() for tensor in sources]
        values[name] = _Prepared(value, list(sources), states, storages)
        return value

    def forget(self, layer: nn.Module) -> None:
        """Drop what a layer has computed."""
        self._of_layer.pop(layer, None)

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        # A copy, also one in another process, computes its own.
        return PreparedWeights, ()


class _Prepared(NamedTuple):
    value: Any
    sources: list[Tensor]
    states: list[tuple[int, int]]
    # Held so that no later memory of the tensors, after `tensor.data = ...`, has this address.
    storages: list[torch.UntypedStorage]

    def is_of(self, sources: Sequence[Tensor], states: list[tuple[int, int]]) -> bool:
        # By identity: `==` of tensors compares their numbers.
        return states == self.states and list(map(id, sources)) == list(map(id, self.sources))


def prepared(
    layer: nn.Module, name: str, sources: Sequence[Tensor | None], compute: Callable[[], T]
) -> T:
    """Return the result of `compute`, from the `PreparedWeights` in use if there are any.

    Args:
        layer: Whose value it is.
        name: Which of the layer's.
        sources: All tensors that it is computed from; None is skipped.
        compute: Reads nothing else that could change.
    """
    if not are_weights_kept():
        return compute()
    store, tensors = _IN_USE.get(), [tensor for tensor in sources if tensor is not None]
    if not may_be_kept(tensors):
        return compute()
    assert store is not None
    return store.get(layer, name, tensors, compute)


def may_be_kept(sources: Sequence[Tensor]) -> bool:
    """Return whether what is computed from tensors may be used as long as they do not change."""
    if is_traced() or not cpu_kernels_enabled():
        return False
    for tensor in sources:
        # torch counts no changes of inference tensors, and gradients must reach the others.
        if tensor.is_inference() or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
        # Fake tensors, of who counts operators without computing them, have no address.
        if type(tensor) not in _REAL:
            return False
    return True


def are_weights_kept() -> bool:
    """Return whether work on weights is done once for many forward passes."""
    return not is_traced() and _IN_USE.get() is not None and cpu_kernels_enabled()
