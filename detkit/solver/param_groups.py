"""Which parameters are optimized, and with which learning rate and weight decay each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

ParamGroup = dict[str, Any]

# Subclasses count too, so that a norm layer of the user's own derived from one of these is
# recognised.
NORM_TYPES = (
    _BatchNorm,
    _InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)


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
    """Return the parameters that train, as groups of equal settings, for any `torch.optim` optimizer.

    A setting that is None is left out of the groups, so that the optimizer's own default holds.

    Args:
        model: Parameters without `requires_grad` are left out; one that two modules share is taken
            once.
        base_lr: Learning rate of every parameter.
        weight_decay: Weight decay of every parameter.
        weight_decay_norm: Weight decay of all parameters of norm layers, if it differs.
        bias_lr_factor: Factor on the learning rate of parameters called `bias`, also those of norm
            layers.
        weight_decay_bias: Weight decay of parameters called `bias`, if it differs; wins over
            `weight_decay_norm`.
        lr_factor_func: Gives the factor on the learning rate of a parameter from its full name
            (layer-wise decay).
        overrides: Settings by a parameter's own name (`"pos_embed": {"weight_decay": 0.0}`); they
            win over everything else.

    Raises:
        ValueError: A factor on the learning rate is given without `base_lr`, `bias` is in
            `overrides` besides `bias_lr_factor` or `weight_decay_bias`, or nothing in the model
            trains.
    """
    if base_lr is None and (bias_lr_factor != 1.0 or lr_factor_func is not None):
        raise ValueError("bias_lr_factor and lr_factor_func multiply base_lr: give base_lr as well")
    by_name = _with_bias_settings(overrides or {}, base_lr, bias_lr_factor, weight_decay_bias)
    common = _without_none({"lr": base_lr, "weight_decay": weight_decay})
    for_norm = (
        common if weight_decay_norm is None else {**common, "weight_decay": weight_decay_norm}
    )

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
        raise ValueError(
            "no parameter of the model trains: every one has requires_grad=False (see"
            " MODEL.BACKBONE.FREEZE_AT, SOLVER.FREEZE)"
        )
    return reduce_param_groups(groups)


def reduce_param_groups(groups: Iterable[ParamGroup]) -> list[ParamGroup]:
    """Merge groups of equal settings, in the order in which the settings first appear.

    Optimizers update the tensors of a group in one launch: few groups are what makes a step quick
    on a GPU.
    """
    merged: dict[tuple[tuple[str, Any], ...], ParamGroup] = {}
    for group in groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        key = tuple(sorted(settings.items()))
        merged.setdefault(key, {"params": [], **settings})["params"].extend(group["params"])
    return list(merged.values())


def _with_bias_settings(
    overrides: Mapping[str, Mapping[str, float]],
    base_lr: float | None,
    bias_lr_factor: float,
    weight_decay_bias: float | None,
) -> dict[str, Mapping[str, float]]:
    """The overrides by name, joined by those of biases."""
    lr = None if base_lr is None or bias_lr_factor == 1.0 else base_lr * bias_lr_factor
    for_bias = _without_none({"lr": lr, "weight_decay": weight_decay_bias})
    if not for_bias:
        return dict(overrides)
    if "bias" in overrides:
        raise ValueError(
            "overrides has 'bias', which bias_lr_factor and weight_decay_bias set too: give one or"
            f" the other, got overrides['bias']={dict(overrides['bias'])} and {for_bias}"
        )
    return {**overrides, "bias": for_bias}


def _without_none(settings: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in settings.items() if value is not None}
