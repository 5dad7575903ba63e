"""What layers compute from their weights, kept for as long as a model is only used.

A convolution folds its norm into its weight, and `detkit.layers.winograd` transforms the weight, in
every forward pass: the weights may have changed. Where they do not, in an evaluation or a
predictor, once is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from detkit.layers.tensor_ops import is_traced

T = TypeVar("T")

_IN_USE: ContextVar[PreparedWeights | None] = ContextVar("prepared weights in use", default=None)


class PreparedWeights:
    """A store of what layers have computed from their weights.

    A value is computed anew when a tensor that it comes from is another one, or was changed in
    place: torch counts changes for autograd. What is written through `tensor.data`, through NumPy
    or by a fused optimizer is not counted, and must not happen from one use of the store to the
    next.

    Example:
        >>> weights = PreparedWeights()
        >>> with weights.in_use(), torch.no_grad():
        ...     for image in images:
        ...         model([image])
    """

    def __init__(self) -> None:
        self._of_layer: WeakKeyDictionary[nn.Module, dict[str, _Prepared]] = WeakKeyDictionary()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the layers that run in this thread take their values from here."""
        token = _IN_USE.set(self)
        try:
            yield
        finally:
            _IN_USE.reset(token)

    def get(
        self, layer: nn.Module, name: str, sources: Sequence[Tensor], compute: Callable[[], T]
    ) -> T:
        """Return the value of that name of a layer; computed, without gradients, when it is not
        here or out of date.
        """
        states = [(tensor._version, tensor.data_ptr()) for tensor in sources]
        values = self._of_layer.setdefault(layer, {})
        found = values.get(name)
        if found is not None and found.is_of(sources, states):
            return found.value
        # Tensors made in inference mode could not take part in a later pass with gradients.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
        values[name] = _Prepared(
            value, list(sources), states, [tensor.untyped_storage() for tensor in sources]
        )
        return value

    def __reduce__(self) -> tuple[type[PreparedWeights], tuple[()]]:
        # A copy, also one in another process, computes its own.
        return PreparedWeights, ()


class _Prepared(NamedTuple):
    value: Any
    sources: list[Tensor]
    states: list[tuple[int, int]]
    # Held so that no later memory of the same tensors, after `tensor.data = ...`, can get the same
    # address.
    storages: list[torch.UntypedStorage]

    def is_of(self, sources: Sequence[Tensor], states: list[tuple[int, int]]) -> bool:
        same = len(sources) == len(self.sources) and all(map(_is, sources, self.sources))
        return same and states == self.states


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b


def prepared(
    layer: nn.Module, name: str, sources: Sequence[Tensor | None], compute: Callable[[], T]
) -> T:
    """Return what `compute` gives, from the `PreparedWeights` in use if there are any.

    Args:
        layer: Whose value it is.
        name: Which of the layer's.
        sources: All tensors that it is computed from; None counts for nothing.
        compute: Takes nothing else that could change.
    """
    if is_traced():
        return compute()
    kept, tensors = _IN_USE.get(), [tensor for tensor in sources if tensor is not None]
    if kept is None or not all(_can_be_watched(tensor) for tensor in tensors):
        return compute()
    return kept.get(layer, name, tensors, compute)


def are_weights_kept() -> bool:
    """Tell whether work on weights is done once for many forward passes."""
    return not is_traced() and _IN_USE.get() is not None


def _can_be_watched(tensor: Tensor) -> bool:
    needs_gradient = tensor.requires_grad and torch.is_grad_enabled()
    return not (
        needs_gradient or tensor.is_inference()
    )  # torch counts no changes of inference tensors
