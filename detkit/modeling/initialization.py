"""MODEL.INIT: parameters of a model drawn anew, by their names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from detkit.utils.name_pattern import close_names, names_with
from detkit.utils.text import did_you_mean

# Those of torch.nn.init that fill a tensor in place and need nothing else.
INITIALIZERS: dict[str, Callable[..., Any]] = {
    name: getattr(nn.init, f"{name}_")
    for name in (
        "constant",
        "kaiming_normal",
        "kaiming_uniform",
        "normal",
        "ones",
        "orthogonal",
        "trunc_normal",
        "uniform",
        "xavier_normal",
        "xavier_uniform",
        "zeros",
    )
}


def initialize_matching(model: nn.Module, entries: Sequence[Mapping[str, Any]]) -> None:
    """Fill the parameters that the entries name, one entry after the other.

    Args:
        model: Changed in place.
        entries: Each with `names`, a regular expression that is searched for in the names of
            parameters, `type`, one of `INITIALIZERS`, and the arguments of that function.

    Raises:
        ValueError: An entry is malformed, its names match no parameter, or its initialiser cannot
            fill one of them.
    """
    parameters = dict(model.named_parameters())
    for number, entry in enumerate(entries):
        fill, arguments = _initializer(entry, f"entry {number}")
        found = names_with(entry["names"], parameters)
        if not found:
            hint = close_names(entry["names"], list(parameters))
            raise ValueError(f"entry {number}: {entry['names']!r} matches no parameter.{hint}")
        for name in found:
            try:
                fill(parameters[name], **arguments)
            except (ValueError, RuntimeError, TypeError) as error:
                shape = tuple(parameters[name].shape)
                raise ValueError(f"entry {number}: {name} of shape {shape}: {error}") from error


def _initializer(entry: Any, where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("names"), str):
        raise ValueError(f"{where} must be a mapping with names and type: got {entry!r}")
    arguments = {key: value for key, value in entry.items() if key not in ("names", "type")}
    kind = entry.get("type")
    if kind not in INITIALIZERS:
        hint = did_you_mean(str(kind), INITIALIZERS)
        raise ValueError(f"{where}: type must be one of {list(INITIALIZERS)}: got {kind!r}.{hint}")
    fill = INITIALIZERS[kind]
    known = [name for name in inspect.signature(fill).parameters if name != "tensor"]
    unknown = set(arguments) - set(known)
    if unknown:
        raise ValueError(f"{where}: {kind} has no argument {sorted(unknown)}; it has {known}")
    return fill, arguments
