"""Which parameters are optimized, and with which learning rate and weight decay each.

Factors on the learning rates come from SOLVER.LR_MULT, by name, and SOLVER.LAYER_DECAY, by depth.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from detkit.config import CfgNode, configurable
from detkit.utils.errors import ConfigError
from detkit.utils.near_miss import did_you_mean

ParamGroup = dict[str, Any]

# Their subclasses too: a norm layer of the user's own is mostly derived from one of these.
NORM_TYPES = (
    _BatchNorm,
    _InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


@runtime_checkable
class HasParameterStages(Protocol):
    """A network that knows the depth of its parameters, as detkit's backbones do."""

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter by its name: 0 for those nearest to the image."""
        ...


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[ParamGroup]:
    """Return the parameters that train, in groups of equal settings, for an optimizer of torch.

    A setting that is None is left out of the groups, so that the optimizer's default holds.

    Args:
        model: Parameters without `requires_grad` are left out; a shared one is taken once.
        base_lr: Learning rate of every parameter.
        weight_decay: Weight decay of every parameter.
        weight_decay_norm: Weight decay of all parameters of norm layers, if it differs.
        bias_lr_factor: Factor on the learning rate of parameters called `bias`, those of norm
            layers included.
        weight_decay_bias: Weight decay of parameters called `bias`, if it differs; wins over
            `weight_decay_norm`.
        lr_factor_func: From the full name of a parameter to the factor on its learning rate.
        overrides: Settings by a parameter's own name (`"pos_embed": {"weight_decay": 0.0}`); they
            win over everything else.

    Raises:
        ValueError: A factor on the learning rate is given without `base_lr`.
        ValueError: `bias` is in `overrides` besides `bias_lr_factor` or `weight_decay_bias`.
        ConfigError: No parameter of the model trains.
    """
    if base_lr is None and (bias_lr_factor != 1.0 or lr_factor_func is not None):
        raise ValueError("bias_lr_factor and lr_factor_func multiply base_lr: give base_lr as well")
    common = _without_none({"lr": base_lr, "weight_decay": weight_decay})
    for_norm = {**common, **_without_none({"weight_decay": weight_decay_norm})}
    bias_lr = None if base_lr is None or bias_lr_factor == 1.0 else base_lr * bias_lr_factor
    for_bias = _without_none({"lr": bias_lr, "weight_decay": weight_decay_bias})
    by_name = dict(overrides or {})
    if for_bias and "bias" in by_name:
        raise ValueError(
            "overrides has 'bias', which bias_lr_factor and weight_decay_bias set too: give one or"
            f" the other, got overrides['bias']={dict(by_name['bias'])} and {for_bias}"
        )
    if for_bias:
        by_name["bias"] = for_bias

    groups: list[ParamGroup] = []
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            settings = dict(for_norm if isinstance(module, NORM_TYPES) else common)
            if lr_factor_func is not None:
                settings["lr"] *= lr_factor_func(f"{module_name}.{name}" if module_name else name)
            settings.update(by_name.get(name, {}))
            groups.append({"params": [parameter], **settings})
    if not groups:
        raise ConfigError(
            "no parameter of the model trains: every one has requires_grad=False (see"
            " MODEL.BACKBONE.FREEZE_AT, SOLVER.FREEZE)"
        )
    return reduce_param_groups(groups)


def _without_none(settings: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in settings.items() if value is not None}


def reduce_param_groups(groups: Iterable[ParamGroup]) -> list[ParamGroup]:
    """Merge groups of equal settings, in the order in which the settings first appear."""
    # Optimizers update all tensors of a group in one launch: a step on a GPU is fast with few
    # groups.
    merged: dict[tuple[tuple[str, Any], ...], ParamGroup] = {}
    for group in groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        key = tuple(sorted(settings.items()))
        merged.setdefault(key, {"params": [], **settings})["params"].extend(group["params"])
    return list(merged.values())


def _lr_factors_from_config(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    return {
        "model": model,
        "lr_mult": cfg.SOLVER.LR_MULT,
        "layer_decay": cfg.SOLVER.LAYER_DECAY,
        "bias_lr_factor": cfg.SOLVER.BIAS_LR_FACTOR,
    }


@configurable(from_config=_lr_factors_from_config)
def lr_factor_func(
    model: nn.Module,
    *,
    lr_mult: Sequence[Sequence[Any]] = (),
    layer_decay: float = 1.0,
    bias_lr_factor: float = 1.0,
) -> Callable[[str], float]:
    """Return the function from the full name of a parameter to the factor on its learning rate.

    The factor is the product of the three below. Also called as `lr_factor_func(cfg, model)`.

    Args:
        model: Each pattern must be found in the name of one of its parameters that train.
        lr_mult: Pairs of a regular expression, searched in names, and a factor above 0. Where
            several are found, the last one counts.
        layer_decay: See `layer_decay_factors`.
        bias_lr_factor: For parameters called `bias`.

    Raises:
        ValueError: An item of `lr_mult` is not such a pair.
        ValueError: A pattern is found in no name.
        ValueError: `layer_decay` is below 1 and the model has no stages.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    by_name: dict[str, float] = {}
    for index, pair in enumerate(lr_mult):
        pattern, factor = _checked_pair(index, pair)
        found = [name for name in trained if pattern.search(name)]
        if not found:
            raise ValueError(_found_nowhere(index, pattern.pattern, model, trained))
        by_name.update(dict.fromkeys(found, factor))
    by_depth = layer_decay_factors(model, layer_decay)

    def lr_factor(name: str) -> float:
        of_bias = bias_lr_factor if name.rpartition(".")[2] == "bias" else 1.0
        return by_name.get(name, 1.0) * by_depth.get(name, 1.0) * of_bias

    return lr_factor


def layer_decay_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factors on the learning rates of a backbone, by the name of the parameter.

    In a backbone of S stages, the stem being stage 0, they are `decay ** (S - stage)`. Everything
    behind it has the factor 1 and is left out.

    Source: the decay per layer of Bao et al. 2022, arXiv 2106.08254, appendix, with stages in the
        place of layers.

    Raises:
        ValueError: `decay` is not in (0, 1].
        ValueError: `decay` is below 1 and no part of the model has stages.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer_decay must lie in (0, 1], got {decay!r}")
    if decay == 1:
        return {}
    factors: dict[str, float] = {}
    for prefix, backbone in model.named_modules():
        if not isinstance(backbone, HasParameterStages):
            continue
        stages = backbone.parameter_stages()
        # ResNet-50 on a pyramid has 5: res5 gets `decay`, res4 `decay ** 2`, the stem `decay ** 5`.
        count = max(stages.values(), default=-1) + 1
        for name, stage in stages.items():
            factors[f"{prefix}.{name}" if prefix else name] = decay ** (count - stage)
    if not factors:
        raise ValueError(
            f"layer_decay is {decay}, but no backbone of the model has stages: give yours a method"
            " parameter_stages() -> {name of a parameter: stage, from 0}, or use lr_mult"
        )
    return factors


def _checked_pair(index: int, pair: Any) -> tuple[re.Pattern[str], float]:
    where = f"lr_mult[{index}]"
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(f"{where} must be a pair [regular expression, factor], got {pair!r}")
    pattern, factor = pair
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 0 < factor < float("inf"):
        raise ValueError(
            f"{where}: the factor of {pattern!r} must be above 0, got {factor!r} (SOLVER.FREEZE"
            " freezes)"
        )
    try:
        return re.compile(pattern), float(factor)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is not a regular expression: {error}") from error


def _found_nowhere(index: int, pattern: str, model: nn.Module, trained: Sequence[str]) -> str:
    """Return the message for a pattern without a parameter: frozen ones, or near misses."""
    start = f"lr_mult[{index}]: {pattern!r} is found in the name of no parameter that trains."
    frozen = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    if frozen:
        return f"{start} {len(frozen)} that are frozen have it, such as {frozen[0]}."
    modules: dict[str, None] = {}  # an ordered set of all modules that hold parameters
    for name in trained:
        parts = name.split(".")
        modules.update(dict.fromkeys(".".join(parts[:depth]) for depth in range(1, len(parts))))
    # Near misses compare names: without the marks of a regular expression.
    plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$.*")
    return f"{start}{did_you_mean(plain, [*modules, *trained])}"
