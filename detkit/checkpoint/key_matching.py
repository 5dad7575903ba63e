"""Matching of the tensors of a checkpoint with those of a model, and a report of the result."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from detkit.checkpoint.safe_load import CheckpointError

# Prefixes of all names in DistributedDataParallel and torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
# The batch count of norms without a momentum, which are rare; old and converted files lack it.
_NOT_LEARNED = re.compile(r"(^|\.)num_batches_tracked$")
# Constants that Detectron2 saves; here they follow from the config.
_CONSTANTS = re.compile(r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+)$")
# RetinaNet creates it in the first training step: either side may lack it.
_GROWN_IN_TRAINING = re.compile(r"(^|\.)loss_normalizer$")
# Convolutions of detkit's ResNets, and of those of torchvision and timm.
_RESNET_CONV = re.compile(r"(.*\b(?:res[2-6]|layer[1-4]))\.(\d+)\.conv(\d)\.weight")

# Weights and statistics of trained networks stay below 1e6.
_HUGE = 1e10
# Modules in a line of the report.
_MAX_LISTED = 6


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a checkpoint and of a model matched, by the names of the model."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    """Tensors of the model that are not in the checkpoint."""
    unexpected: tuple[str, ...]
    """Tensors of the checkpoint that are not in the model."""
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Name -> shapes in the checkpoint and in the model, if they differ; these are not loaded."""
    layout: str = ""
    """Layout of the checkpoint, if its names were translated."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Name in the checkpoint -> different name in the model."""

    @property
    def is_complete(self) -> bool:
        """Return whether every learned tensor of the model was loaded."""
        return not self.missing and not self.mismatched

    def as_loaded(self, missing: Sequence[str], unexpected: Sequence[str]) -> LoadReport:
        """Return the report after modules have renamed tensors of older versions themselves.

        Args:
            missing: Names that `load_state_dict` missed, given what was left over too.
            unexpected: Names that it did not use.
        """
        without, unused = set(missing), set(unexpected)
        wanted = [*self.matched, *self.missing]
        return dataclasses.replace(
            self,
            matched=tuple(name for name in wanted if name not in without),
            missing=tuple(name for name in wanted if name in without),
            unexpected=tuple(name for name in self.unexpected if name in unused),
        )

    def summary(self) -> str:
        """Return the report in short: `loaded 2/3 tensors (66%); re-initialised: head.fc.*`.

        `by_module` says for which modules, and `details` lists all names.
        """
        unloaded = [*self.missing, *self.mismatched]
        total = len(self.matched) + len(unloaded)
        parts = [f"loaded {len(self.matched)}/{total} tensors"]
        if unloaded:
            parts[0] += f" ({100 * len(self.matched) // total}%)"
        if self.layout:
            parts.append(f"recognised {self.layout}, {len(self.renamed)} names translated")
        if unloaded:
            parts.append(
                "re-initialised: " + _first(group_names(unloaded, [*self.matched, *unloaded]))
            )
        if self.mismatched:
            first, *others = self._other_shapes()
            more = f", and {len(others)} more" if others else ""
            parts.append(f"other shapes: {first}{more}")
        if self.unexpected:
            groups = group_names(
                self.unexpected, [*self.matched, *self.mismatched, *self.unexpected]
            )
            parts.append("left over in the file: " + _first(groups))
        return "; ".join(parts)

    def _other_shapes(self) -> list[str]:
        return [
            f"{name} {in_file} in the file, {in_model} in the model"
            for name, (in_file, in_model) in self.mismatched.items()
        ]

    def by_module(self) -> str:
        """Return a line per module of the model: `backbone.bottom_up  loaded 265/265 (100%)`."""
        total: Counter[str] = Counter()
        loaded: Counter[str] = Counter()
        matched = set(self.matched)
        for name in [*self.matched, *self.missing, *self.mismatched]:
            module = ".".join(name.split(".")[:-1][:2])
            total[module] += 1
            loaded[module] += name in matched
        return "\n".join(
            f"{module or '(model)'}  loaded {loaded[module]}/{count}"
            f" ({100 * loaded[module] // count}%)"
            for module, count in sorted(total.items())
        )

    def details(self) -> str:
        """Return `by_module`, and all names that did not match: for a file, not for a screen."""
        lists = {"missing": self.missing, "other shape": self._other_shapes()}
        lists["left over in the file"] = self.unexpected
        lines = [f"{what}: {name}" for what, names in lists.items() for name in names]
        return "\n".join([self.by_module(), *lines])


def match_weights(
    weights: Mapping[str, Any], model_state: Mapping[str, Any]
) -> tuple[dict[str, Any], LoadReport]:
    """Select the tensors of a checkpoint that have the name and shape of one in the model.

    Args:
        weights: Name -> tensor, from a checkpoint.
        model_state: Name -> tensor, from the model's `state_dict`.

    Returns:
        Name -> tensor to load, and the report.
    """
    chosen: dict[str, Any] = {}
    mismatched = {}
    for name in weights:
        if name not in model_state:
            continue
        shape_in_file, shape_in_model = _shape(weights[name]), _shape(model_state[name])
        if shape_in_file == shape_in_model:
            chosen[name] = weights[name]
        else:
            mismatched[name] = (shape_in_file, shape_in_model)
    missing = [n for n in model_state if n not in weights and not _is_optional(n)]
    unexpected = [
        name
        for name in weights
        if name not in model_state and not _is_optional(name) and not _CONSTANTS.search(name)
    ]
    report = LoadReport(tuple(chosen), tuple(missing), tuple(unexpected), mismatched)
    grown = {name: value for name, value in weights.items() if _GROWN_IN_TRAINING.search(name)}
    return {**chosen, **grown}, report


def unusual_values(weights: Mapping[str, Any], model_state: Mapping[str, Any]) -> list[str]:
    """Return for each tensor with values that training does not give its name and what it holds.

    Args:
        weights: Name -> tensor that is loaded.
        model_state: Name -> tensor, from the model's `state_dict`.
    """
    found = []
    for name, value in weights.items():
        if name not in model_state or not isinstance(value, Tensor) or not value.numel():
            continue
        if not model_state[name].is_floating_point():
            continue
        if not value.is_floating_point():
            found.append(f"{name} is of type {str(value.dtype).removeprefix('torch.')}")
            continue
        # The extrema are NaN if any value is, and a pass over the values is all they cost.
        wide = value.detach() if value.element_size() >= 4 else value.detach().float()
        low, high = (float(extremum) for extremum in wide.aminmax())
        if not math.isfinite(low) or not math.isfinite(high):
            count = value.numel() - int(value.isfinite().sum())
            found.append(f"{name} has {count} of {value.numel()} values that are NaN or infinite")
        elif max(-low, high) > _HUGE:
            found.append(f"{name} has values up to {max(-low, high):.1e}")
    return found


def _is_optional(name: str) -> bool:
    return bool(_NOT_LEARNED.search(name) or _GROWN_IN_TRAINING.search(name))


def strip_wrapper_prefixes(names: Iterable[str], model_names: Iterable[str]) -> dict[str, str]:
    """Map the names of a checkpoint to names without the prefixes of DDP and torch.compile.

    A prefix that all names of the model share is kept, as it belongs to the model.
    """
    model_names = list(model_names)
    stripped = {name: name for name in names}
    while True:  # wrappers may be nested
        prefix = next((p for p in _WRAPPER_PREFIXES if _all_start_with(stripped.values(), p)), "")
        if not prefix or _all_start_with(model_names, prefix):
            return stripped
        stripped = {name: short[len(prefix) :] for name, short in stripped.items()}


def group_names(names: Iterable[str], universe: Iterable[str]) -> list[str]:
    """Return a compact list of tensor names: `a.b.*` stands for all of `universe` below `a.b`.

    Args:
        names: The names to list, all of them in `universe`.
        universe: All names.

    Example:
        >>> from detkit.checkpoint.key_matching import group_names
        >>> group_names(["a.b.x", "a.b.y"], ["a.b.x", "a.b.y", "a.c.x"])
        ['a.b.*']
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
            group = name
            for module in _modules_above(name):
                if size[module] == size_wanted[module]:  # the outermost module that is complete
                    group = f"{module}.*" if module else "*"
                    break
            groups[group] = None
    return list(groups)


def check_depth(names: Iterable[str], model_names: Iterable[str], path: str) -> None:
    """Raise a CheckpointError if the ResNet in a file is not as deep as the model's.

    Args:
        names: Of the tensors in the file.
        model_names: Of the tensors of the model.
        path: The file, for the message.
    """
    # A ResNet-101 has all names of a ResNet-50, with the same shapes: the weights of one load into
    # the other, and the features are meaningless.
    if difference := depth_difference(names, model_names):
        raise CheckpointError(
            f"{path} holds weights of a ResNet of another depth: {difference}. Set"
            " MODEL.RESNETS.DEPTH (or the name in MODEL.TORCHVISION or MODEL.TIMM) to match."
        )


def depth_difference(names: Iterable[str], model_names: Iterable[str]) -> str:
    """Return how the depths of two ResNets differ, or "" if they are equal or one is missing."""
    in_file, in_model = _stages(names), _stages(model_names)
    for stage, (blocks_in_model, convs_in_model) in in_model.items():
        # Blocks that the model does not have keep their short name: res4.6 and backbone.res4.0.
        found = [in_file[name] for name in in_file if f".{stage}".endswith(f".{name}")]
        blocks, convs = max((n for n, _ in found), default=0), max((n for _, n in found), default=0)
        if found and (blocks, convs) != (blocks_in_model, convs_in_model):
            return (
                f"{stage} has {blocks} blocks of {convs} convolutions in the file,"
                f" {blocks_in_model} of {convs_in_model} in the model"
            )
    return ""


def _stages(names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return the number of blocks, and of convolutions in a block, by stage."""
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        match = _RESNET_CONV.fullmatch(name)
        if match is not None:
            blocks, convs = found.get(match[1], (0, 0))
            found[match[1]] = max(blocks, int(match[2]) + 1), max(convs, int(match[3]))
    return found


def _modules_above(name: str) -> list[str]:
    """Return the modules that contain a tensor: "", "a", "a.b" for a.b.weight."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _all_start_with(names: Iterable[str], prefix: str) -> bool:
    names = list(names)
    return bool(names) and all(name.startswith(prefix) for name in names)


def _first(names: list[str]) -> str:
    more = len(names) - _MAX_LISTED
    return ", ".join(names[:_MAX_LISTED]) + (f", and {more} more" if more > 0 else "")


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
