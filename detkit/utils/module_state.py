"""Restoring what a model holds beside its weights: train and eval modes, and buffers."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode, train or eval, of every module of `model` at the end of the block.

    Example:
        >>> from torch import nn
        >>> from detkit.utils.module_state import preserved_modes
        >>> model = nn.Dropout()
        >>> with preserved_modes(model):
        ...     _ = model.eval()
        >>> model.training
        True
    """
    # By `train()` instead of assigning `training`: torchvision's feature extractors override it to
    # exchange their graph.
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # A parent's `train()` changes its children too; they come later in `modules()` and are then
        # restored themselves.
        for module, was_training in modes:
            if module.training != was_training:
                module.train(was_training)


class BufferSnapshot:
    """A copy of all buffers of a model, such as batch norm statistics and counters.

    In training it is taken before each step: one statistic that is nan would stay nan in all steps
    to come.
    """

    def __init__(self, model: nn.Module) -> None:
        """Keep the model, which only `restore` changes. `take` makes the copy."""
        self._model = model
        self._saved: dict[tuple[nn.Module, str], Tensor | None] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers as they are now."""
        present = self._present()
        by_type: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]]
        by_type = defaultdict(list)
        for key, value in present.items():
            saved = self._saved.get(key)
            if saved is not None and value is not None and _is_alike(saved, value):
                by_type[value.device, value.dtype].append((saved, value))
            else:
                self._saved[key] = None if value is None else value.clone()
        for key in self._saved.keys() - present.keys():
            del self._saved[key]
        # One launch per type: a detector has hundreds of buffers, all of them small.
        for pairs in by_type.values():
            saved_tensors, values = zip(*pairs, strict=True)
            torch._foreach_copy_(saved_tensors, values)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copies back, and delete buffers that did not exist when they were taken."""
        for key, present in self._present().items():
            module, name = key
            if key not in self._saved:
                del module._buffers[name]
                continue
            saved = self._saved[key]
            # In place where possible: other objects may hold the same tensor.
            if saved is not None and present is not None and _is_alike(saved, present):
                present.copy_(saved)
            else:
                module._buffers[name] = None if saved is None else saved.clone()

    def _present(self) -> dict[tuple[nn.Module, str], Tensor | None]:
        return {
            (module, name): value
            for module in self._model.modules()
            for name, value in module._buffers.items()
        }


def _is_alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
