"""Run a non-finite step once more, and watch in which module its numbers stop being finite."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from detkit.structures import Instances
from detkit.utils.env import random_state, set_random_state
from detkit.utils.events import EventStorage
from detkit.utils.module_state import BufferSnapshot


class Pass(NamedTuple):
    """The forward and backward pass of one batch of an iteration."""

    batch: Any
    losses: dict[str, Tensor]
    """Detached from the graph."""
    data_time: float
    """Seconds spent waiting for the batch."""
    random_state: Mapping[str, Any]
    """Right before the forward pass."""
    error: str
    """Message of the FloatingPointError that the model raised; empty where it raised none."""


class BrokenStep(NamedTuple):
    """A step with non-finite losses or gradients in some process; its weights are unchanged."""

    iteration: int
    passes: Sequence[Pass]
    losses: list[dict[str, float]]
    """Of each pass of this process, by name."""
    is_loss_broken: bool
    """Whether a loss of any process is not finite; otherwise a gradient is not."""
    model: nn.Module
    """Without the wrapper of DistributedDataParallel."""
    optimizer: Optimizer
    snapshot: BufferSnapshot
    """The buffers before the step."""
    compute_losses: Callable[[Any], Mapping[str, Tensor]]
    """Runs `model` on a batch, in the precision of the run, without the other processes."""
    recent_losses: Sequence[float]
    """Total losses of this process's last steps, oldest first."""
    num_steps: int
    """Steps taken by this process before this one."""
    num_skipped: int
    """Steps skipped by this run before this one."""


@dataclass(frozen=True)
class BrokenOutput:
    """A module output that is not finite."""

    module: str
    """Its name in `model.named_modules`; empty for the whole model."""
    kind: str
    """Its class."""
    dtype: str
    """Type of the tensor that is not finite, such as `float16`."""
    has_finite_inputs: bool
    ran_first: bool
    """Whether no other module had finished before it."""


@dataclass(frozen=True)
class BrokenGradient:
    """A gradient that is not finite."""

    of: str
    """`output` (of a module) or `parameter`."""
    name: str
    """Name of the module or the parameter."""
    dtype: str


@dataclass(frozen=True)
class Replay:
    """What a replay has shown."""

    first_output: BrokenOutput | None
    """In the order in which modules finish: an inner one before those that contain it."""
    first_gradient: BrokenGradient | None
    """In the order of the backward pass; None as well where that was not replayed."""
    error: str
    """What stopped the replay; empty when it ran to its end."""


def replay(step: BrokenStep) -> Replay:
    """Run the passes of a step again from the same random numbers and buffers.

    The backward pass is run only if all losses were finite. Modes, gradients and random numbers are
    left as they were, buffers as they were before the step. All processes must call it, since
    layers may communicate; gradients are not exchanged.
    """
    watch = _Watch()
    error = ""
    before = random_state()
    step.snapshot.restore()
    # A storage of its own: layers log into the active one.
    with watch.over(step.model), EventStorage():
        try:
            for pass_ in step.passes:
                set_random_state(pass_.random_state)
                losses = step.compute_losses(pass_.batch)
                if not step.is_loss_broken:
                    # `autograd.grad` leaves `.grad` alone, and does not call the hooks with which
                    # DistributedDataParallel exchanges gradients.
                    total = torch.stack([loss.float() for loss in losses.values()]).sum()
                    trained = [p for p in step.model.parameters() if p.requires_grad]
                    torch.autograd.grad(total / len(step.passes), trained, allow_unused=True)
        except Exception as raised:
            # Whatever it is, what else is known about the step must still be reported.
            error = f"{type(raised).__name__}: {raised}"
        finally:
            step.snapshot.restore()
            set_random_state(before)
    return Replay(watch.first_output, watch.first_gradient, error)


class _Watch:
    """Sees the outputs of modules, and the gradients that come back to them."""

    def __init__(self) -> None:
        self.first_output: BrokenOutput | None = None
        self.first_gradient: BrokenGradient | None = None
        self._num_outputs = 0

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        handles = []
        for name, module in model.named_modules():
            hook = functools.partial(self._see_output, name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hook = functools.partial(self._see_gradient, "parameter", name)
                handles.append(parameter.register_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_output(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        tensors = list(_floats_in(output))
        broken = next((tensor for tensor in tensors if not are_finite([tensor])), None)
        if broken is not None and self.first_output is None:
            self.first_output = BrokenOutput(
                name,
                type(module).__name__,
                _type_name(broken),
                has_finite_inputs=are_finite(_floats_in((args, kwargs))),
                ran_first=self._num_outputs == 0,
            )
        self._num_outputs += 1
        # Hooks on tensors, not on modules: full backward hooks wrap outputs in views, which
        # in-place operations behind them (`ReLU(inplace=True)`) refuse.
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._see_gradient, "output", name))

    def _see_gradient(self, of: str, name: str, gradient: Tensor) -> None:
        if self.first_gradient is None and not are_finite([gradient]):
            self.first_gradient = BrokenGradient(of, name, _type_name(gradient))


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all numbers in all tensors are finite. Waits for the device."""
    return all(bool(dense_values(tensor).isfinite().all()) for tensor in tensors)


def dense_values(tensor: Tensor) -> Tensor:
    """Return the numbers that this process stores of a tensor.

    Those of a sparse tensor are a tensor of their own, and FSDP shares a tensor out.
    """
    tensor = getattr(tensor, "to_local", lambda: tensor)()
    return tensor._values() if tensor.is_sparse else tensor


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _floats_in(value: Any) -> Iterator[Tensor]:
    """Yield the floating point tensors in the inputs or outputs of a module."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Instances):
        yield from _floats_in(value.get_fields())
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats_in(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _floats_in(item)
    else:  # Boxes, ImageList and other wrappers of one tensor
        yield from _floats_in(getattr(value, "tensor", ()))
