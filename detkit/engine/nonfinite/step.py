"""A step that has to be explained."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from detkit.engine.held_buffers import HeldBuffers
from detkit.engine.nonfinite.verdict import Verdict


class Pass(NamedTuple):
    """One of the batches of an iteration."""

    batch: Any
    losses: dict[str, Tensor]
    """Cut off from the graph."""
    data_time: float
    """Seconds spent waiting for the batch."""
    random_state: Mapping[str, Any]
    """Right before the forward pass."""
    error: str
    """What a model said that found numbers that are not finite by itself; empty otherwise."""


class BrokenStep(NamedTuple):
    """A step whose losses or gradients are not finite, in this process; its weights are as they
    were before.
    """

    iteration: int
    passes: Sequence[Pass]
    verdict: Verdict
    model: nn.Module
    """Without the wrapper of DistributedDataParallel."""
    optimizer: Optimizer
    buffers: HeldBuffers
    compute_losses: Callable[[Any], Mapping[str, Tensor]]
    """Runs `model` on a batch, in the precision of the run."""
    recent_losses: Sequence[float]
    """The total losses of this process's last steps, oldest first."""
    num_steps: int
    """Steps taken in this process before this one."""
    num_skipped: int
    """Steps skipped in this run before this one."""
