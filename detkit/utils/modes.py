"""Train and eval modes of a model, put back after code that changes them."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def preserved_modes(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` back into the mode, train or eval, that it had on entry.

    Example:
        >>> from torch import nn
        >>> from detkit.utils.modes import preserved_modes
        >>> model = nn.Dropout()
        >>> with preserved_modes(model):
        ...     _ = model.eval()
        >>> model.training
        True
    """
    # By `train()`, not by assignment to `training`: a module may override it, as torchvision's
    # feature extractors do, which exchange their graph there.
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # Parents come before their children in `modules()`, so what a parent's `train()` spreads to
        # its children is set right by their own turn.
        for module, was_training in modes:
            if module.training != was_training:
                module.train(was_training)
