"""Run a step once more, and watch every module: where do the numbers stop being finite?"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.engine.nonfinite.step import BrokenStep
from detkit.engine.nonfinite.verdict import are_finite
from detkit.structures import Instances
from detkit.utils.env import random_state, set_random_state
from detkit.utils.events import EventStorage


@dataclass(frozen=True)
class BrokenOutput:
    """The output of a module that is not finite."""

    module: str
    """As `model.named_modules` names it; empty for the whole model."""
    kind: str
    """Its class."""
    dtype: str
    """Type of the tensor that is not finite, such as `float16`."""
    has_finite_inputs: bool
    ran_first: bool
    """Whether no module gave an output before it."""


@dataclass(frozen=True)
class BrokenGradient:
    """A gradient that is not finite."""

    of: str
    """`output` of a module, or `parameter`."""
    name: str
    """Of the module, or of the parameter."""
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
    """Run a step's passes again from the same random numbers; the backward pass only if all losses were finite.

    Modes, gradients and random numbers are afterwards as they were before, buffers as they were
    before the step. All processes must call it, since layers may communicate; gradients are not
    exchanged.
    """
    watch = _Watch()
    error = ""
    with _undisturbed(step), watch.over(step.model):
        try:
            for pass_ in step.passes:
                set_random_state(pass_.random_state)
                losses = step.compute_losses(pass_.batch)
                if not step.verdict.is_loss_broken:
                    _differentiate(losses, step.model, len(step.passes))
        except (
            Exception
        ) as raised:  # whatever it is: the rest of what is known about the step must still be told
            error = f"{type(raised).__name__}: {raised}"
    return Replay(watch.first_output, watch.first_gradient, error)


def _differentiate(losses: Mapping[str, Tensor], model: nn.Module, num_passes: int) -> None:
    """Run the backward pass, without a change to `.grad` and without the hooks that exchange it."""
    total = torch.stack([loss.float() for loss in losses.values()]).sum() / num_passes
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.autograd.grad(total, trained, allow_unused=True)


@contextmanager
def _undisturbed(step: BrokenStep) -> Iterator[None]:
    """Run the block from the buffers that the step began with; these are left behind, and no other
    trace of it.
    """
    before = random_state()
    step.buffers.restore()
    try:
        with EventStorage():  # layers log into the active storage
            yield
    finally:
        step.buffers.restore()
        set_random_state(before)


class _Watch:
    """Sees the outputs of modules, and the gradients that come back to them."""

    def __init__(self) -> None:
        self.first_output: BrokenOutput | None = None
        self.first_gradient: BrokenGradient | None = None
        self._num_outputs = 0

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        handles = [
            module.register_forward_hook(
                functools.partial(self._see_output, name), with_kwargs=True
            )
            for name, module in model.named_modules()
        ]
        handles += [
            parameter.register_hook(functools.partial(self._see_gradient, "parameter", name))
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
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
                _type(broken),
                has_finite_inputs=are_finite(_floats_in((args, kwargs))),
                ran_first=self._num_outputs == 0,
            )
        self._num_outputs += 1
        # Hooks on tensors, not on modules: those wrap outputs in views, which in-place operations
        # behind them refuse.
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._see_gradient, "output", name))

    def _see_gradient(self, of: str, name: str, gradient: Tensor) -> None:
        if self.first_gradient is None and not are_finite([gradient]):
            self.first_gradient = BrokenGradient(of, name, _type(gradient))


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _floats_in(value: Any) -> Iterator[Tensor]:
    """The tensors of floating point numbers in what modules take and give."""
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
    else:  # Boxes, ImageList and the like
        yield from _floats_in(getattr(value, "tensor", ()))
