"""Activation checkpointing: less memory in training, for a second forward pass.

Paper: Tianqi Chen, Bing Xu, Chiyuan Zhang, Carlos Guestrin: Training Deep Nets with Sublinear
Memory Cost, 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


class CheckpointedSequential(nn.Sequential):
    """Modules in sequence that keep only their inputs and recompute the rest in the backward pass.

    Outputs and gradients are those of `nn.Sequential`, and so are its names in a `state_dict`.
    Batch norms update their running statistics once per step, not in the second pass.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the last module."""
        for module in self:
            input = checkpointed(module, input)
        return input


def checkpointed(module: nn.Module, input: Tensor) -> Tensor:
    """Return the output of a module that keeps only its input for the backward pass."""
    if not torch.is_grad_enabled():
        return module(input)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _copied_statistics(module)

    output = checkpoint(module, input, use_reentrant=False, context_fn=contexts)
    assert isinstance(output, Tensor)
    return output


@contextmanager
def _copied_statistics(module: nn.Module) -> Iterator[None]:
    """Let the norms of a module update copies of their statistics."""
    norms = [
        m
        for m in module.modules()
        if isinstance(m, _NormBase) and m.training and m.track_running_stats
    ]
    buffers = [dict(norm._buffers) for norm in norms]
    # Copies rather than none at all: autograd must save as many tensors as in the first pass.
    for norm, originals in zip(norms, buffers, strict=True):
        norm._buffers.update({name: b.clone() for name, b in originals.items() if b is not None})
    try:
        yield
    finally:
        for norm, originals in zip(norms, buffers, strict=True):
            norm._buffers.update(originals)
