"""Parts of a model that name published weights of their own to start from, as a backbone of
torchvision does.
"""

import logging
from collections.abc import Collection
from typing import Protocol, runtime_checkable

from torch import nn

logger = logging.getLogger(__name__)


@runtime_checkable
class HasInitialWeights(Protocol):
    """A module that can take weights from where they are published."""

    def load_initial_weights(self) -> str:
        """Take them, and say what they are; empty where random weights are wanted."""
        ...


def load_initial_weights(model: nn.Module, loaded: Collection[str] = ()) -> list[str]:
    """Let each part take its published weights, unless a checkpoint has brought weights for it.

    That happens when weights are loaded, not when a model is built, so that to resume, evaluate or
    predict from a checkpoint fetches nothing.

    Args:
        model: Its parts are changed.
        loaded: Names of the model's tensors that a checkpoint has filled.

    Returns:
        The names of the parts that have taken some.
    """
    parts = []
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""  # a backbone may be the whole model
        if not isinstance(module, HasInitialWeights) or any(
            tensor.startswith(prefix) for tensor in loaded
        ):
            continue
        source = module.load_initial_weights()
        if source:
            logger.info("%s starts from %s", name or "the model", source)
            parts.append(name)
    return parts
