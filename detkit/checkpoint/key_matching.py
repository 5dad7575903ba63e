"""Which tensor of a checkpoint goes to which tensor of a model, and a report of what did not."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# What wrappers put in front of every name: DistributedDataParallel, torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# Counts batches for a momentum that nobody uses; older checkpoints and converted ones lack it.
_NOT_LEARNED = re.compile(r"(^|\.)num_batches_tracked$")
# Constants that Detectron2 kept in its files and that follow from the config.
_CONSTANTS = re.compile(r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+)$")
# What a model has only after its first training step (RetinaNet): a file may hold it for a model
# that does not show it yet, and weights without it leave nothing unset.
_GROWN_IN_TRAINING = re.compile(r"(^|\.)loss_normalizer$")
_CAFFE2_NAME = re.compile(
    r"^[^.]+_(w|b|s|bn_s|bn_b|bn_beta|bn_gamma|bn_rm|bn_riv|bn_running_mean|bn_running_var)$"
)


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a checkpoint and of a model. Names are those of the model,
    where it has them.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the model that the checkpoint does not have."""
    unexpected: tuple[str, ...]
    """Tensors of the checkpoint that the model does not have."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> shapes in the checkpoint and in the model, where they differ. These tensors are not
    loaded.
    """
    layout: str = ""
    """Whose names the checkpoint had, if they were translated."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Name in the checkpoint -> name here, where they differ."""

    @property
    def is_complete(self) -> bool:
        """Whether every learned tensor of the model was loaded."""
        return not self.missing and not self.mismatched

    def summary(self) -> str:
        """Return the report in a few words: `loaded 293/295 tensors; re-initialised:
        roi_heads.box_predictor.*`.
        """
        unloaded = [*self.missing, *self.mismatched]
        total = len(self.matched) + len(unloaded)
        parts = [f"loaded {len(self.matched)}/{total} tensors"]
        if self.layout:
            parts.append(f"recognised {self.layout}, {len(self.renamed)} names translated")
        if unloaded:
            parts.append(
                "re-initialised: " + ", ".join(group_names(unloaded, [*self.matched, *unloaded]))
            )
        if self.mismatched:
            shown = [
                f"{name} {a} in the file, {b} in the model"
                for name, (a, b) in self.mismatched.items()
            ]
            more = f", and {len(shown) - 4} more" if len(shown) > 4 else ""
            parts.append("other shapes: " + "; ".join(shown[:4]) + more)
        if self.unexpected:
            groups = group_names(
                self.unexpected, [*self.matched, *self.mismatched, *self.unexpected]
            )
            parts.append("left over in the file: " + ", ".join(groups))
        return "; ".join(parts)


def match_weights(
    weights: Mapping[str, Any], model_state: Mapping[str, Any]
) -> tuple[dict[str, Any], LoadReport]:
    """Choose what to load: the tensors whose name and shape the model has.

    Args:
        weights: Name -> tensor, from a checkpoint.
        model_state: Name -> tensor, from the model's `state_dict`.

    Returns:
        Name -> tensor to load, and the report.
    """
    chosen: dict[str, Any] = {}
    mismatched = {}
    for name in (name for name in weights if name in model_state):
        shape_in_file, shape_in_model = _shape(weights[name]), _shape(model_state[name])
        if shape_in_file == shape_in_model:
            chosen[name] = weights[name]
        else:
            mismatched[name] = (shape_in_file, shape_in_model)
    grown = {name: value for name, value in weights.items() if _GROWN_IN_TRAINING.search(name)}
    report = LoadReport(
        matched=tuple(chosen),
        missing=tuple(n for n in model_state if n not in weights and not _is_optional(n)),
        unexpected=tuple(
            n
            for n in weights
            if n not in model_state and not _is_optional(n) and not _CONSTANTS.search(n)
        ),
        mismatched=mismatched,
    )
    return {**chosen, **grown}, report


def _is_optional(name: str) -> bool:
    return bool(_NOT_LEARNED.search(name) or _GROWN_IN_TRAINING.search(name))


def strip_wrapper_prefixes(names: Iterable[str], model_names: Iterable[str]) -> dict[str, str]:
    """Return name in the checkpoint -> name without what wrappers put in front of all of them.

    A prefix that all names of the model share as well belongs to the model and stays.
    """
    names, model_names = list(names), list(model_names)
    stripped = {name: name for name in names}
    while prefix := next(
        (p for p in _WRAPPER_PREFIXES if _all_start_with(stripped.values(), p)), ""
    ):
        if _all_start_with(model_names, prefix):
            break
        stripped = {name: short[len(prefix) :] for name, short in stripped.items()}
    return stripped


def group_names(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Name a set of tensors compactly: `a.b.*` stands for all tensors of `universe` below `a.b`.

    Args:
        names: The tensors to name, all of them in `universe`.
        universe: All tensors there are.
    """
    wanted = set(names)
    size: dict[str, int] = defaultdict(int)
    size_wanted: dict[str, int] = defaultdict(int)
    for name in universe:
        for module in _modules_above(name):
            size[module] += 1
            size_wanted[module] += name in wanted
    groups: dict[str, None] = {}  # an ordered set
    for name in universe:
        if name in wanted:
            whole = next((m for m in _modules_above(name) if size[m] == size_wanted[m]), None)
            groups[name if whole is None else f"{whole}.*" if whole else "*"] = None
    return list(groups)


def looks_like_caffe2(names: Iterable[str]) -> bool:
    """Whether most names follow Caffe2 (`res2_0_branch2a_w`), as in the files of MSRA and
    Detectron.
    """
    names = list(names)
    return sum(bool(_CAFFE2_NAME.match(name)) for name in names) > len(names) / 2


def _modules_above(name: str) -> list[str]:
    """The modules a tensor lies in, outermost first: "", "a", "a.b" for a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _all_start_with(names: Iterable[str], prefix: str) -> bool:
    names = list(names)
    return bool(names) and all(name.startswith(prefix) for name in names)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
