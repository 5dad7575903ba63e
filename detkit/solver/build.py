"""`build_optimizer` and `build_lr_scheduler`: torch objects from the SOLVER keys."""

import functools
import logging
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import pairwise
from typing import Any, overload

from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW, Optimizer

from detkit.config import SHARE, CfgNode
from detkit.solver.lr_scheduler import LRMultiplier, StepWithFixedGamma, WarmupParamScheduler
from detkit.solver.param_groups import get_default_optimizer_params, lr_factor_func
from detkit.utils.errors import ConfigError
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)

OPTIMIZERS = ("SGD", "AdamW")
LR_SCHEDULERS = ("WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR")
CLIP_TYPES = ("value", "norm", "full_model")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build the optimizer of SOLVER.OPTIMIZER for the trainable parameters of a model.

    Raises:
        ConfigError: A SOLVER key is out of range, or no parameter of the model trains.
    """
    solver = cfg.SOLVER
    _require_choice(solver.OPTIMIZER, OPTIMIZERS, "SOLVER.OPTIMIZER")
    _require_positive(solver.BASE_LR, "SOLVER.BASE_LR")
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        # Includes BIAS_LR_FACTOR: the argument `bias_lr_factor` would replace the other factors on
        # biases instead of multiplying them.
        lr_factor_func=lr_factor_func(cfg, model),
        overrides=_weight_decay_overrides(solver.WEIGHT_DECAY_OVERRIDES, model),
    )
    if solver.OPTIMIZER == "SGD":
        # torch has these checks too, but its messages do not name the keys.
        if solver.NESTEROV and not solver.MOMENTUM > 0:
            raise ConfigError(
                f"SOLVER.NESTEROV needs SOLVER.MOMENTUM above 0, got {solver.MOMENTUM}"
            )
        optimizer: Optimizer = SGD(
            groups,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
        )
    else:
        betas = tuple(solver.ADAMW.BETAS)
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"SOLVER.ADAMW.BETAS must be two numbers in [0, 1), got {betas}")
        _require_positive(solver.ADAMW.EPS, "SOLVER.ADAMW.EPS")
        optimizer = AdamW(
            groups,
            lr=solver.BASE_LR,
            betas=betas,
            eps=solver.ADAMW.EPS,
            weight_decay=solver.WEIGHT_DECAY,
        )
    return maybe_add_gradient_clipping(cfg, optimizer)


def _weight_decay_overrides(pairs: Any, model: nn.Module) -> dict[str, dict[str, float]]:
    """Return the overrides of `get_default_optimizer_params` for SOLVER.WEIGHT_DECAY_OVERRIDES."""
    known = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    overrides = {}
    for index, pair in enumerate(pairs):
        where = f"SOLVER.WEIGHT_DECAY_OVERRIDES[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ConfigError(
                f"{where} must be a pair [last part of a name, weight decay]: got {pair!r}"
            )
        name, decay = pair
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise ConfigError(f"{where}: no parameter of the model is called {name!r}.{hint}")
        if isinstance(decay, bool) or not isinstance(decay, int | float) or not decay >= 0:
            raise ConfigError(f"{where}: the weight decay must be at least 0, got {decay!r}")
        overrides[name] = {"weight_decay": float(decay)}
    return overrides


class GradientClipType(Enum):
    """Values of SOLVER.CLIP_GRADIENTS.CLIP_TYPE."""

    VALUE = "value"
    NORM = "norm"
    FULL_MODEL = "full_model"


@overload
def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: Optimizer) -> Optimizer: ...
@overload
def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: type[Optimizer]) -> type[Optimizer]: ...
def maybe_add_gradient_clipping(cfg: CfgNode, optimizer: Any) -> Any:
    """Clip gradients before each step of the optimizer if SOLVER.CLIP_GRADIENTS.ENABLED is set.

    As in Detectron2, `value` clips each element, `norm` the norm of each parameter's gradient, and
    `full_model` the norm of all gradients together.

    Args:
        cfg: Read for SOLVER.CLIP_GRADIENTS.
        optimizer: Changed in place; or a class, whose instances are to clip.

    Returns:
        The same optimizer; of a class, a subclass.

    Raises:
        ConfigError: CLIP_TYPE is unknown, or CLIP_VALUE is not positive.
    """
    settings = cfg.SOLVER.CLIP_GRADIENTS
    if not settings.ENABLED:
        return optimizer
    if isinstance(optimizer, type):
        kind: type[Optimizer] = optimizer

        def build(self: Optimizer, *args: Any, **kwargs: Any) -> None:
            kind.__init__(self, *args, **kwargs)
            maybe_add_gradient_clipping(cfg, self)

        return type(f"{kind.__name__}WithGradientClip", (kind,), {"__init__": build})
    clip_gradients, clips_each = _create_gradient_clipper(settings), settings.CLIP_TYPE == "norm"

    def clip(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        parameters: list[Tensor] = []
        for group in optimizer.param_groups:
            parameters += [p for p in group["params"] if p.grad is not None]
        for clipped in parameters if clips_each else [parameters]:
            clip_gradients(clipped)

    # A pre-hook of the step runs after GradScaler has unscaled the gradients, and keeps class and
    # state of the optimizer; Detectron2 creates a subclass instead.
    optimizer.register_step_pre_hook(clip)
    return optimizer


def _create_gradient_clipper(settings: CfgNode) -> Callable[[Tensor | Iterable[Tensor]], Any]:
    """Return what clips the gradient of a parameter, or those of several together.

    Args:
        settings: The group SOLVER.CLIP_GRADIENTS, read now.

    Raises:
        ConfigError: See `maybe_add_gradient_clipping`.
    """
    _require_choice(settings.CLIP_TYPE, CLIP_TYPES, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE")
    _require_positive(settings.CLIP_VALUE, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE")
    # Read once: a step must not depend on a config that is edited later.
    if settings.CLIP_TYPE == "value":
        return functools.partial(clip_grad_value_, clip_value=settings.CLIP_VALUE)
    return functools.partial(
        clip_grad_norm_, max_norm=settings.CLIP_VALUE, norm_type=settings.NORM_TYPE
    )


def build_lr_scheduler(cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
    """Build the schedule of SOLVER.LR_SCHEDULER_NAME, with a warm-up; it steps per iteration.

    Raises:
        ConfigError: The name is unknown, or a SOLVER key is out of range.
    """
    solver = cfg.SOLVER
    name, max_iter = solver.LR_SCHEDULER_NAME, solver.MAX_ITER
    _require_choice(name, LR_SCHEDULERS, "SOLVER.LR_SCHEDULER_NAME")
    _require_choice(solver.WARMUP_METHOD, ("linear", "constant"), "SOLVER.WARMUP_METHOD")
    if max_iter < 1:
        raise ConfigError(f"SOLVER.MAX_ITER must be at least 1, got {max_iter}")
    warmup_iters = _iterations(solver.WARMUP_ITERS, max_iter, "SOLVER.WARMUP_ITERS")
    if warmup_iters < 0:
        raise ConfigError(f"SOLVER.WARMUP_ITERS must be at least 0, got {solver.WARMUP_ITERS}")
    if max_iter < warmup_iters:
        logger.warning(
            "SOLVER.WARMUP_ITERS=%d is longer than training: it is shortened to SOLVER.MAX_ITER=%d",
            warmup_iters,
            max_iter,
        )
    # fvcore's schedulers work on progress in [0, 1], so the warm-up becomes a fraction of the run.
    multiplier = WarmupParamScheduler(
        _SCHEDULES[name](cfg),
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=min(warmup_iters / max_iter, 1.0),
        warmup_method=solver.WARMUP_METHOD,
        rescale_interval=solver.RESCALE_INTERVAL,
    )
    return LRMultiplier(optimizer, multiplier, max_iter=max_iter)


def _iterations(length: int | str, max_iter: int, key: str) -> float:
    """Return a length in iterations; '0.5%' is a share of the run, not rounded."""
    if not isinstance(length, str):
        return length
    match = SHARE.fullmatch(length)
    if match is None:
        raise ConfigError(f"{key} must be iterations, or a share such as '0.5%': got {length!r}")
    return float(match[1]) / 100 * max_iter


def _multi_step(cfg: CfgNode) -> ParamScheduler:
    max_iter = cfg.SOLVER.MAX_ITER
    steps = [round(_iterations(step, max_iter, "SOLVER.STEPS")) for step in cfg.SOLVER.STEPS]
    if any(step < 1 for step in steps) or any(a >= b for a, b in pairwise(steps)):
        raise ConfigError(f"SOLVER.STEPS must be positive and increasing, got {steps}")
    # fvcore refuses milestones after the end, which a short trial run of a long schedule has.
    unreached = [step for step in steps if step >= max_iter]
    if unreached:
        logger.warning(
            "SOLVER.STEPS %s have no effect: training ends at SOLVER.MAX_ITER=%d",
            unreached,
            max_iter,
        )
    steps = [step for step in steps if step < max_iter]
    values = [cfg.SOLVER.GAMMA**k for k in range(len(steps) + 1)]
    return MultiStepParamScheduler(values, milestones=steps, num_updates=max_iter)


def _cosine(cfg: CfgNode) -> ParamScheduler:
    base_lr, end = cfg.SOLVER.BASE_LR, cfg.SOLVER.BASE_LR_END
    if not 0 <= end <= base_lr:
        raise ConfigError(
            f"SOLVER.BASE_LR_END must lie between 0 and SOLVER.BASE_LR={base_lr}, got {end}"
        )
    _require_positive(base_lr, "SOLVER.BASE_LR")
    return CosineParamScheduler(1.0, end / base_lr)


def _step_with_fixed_gamma(cfg: CfgNode) -> ParamScheduler:
    if cfg.SOLVER.NUM_DECAYS < 1:
        raise ConfigError(f"SOLVER.NUM_DECAYS must be at least 1, got {cfg.SOLVER.NUM_DECAYS}")
    return StepWithFixedGamma(cfg.SOLVER.NUM_DECAYS, cfg.SOLVER.GAMMA)


_SCHEDULES: dict[str, Callable[[CfgNode], ParamScheduler]] = {
    "WarmupMultiStepLR": _multi_step,
    "WarmupCosineLR": _cosine,
    "WarmupStepWithFixedGammaLR": _step_with_fixed_gamma,
}


# `KeySpec` checks these limits while merging; `cfg.SOLVER.BASE_LR = 0` in code bypasses it.
def _require_choice(value: Any, choices: tuple[str, ...], key: str) -> None:
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ConfigError(f"{key} must be one of {', '.join(choices)}; got {value!r}.{hint}")


def _require_positive(value: float, key: str) -> None:
    if not value > 0:  # not `value <= 0`, which is False for NaN
        raise ConfigError(f"{key} must be above 0, got {value!r}")
