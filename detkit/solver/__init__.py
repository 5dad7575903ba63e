"""Optimizer, learning rate schedules and gradient clipping."""

from detkit.solver.build import build_lr_scheduler, build_optimizer
from detkit.solver.gradient_clipping import maybe_add_gradient_clipping
from detkit.solver.lr_scheduler import LRMultiplier, StepWithFixedGamma, WarmupParamScheduler
from detkit.solver.param_groups import get_default_optimizer_params, reduce_param_groups

__all__ = [
    "LRMultiplier",
    "StepWithFixedGamma",
    "WarmupParamScheduler",
    "build_lr_scheduler",
    "build_optimizer",
    "get_default_optimizer_params",
    "maybe_add_gradient_clipping",
    "reduce_param_groups",
]
