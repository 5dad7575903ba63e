"""`build_optimizer` and `build_lr_scheduler`: from the SOLVER keys to torch objects."""

import logging
from collections.abc import Callable
from itertools import pairwise

from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from detkit.config import CfgNode
from detkit.solver.gradient_clipping import maybe_add_gradient_clipping
from detkit.solver.lr_factors import lr_factor_func
from detkit.solver.lr_scheduler import LRMultiplier, StepWithFixedGamma, WarmupParamScheduler
from detkit.solver.param_groups import ParamGroup, get_default_optimizer_params
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build what SOLVER.OPTIMIZER names over the parameters of `model` that train, with the clipping asked for.

    Raises:
        ValueError: A SOLVER key has a value that cannot train, or nothing in the model trains.
    """
    name = cfg.SOLVER.OPTIMIZER
    if name not in _OPTIMIZERS:
        known = ", ".join(_OPTIMIZERS)
        raise ValueError(
            f"SOLVER.OPTIMIZER must be one of {known}; got"
            f" {name!r}.{did_you_mean(str(name), _OPTIMIZERS)}"
        )
    _require_positive(cfg.SOLVER.BASE_LR, "SOLVER.BASE_LR")
    optimizer = _OPTIMIZERS[name](cfg, _param_groups(cfg, model))
    return maybe_add_gradient_clipping(cfg, optimizer)


def _param_groups(cfg: CfgNode, model: nn.Module) -> list[ParamGroup]:
    factors = lr_factor_func(
        model,
        lr_mult=cfg.SOLVER.LR_MULT,
        layer_decay=cfg.SOLVER.LAYER_DECAY,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
    )
    return get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        # That of biases is among them: given by itself, it would replace the other factors, not
        # multiply them.
        lr_factor_func=factors,
    )


def _sgd(cfg: CfgNode, params: list[ParamGroup]) -> Optimizer:
    if cfg.SOLVER.NESTEROV and not cfg.SOLVER.MOMENTUM > 0:
        raise ValueError(
            f"SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0, got {cfg.SOLVER.MOMENTUM}"
        )
    return SGD(
        params,
        lr=cfg.SOLVER.BASE_LR,
        momentum=cfg.SOLVER.MOMENTUM,
        nesterov=cfg.SOLVER.NESTEROV,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )


def _adamw(cfg: CfgNode, params: list[ParamGroup]) -> Optimizer:
    betas = tuple(cfg.SOLVER.ADAMW.BETAS)
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"SOLVER.ADAMW.BETAS must be two numbers in [0, 1), got {betas}")
    _require_positive(cfg.SOLVER.ADAMW.EPS, "SOLVER.ADAMW.EPS")
    return AdamW(
        params,
        lr=cfg.SOLVER.BASE_LR,
        betas=betas,
        eps=cfg.SOLVER.ADAMW.EPS,
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
    )


_OPTIMIZERS: dict[str, Callable[[CfgNode, list[ParamGroup]], Optimizer]] = {
    "SGD": _sgd,
    "AdamW": _adamw,
}


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
    """Build the schedule that SOLVER.LR_SCHEDULER_NAME names, behind a warm-up; it steps once per iteration.

    Raises:
        ValueError: Unknown name, or a SOLVER key out of its range.
    """
    name = cfg.SOLVER.LR_SCHEDULER_NAME
    if name not in _COURSES:
        known = ", ".join(_COURSES)
        hint = did_you_mean(str(name), _COURSES)
        raise ValueError(f"SOLVER.LR_SCHEDULER_NAME must be one of {known}; got {name!r}.{hint}")
    if cfg.SOLVER.MAX_ITER < 1:
        raise ValueError(f"SOLVER.MAX_ITER must be at least 1, got {cfg.SOLVER.MAX_ITER}")
    multiplier = WarmupParamScheduler(
        _COURSES[name](cfg),
        warmup_factor=cfg.SOLVER.WARMUP_FACTOR,
        warmup_length=_warmup_length(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER),
        warmup_method=cfg.SOLVER.WARMUP_METHOD,
        rescale_interval=cfg.SOLVER.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier, max_iter=cfg.SOLVER.MAX_ITER)


def _multi_step(cfg: CfgNode) -> ParamScheduler:
    steps = _steps_within(list(cfg.SOLVER.STEPS), cfg.SOLVER.MAX_ITER)
    values = [cfg.SOLVER.GAMMA**k for k in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=cfg.SOLVER.MAX_ITER)


def _cosine(cfg: CfgNode) -> ParamScheduler:
    if not 0 <= cfg.SOLVER.BASE_LR_END <= cfg.SOLVER.BASE_LR:
        raise ValueError(
            f"SOLVER.BASE_LR_END must lie between 0 and SOLVER.BASE_LR={cfg.SOLVER.BASE_LR}, "
            f"got {cfg.SOLVER.BASE_LR_END}"
        )
    _require_positive(cfg.SOLVER.BASE_LR, "SOLVER.BASE_LR")
    return CosineParamScheduler(1.0, cfg.SOLVER.BASE_LR_END / cfg.SOLVER.BASE_LR)


def _step_with_fixed_gamma(cfg: CfgNode) -> ParamScheduler:
    if cfg.SOLVER.NUM_DECAYS < 1:
        raise ValueError(f"SOLVER.NUM_DECAYS must be at least 1, got {cfg.SOLVER.NUM_DECAYS}")
    return StepWithFixedGamma(cfg.SOLVER.NUM_DECAYS, cfg.SOLVER.GAMMA)


_COURSES: dict[str, Callable[[CfgNode], ParamScheduler]] = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineLR": _cosine,
    "WarmupStepWithFixedGammaLR": _step_with_fixed_gamma,
}


def _steps_within(steps: list[int], max_iter: int) -> list[int]:
    """The steps that come before the end of training; the others are named in a warning."""
    if any(step < 1 for step in steps) or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"SOLVER.STEPS must be positive and rise, got {steps}")
    unreached = [step for step in steps if step >= max_iter]
    if unreached:
        logger.warning(
            "SOLVER.STEPS %s are not reached: training ends at SOLVER.MAX_ITER=%d",
            unreached,
            max_iter,
        )
    return [step for step in steps if step < max_iter]


def _warmup_length(warmup_iters: int, max_iter: int) -> float:
    """The warm-up's share of the run."""
    if warmup_iters < 0:
        raise ValueError(f"SOLVER.WARMUP_ITERS must be at least 0, got {warmup_iters}")
    if warmup_iters > max_iter:
        logger.warning(
            "SOLVER.WARMUP_ITERS=%d is longer than training: it is shortened to SOLVER.MAX_ITER=%d",
            warmup_iters,
            max_iter,
        )
    return min(warmup_iters / max_iter, 1.0)


def _require_positive(value: float, key: str) -> None:
    if not value > 0:
        raise ValueError(f"{key} must be above 0, got {value!r}")
