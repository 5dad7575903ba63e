"""What a run logs about its model before it starts: a table of modules, a warning about norms."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tabulate import tabulate
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from detkit.checkpoint import HasInitialWeights, LoadReport
from detkit.layers import FrozenBatchNorm2d, LayerNorm2d
from detkit.layers.norm import SyncBatchNorm2d, stays_in_eval_mode

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModuleRow:
    """A module and how it trains."""

    name: str
    num_parameters: int
    num_trained: int
    norms: tuple[str, ...]
    """Kinds of norm in it, with their numbers: `16 BN train`, `4 FrozenBN`, `2 GN`."""
    lr_factors: tuple[float, ...]
    """Learning rates of its trained parameters, as factors of the optimizer's own; ascending."""
    weight_decays: tuple[float, ...]
    """Their weight decays; ascending."""


def module_rows(model: nn.Module, optimizer: Optimizer, depth: int = 3) -> list[ModuleRow]:
    """Return a row for each module, down to `depth` names: `backbone.bottom_up.res2`.

    A row covers a module with everything below it; together the rows cover the model, each
    parameter in one of them.

    Args:
        model: In the mode it will train in.
        optimizer: Its groups say learning rate and weight decay.
        depth: At least 1.
    """
    settings: dict[int, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        # The present rate may be that of a warm-up.
        factor = group.get("initial_lr", group["lr"]) / optimizer.defaults["lr"]
        for parameter in group["params"]:
            settings[id(parameter)] = (factor, group.get("weight_decay", 0.0))
    rows = []
    seen: set[int] = set()
    for name, module, is_whole in _parts(model, "", depth):
        parameters = {id(p): p for p in module.parameters(recurse=is_whole) if id(p) not in seen}
        seen |= parameters.keys()
        groups = [settings[key] for key in parameters if key in settings]
        row = ModuleRow(
            name=name,
            num_parameters=sum(p.numel() for p in parameters.values()),
            num_trained=sum(p.numel() for key, p in parameters.items() if key in settings),
            norms=_norms(module.modules() if is_whole else [module]),
            lr_factors=tuple(sorted({round(factor, 6) for factor, _ in groups})),
            weight_decays=tuple(sorted({decay for _, decay in groups})),
        )
        if row.num_parameters or row.norms:
            rows.append(row)
    return rows


def format_module_table(rows: list[ModuleRow]) -> str:
    """Return the rows as a text table with their sum."""
    cells = []
    for row in rows:
        factors = ", ".join(f"{factor:g}" for factor in row.lr_factors) or "-"
        decays = ", ".join(f"{decay:g}" for decay in row.weight_decays) or "-"
        counts = [f"{row.num_parameters:,}", f"{row.num_trained:,}"]
        cells.append([row.name, *counts, ", ".join(row.norms), factors, decays])
    parameters = sum(row.num_parameters for row in rows)
    trained = sum(row.num_trained for row in rows)
    cells.append(["all", f"{parameters:,}", f"{trained:,}", "", "", ""])
    headers = ["module", "parameters", "train", "norms", "lr x", "weight decay"]
    align = ("left", "right", "right", "left", "right", "right")
    return tabulate(
        cells, headers=headers, tablefmt="simple", colalign=align, disable_numparse=True
    )


def warn_about_random_fixed_norms(model: nn.Module, report: LoadReport | None) -> None:
    """Warn about frozen norms that were not loaded: they normalise nothing.

    Args:
        model: As it starts to train.
        report: What was loaded; None if nothing was.
    """
    loaded = () if report is None else set(report.matched)
    modules = dict(model.named_modules())
    # Parts that name published weights of their own say so themselves when they take none.
    own = tuple(f"{name}." for name, m in modules.items() if isinstance(m, HasInitialWeights))
    fixed = [name for name, m in modules.items() if isinstance(m, FrozenBatchNorm2d)]
    fixed = [name for name in fixed if not name.startswith(own)]
    random = [name for name in fixed if f"{name}.weight" not in loaded]
    if random:
        logger.warning(
            "%d of %d FrozenBN layers (%s, ...) are fixed as they were built, since no weights were"
            " loaded for them: they normalise nothing. Give weights (MODEL.WEIGHTS), or norms that"
            " learn: MODEL.RESNETS.NORM BN or GN with MODEL.BACKBONE.FREEZE_AT 0 (and nothing of"
            " the kind in SOLVER.FREEZE).",
            len(random),
            len(fixed),
            random[0],
        )


def _parts(module: nn.Module, name: str, depth: int) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield name, module, and whether its children belong to it or are parts of their own."""
    children = list(module.named_children())
    # A layer with parameters of its own, and perhaps a norm within, is one part.
    is_layer = depth == 1 and next(module.parameters(recurse=False), None) is not None
    if name and (depth == 0 or is_layer or not children):
        yield name, module, True
        return
    yield name or "(model)", module, False
    for child_name, child in children:
        yield from _parts(child, f"{name}.{child_name}" if name else child_name, depth - 1)


def _norms(modules: Iterable[nn.Module]) -> tuple[str, ...]:
    kinds = Counter(kind for kind in map(_norm_kind, modules) if kind)
    return tuple(f"{count} {kind}" for kind, count in kinds.items())


def _norm_kind(module: nn.Module) -> str:
    """Return a norm's name and, for batch norms, its mode; an empty string for other modules."""
    if isinstance(module, FrozenBatchNorm2d):
        return "FrozenBN"
    if isinstance(module, _BatchNorm):
        mode = "train" if module.training and not stays_in_eval_mode(module) else "eval"
        is_synchronized = isinstance(module, nn.SyncBatchNorm | SyncBatchNorm2d)
        return f"{'SyncBN' if is_synchronized else 'BN'} {mode}"
    if isinstance(module, nn.GroupNorm):
        return "GN"
    if isinstance(module, nn.LayerNorm | LayerNorm2d):
        return "LN"
    return type(module).__name__ if "Norm" in type(module).__name__ else ""
