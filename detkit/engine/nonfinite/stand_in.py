"""What takes the place of a forward pass that raised in one process, while the others go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from detkit.layers.norm import SyncBatchNorm2d
from detkit.utils import comm


def has_stand_in(model: nn.Module) -> bool:
    """Whether `giving_nan` can take the model's place: not if it has layers in which the others wait for this process.

    What they exchange, SyncBN in each pass forward and backward, a model that has stopped half-way
    no longer gives.
    """
    synchronised = (nn.SyncBatchNorm, SyncBatchNorm2d)
    return comm.get_world_size() == 1 or not any(
        isinstance(m, synchronised) and m.training for m in model.modules()
    )


@contextmanager
def giving_nan(model: nn.Module) -> Iterator[None]:
    """Let a model give one loss, nan, of which all its parameters are part.

    In the place of a forward pass that raised in this process: the others wait for its gradients.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    own = model.__dict__.get("forward")
    model.forward = lambda *args, **kwargs: (
        torch.stack([p.sum() for p in trained]).sum() * float("nan")
    )
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own
