"""Optimizer, learning rate schedules and gradient clipping."""

from detkit.solver.build import (
    build_lr_scheduler,
    build_optimizer,
    maybe_add_gradient_clipping,
)
from detkit.solver.lr_scheduler import (
    LRMultiplier,
    StepWithFixedGamma,
    WarmupCosineLR,
    WarmupMultiStepLR,
    WarmupParamScheduler,
)
from detkit.solver.param_groups import (
    HasParameterStages,
    get_default_optimizer_params,
    layer_decay_factors,
    lr_factor_func,
    reduce_param_groups,
)

__all__ = [
    "HasParameterStages",
    "LRMultiplier",
    "StepWithFixedGamma",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "WarmupParamScheduler",
    "build_lr_scheduler",
    "build_optimizer",
    "get_default_optimizer_params",
    "layer_decay_factors",
    "lr_factor_func",
    "maybe_add_gradient_clipping",
    "reduce_param_groups",
]
