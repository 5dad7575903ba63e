"""`preserved_modes`: restores the train and eval modes of a model."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Restore the mode, train or eval, of every module of `model` at the end of the block.

    Example:
        >>> from torch import nn
        >>> from detkit.utils.modes import preserved_modes
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
