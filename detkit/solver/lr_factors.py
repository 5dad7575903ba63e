"""Factors on the learning rates of single parameters: SOLVER.LR_MULT by name, SOLVER.LAYER_DECAY by
depth.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from detkit.utils.near_miss import did_you_mean


@runtime_checkable
class HasParameterStages(Protocol):
    """A network that knows how deep its parameters lie; detkit's backbones do."""

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter by its name: 0 for those nearest to the image."""
        ...


def lr_factor_func(
    model: nn.Module,
    *,
    lr_mult: Sequence[Sequence[Any]] = (),
    layer_decay: float = 1.0,
    bias_lr_factor: float = 1.0,
) -> Callable[[str], float]:
    """Return the function from the full name of a parameter to the factor on its learning rate: the product of all three.

    Args:
        model: Every pattern must be found in the name of a parameter of it that trains.
        lr_mult: Pairs of a regular expression, searched for in names, and a factor above 0. Where
            several are found, the last one counts.
        layer_decay: See `layer_decay_factors`.
        bias_lr_factor: For parameters called `bias`.

    Raises:
        ValueError: A pair, an expression or a factor that is none, an expression that is found in
            no name, or a decay without stages to tell apart.
    """
    by_name = _factors_by_pattern(model, lr_mult)
    by_depth = layer_decay_factors(model, layer_decay)

    def factor(name: str) -> float:
        of_bias = bias_lr_factor if name.rpartition(".")[2] == "bias" else 1.0
        return by_name.get(name, 1.0) * by_depth.get(name, 1.0) * of_bias

    return factor


def layer_decay_factors(model: nn.Module, decay: float) -> dict[str, float]:
    """Return the factors on the learning rates of a backbone: `decay` in its last stage, and once more per stage before.

    A backbone of S stages, the stem being stage 0, has `decay ** (S - stage)`; everything behind it
    has 1 and is not named. For ResNet-50 on a pyramid, S is 5: res5 gets `decay`, res4 `decay **
    2`, ..., the stem `decay ** 5`.

    Source: the decay per layer of Bao et al. 2022, arXiv 2106.08254, appendix, with stages in the
        place of layers.

    Raises:
        ValueError: The decay is not in (0, 1], or it is below 1 and nothing in the model has
            stages.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"SOLVER.LAYER_DECAY must lie in (0, 1], got {decay!r}")
    if decay == 1:
        return {}
    backbones = {name: m for name, m in model.named_modules() if isinstance(m, HasParameterStages)}
    factors: dict[str, float] = {}
    for prefix, backbone in backbones.items():
        stages = backbone.parameter_stages()
        count = max(stages.values(), default=-1) + 1
        factors.update(
            (f"{prefix}.{name}" if prefix else name, decay ** (count - at))
            for name, at in stages.items()
        )
    if not factors:
        raise ValueError(
            f"SOLVER.LAYER_DECAY is {decay}, but no backbone of the model tells its stages: give"
            " yours a method parameter_stages() -> {name of a parameter: stage, from 0}, or use"
            " SOLVER.LR_MULT"
        )
    return factors


def _factors_by_pattern(model: nn.Module, lr_mult: Sequence[Sequence[Any]]) -> dict[str, float]:
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    factors: dict[str, float] = {}
    for index, pair in enumerate(lr_mult):
        pattern, factor = _checked_pair(index, pair)
        found = [name for name in names if pattern.search(name)]
        if not found:
            raise ValueError(_found_nowhere(index, pattern.pattern, model, names))
        factors.update(dict.fromkeys(found, factor))
    return factors


def _checked_pair(index: int, pair: Any) -> tuple[re.Pattern[str], float]:
    key = f"SOLVER.LR_MULT[{index}]"
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(f"{key} must be a pair [regular expression, factor], got {pair!r}")
    pattern, factor = pair
    if (
        isinstance(factor, bool)
        or not isinstance(factor, int | float)
        or not 0 < factor < float("inf")
    ):
        raise ValueError(
            f"{key}: the factor of {pattern!r} must be above 0, got {factor!r} (SOLVER.FREEZE"
            " freezes)"
        )
    try:
        return re.compile(pattern), float(factor)
    except re.error as error:
        raise ValueError(f"{key}: {pattern!r} is not a regular expression: {error}") from error


def _found_nowhere(index: int, pattern: str, model: nn.Module, trained: Iterable[str]) -> str:
    plain = re.sub(r"\\(.)", r"\1", pattern).strip("^$.*")
    start = (
        f"SOLVER.LR_MULT[{index}]: {pattern!r} is found in the name of no parameter that trains."
    )
    frozen = [name for name, _ in model.named_parameters() if re.search(pattern, name)]
    if frozen:
        return f"{start} {len(frozen)} that are frozen have it, such as {frozen[0]}."
    modules = _prefixes(trained)
    return f"{start}{did_you_mean(plain, [*modules, *trained])}"


def _prefixes(names: Iterable[str]) -> Mapping[str, None]:
    """The names of all modules that parameters lie in."""
    parts = (name.split(".") for name in names)
    return dict.fromkeys(".".join(p[:depth]) for p in parts for depth in range(1, len(p)))
