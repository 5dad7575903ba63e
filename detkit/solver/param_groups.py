"""Parameter groups of an optimizer: learning rate and weight decay of each parameter.

Factors on the learning rates come from SOLVER.LR_MULT, by name, and SOLVER.LAYER_DECAY, by depth.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from detkit.config import configurable
from detkit.utils.errors import ConfigError
from detkit.utils.name_pattern import close_names, names_with

ParamGroup = dict[str, Any]

# Subclasses included: most custom norm layers are derived from one of these. `_BatchNorm` is the
# common base of BatchNorm1d to 3d and SyncBatchNorm.
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
        """Return the stage of each parameter by name, 0 being the closest to the image."""
        ...


def get_default_optimizer_params(
    model: nn.Module,
    base_lr: float | None = None,
    weight_decay: float | None = None,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float | None = 1.0,
    weight_decay_bias: float | None = None,
    lr_factor_func: Callable[[str], float] | None = None,
    overrides: Mapping[str, Mapping[str, float]] | None = None,
) -> list[ParamGroup]:
    """Return the trainable parameters in groups of equal settings, for an optimizer of torch.

    A setting that is None is left to the default of the optimizer.

    Args:
        model: Parameters without `requires_grad` are skipped; a shared one is used once.
        base_lr: Learning rate of every parameter.
        weight_decay: Weight decay of every parameter.
        weight_decay_norm: Weight decay of all parameters of norm layers, if it differs.
        bias_lr_factor: Factor on the learning rate of parameters called `bias`, norms included.
        weight_decay_bias: Weight decay of parameters called `bias`, if it differs; overrides
            `weight_decay_norm`.
        lr_factor_func: Maps the full name of a parameter to the factor on its learning rate.
        overrides: Settings by the last part of a parameter's name (`"pos_embed": {"weight_decay":
            0.0}`); they override everything else.

    Raises:
        ValueError: A factor on the learning rate is given without `base_lr`.
        ValueError: `overrides` has `bias`, and `bias_lr_factor` or `weight_decay_bias` is given.
        ConfigError: No parameter of the model trains.
    """
    bias_lr_factor = 1.0 if bias_lr_factor is None else bias_lr_factor
    if base_lr is None and (bias_lr_factor != 1.0 or lr_factor_func is not None):
        raise ValueError("bias_lr_factor and lr_factor_func multiply base_lr: give base_lr as well")
    common = _without_none({"lr": base_lr, "weight_decay": weight_decay})
    for_norm = {**common, **_without_none({"weight_decay": weight_decay_norm})}
    bias_lr = None if base_lr is None or bias_lr_factor == 1.0 else base_lr * bias_lr_factor
    for_bias = _without_none({"lr": bias_lr, "weight_decay": weight_decay_bias})
    by_name = dict(overrides or {})
    if for_bias and "bias" in by_name:
        raise ValueError(
            "bias_lr_factor and weight_decay_bias set 'bias' too: give them or overrides['bias'],"
            f" got {for_bias} and {dict(by_name['bias'])}"
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
            "no parameter of the model trains: all have requires_grad=False (see"
            " MODEL.BACKBONE.FREEZE_AT, SOLVER.FREEZE)"
        )
    return reduce_param_groups(groups)


def _without_none(settings: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in settings.items() if value is not None}


def expand_param_groups(groups: Iterable[ParamGroup]) -> list[ParamGroup]:
    """Return a group per parameter; one in several groups has the settings of all, the last win."""
    expanded: dict[Any, ParamGroup] = {}
    for group in groups:
        for parameter in group["params"]:
            expanded.setdefault(parameter, {}).update({**group, "params": [parameter]})
    return list(expanded.values())


def reduce_param_groups(groups: Iterable[ParamGroup]) -> list[ParamGroup]:
    """Merge groups of equal settings, in the order in which the settings first appear.

    A parameter in several groups is as `expand_param_groups` has it.
    """
    # Optimizers update all tensors of a group in one kernel launch: few groups are faster on a GPU.
    merged: dict[tuple[tuple[str, Any], ...], ParamGroup] = {}
    for group in expand_param_groups(groups):
        settings = {name: value for name, value in group.items() if name != "params"}
        key = tuple(sorted(settings.items()))
        merged.setdefault(key, {"params": [], **settings})["params"].extend(group["params"])
    return list(merged.values())


@configurable(
    from_config=lambda cfg, model: {
        "model": model,
        "lr_mult": cfg.SOLVER.LR_MULT,
        "layer_decay": cfg.SOLVER.LAYER_DECAY,
        "bias_lr_factor": cfg.SOLVER.BIAS_LR_FACTOR,
    }
)
def lr_factor_func(
    model: nn.Module,
    *,
    lr_mult: Sequence[Sequence[Any]] = (),
    layer_decay: float = 1.0,
    bias_lr_factor: float = 1.0,
) -> Callable[[str], float]:
    """Return a function from the full name of a parameter to the factor on its learning rate.

    The factor is the product of the three below. Also called as `lr_factor_func(cfg, model)`.

    Args:
        model: Its trainable parameters get the factors.
        lr_mult: Pairs of a regular expression, searched in names, and a factor above 0. If several
            match a name, the last one counts.
        layer_decay: See `layer_decay_factors`.
        bias_lr_factor: Factor for parameters called `bias`.

    Raises:
        ValueError: An item of `lr_mult` is not such a pair.
        ValueError: A pattern matches no trainable parameter.
        ValueError: `layer_decay` is below 1 and the model has no stages.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    by_name: dict[str, float] = {}
    for index, pair in enumerate(lr_mult):
        pattern, factor = _checked_pair(index, pair)
        try:
            found = names_with(pattern, trained)
        except ValueError as error:
            raise ValueError(f"lr_mult[{index}]: {error}") from error
        if not found:
            raise ValueError(_found_nowhere(index, pattern, model, trained))
        by_name.update(dict.fromkeys(found, factor))
    by_depth = layer_decay_factors(model, layer_decay)

    def lr_factor(name: str) -> float:
        of_bias = bias_lr_factor if name.rpartition(".")[2] == "bias" else 1.0
        return by_name.get(name, 1.0) * by_depth.get(name, 1.0) * of_bias

    return lr_factor


def layer_decay_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factors on the learning rates of a backbone, by parameter name.

    With S stages, of which the stem is stage 0, the factor is `decay ** (S - stage)`. Parameters
    outside the backbone have the factor 1 and are not in the result.

    Source: layer decay of Bao et al. 2022, arXiv 2106.08254, appendix, by stages instead of layers.

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
            f"layer_decay is {decay}, but no backbone of the model has a method parameter_stages()"
            " -> {parameter name: stage, from 0}; add one, or use lr_mult"
        )
    return factors


def _checked_pair(index: int, pair: Any) -> tuple[str, float]:
    where = f"lr_mult[{index}]"
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(f"{where} must be a pair [regular expression, factor], got {pair!r}")
    pattern, factor = pair
    # In Python, True is an int; comparisons with NaN are False.
    is_number = isinstance(factor, int | float) and not isinstance(factor, bool)
    if not is_number or not 0 < factor < float("inf"):
        raise ValueError(
            f"{where}: the factor of {pattern!r} must be above 0, got {factor!r}; to freeze, use"
            " SOLVER.FREEZE"
        )
    return pattern, float(factor)


def _found_nowhere(index: int, pattern: str, model: nn.Module, trained: Sequence[str]) -> str:
    """Return the message for a pattern that matches no trainable parameter."""
    start = f"lr_mult[{index}]: {pattern!r} is found in the name of no parameter that trains."
    frozen = names_with(pattern, (name for name, _ in model.named_parameters()))
    if frozen:
        return f"{start} {len(frozen)} that are frozen match, such as {frozen[0]}."
    modules = [name for name, _ in model.named_modules() if name]
    return f"{start}{close_names(pattern, [*modules, *trained])}"
