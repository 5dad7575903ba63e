"""Gradient clipping right before each optimizer step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from detkit.config import CfgNode
from detkit.utils.near_miss import did_you_mean

Clipper = Callable[[list[Tensor]], Any]
CLIP_TYPES = ("value", "norm", "full_model")


def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: Optimizer) -> Optimizer:
    """Let the optimizer clip gradients before each of its steps, where SOLVER.CLIP_GRADIENTS.ENABLED asks for it.

    `value` clips each element, `norm` scales each parameter's gradient by itself (as Detectron2
    does), `full_model` scales all gradients by their common norm.

    Args:
        cfg: Read for SOLVER.CLIP_GRADIENTS.
        optimizer: Changed in place.

    Returns:
        The same optimizer.

    Raises:
        ValueError: Unknown CLIP_TYPE, or a CLIP_VALUE that is not positive.
    """
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        clipper = make_clipper(
            cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE,
            cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE,
            cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE,
        )
        add_gradient_clipping(optimizer, clipper)
    return optimizer


def make_clipper(clip_type: str, clip_value: float, norm_type: float) -> Clipper:
    """Return the function that clips the gradients of a list of parameters in place.

    Raises:
        ValueError: Unknown type, or a value that is not positive.
    """
    if clip_type not in CLIP_TYPES:
        hint = did_you_mean(str(clip_type), CLIP_TYPES)
        raise ValueError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of {', '.join(CLIP_TYPES)}; got"
            f" {clip_type!r}.{hint}"
        )
    if not clip_value > 0:
        raise ValueError(f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0, got {clip_value!r}")
    if clip_type == "value":
        return lambda parameters: clip_grad_value_(parameters, clip_value)
    if clip_type == "norm":
        return lambda parameters: _clip_each_norm(parameters, clip_value, norm_type)
    return lambda parameters: clip_grad_norm_(parameters, clip_value, norm_type)


def add_gradient_clipping(optimizer: Optimizer, clipper: Clipper) -> None:
    """Call `clipper` on all parameters of the optimizer before each of its steps.

    A step hook comes after the unscaling of a GradScaler, which is where clipping belongs, and
    leaves class and state of the optimizer as they are.
    """

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        clipper(list(_with_gradients(optimizer)))

    optimizer.register_step_pre_hook(clip)


def _with_gradients(optimizer: Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None)


@torch.no_grad()
def _clip_each_norm(parameters: list[Tensor], max_norm: float, norm_type: float) -> None:
    """Scale each gradient whose own norm exceeds `max_norm` down to it."""
    for parameter in parameters:
        clip_grad_norm_(parameter, max_norm, norm_type)
