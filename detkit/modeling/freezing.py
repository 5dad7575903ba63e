"""SOLVER.FREEZE: parts of a model that do not train, by the names of their tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from detkit.layers.norm import freeze_norm, keep_in_eval_mode
from detkit.utils.name_pattern import close_names, names_with


def freeze_matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze each tensor whose name matches a pattern, and return these names.

    Parameters get no gradient. A batch norm whose statistics match normalises by them in training
    too, whatever the mode of the model. One that matches completely becomes a FrozenBatchNorm2d
    with the same names.

    Args:
        model: Changed in place.
        patterns: Regular expressions, searched for in the names of the model's `state_dict`; `^`
            and `$` anchor.

    Raises:
        ValueError: A pattern is not a regular expression, or takes too long to search.
        ValueError: A pattern matches no name.
    """
    names = list(model.state_dict())
    frozen: set[str] = set()
    for pattern in patterns:
        frozen |= _matching(pattern, names, model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in frozen:
            parameter.requires_grad_(False)
    _freeze_norms(model, frozen)
    return [name for name in names if name in frozen]


def _matching(pattern: str, names: Iterable[str], model: nn.Module) -> set[str]:
    found = set(names_with(pattern, names))
    if not found:
        known = [*(name for name, _ in model.named_modules() if name), *names]
        hint = close_names(pattern, known)
        raise ValueError(f"{pattern!r} matches the name of no tensor of the model.{hint}")
    return found


def _freeze_norms(model: nn.Module, frozen: Collection[str]) -> None:
    norms: list[tuple[str, _NormBase]] = []
    # A norm that two modules share has two names, and is replaced under both.
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _NormBase):
            norms.append((name, module))
    fixed: dict[nn.Module, nn.Module] = {}
    for name, norm in norms:
        prefix = f"{name}." if name else ""
        if any(f"{prefix}{leaf}" in frozen for leaf, _ in norm.named_buffers()):
            fixed[norm] = norm
    for norm in fixed:
        # With trainable weights only the statistics are fixed.
        if any(parameter.requires_grad for parameter in norm.parameters()):
            keep_in_eval_mode(norm)
        else:
            fixed[norm] = freeze_norm(norm)
    for name, norm in norms:
        if name and fixed.get(norm, norm) is not norm:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fixed[norm])
