"""From what a file or a command line says to a value of the type that the setting has."""

import copy
from ast import literal_eval
from typing import Any

from detkit.utils.errors import ConfigError

_EXPECTED = {list: "a list", tuple: "a list", str: "a string", int: "an int"}
_SCALARS = (int, float, str, bool, type(None))


def decode(value: Any, present: Any) -> Any:
    """Read text as a Python literal, unless the setting is itself text and the literal is something
    else.
    """
    if not isinstance(value, str):
        return value
    try:
        decoded = literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return value
    return (
        value if isinstance(present, str) and not isinstance(decoded, str | type(None)) else decoded
    )


def coerce(value: Any, present: Any, full_key: str, where: str) -> Any:
    """Return the value in the type of the present one, or explain what was expected."""
    if isinstance(value, list | tuple) and isinstance(present, list | tuple):
        require_plain(value, full_key, where)
        return _as_nested(value, present)
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        type(value) is type(present)
        or (present is None and isinstance(value, _SCALARS))
        or value is None
    ):
        return value
    expected = _EXPECTED.get(type(present), f"a {type(present).__name__}")
    hint = (
        f" Write [{value!r}]."
        if isinstance(present, list | tuple) and isinstance(value, str | int | float)
        else ""
    )
    raise ConfigError(
        f"{where}{full_key} must be {expected}, such as {present!r}; got {value!r}, of type "
        f"{type(value).__name__}.{hint}"
    )


def _as_nested(value: Any, present: Any) -> Any:
    """Copy nested lists, as tuples where the present value has tuples: a dump turns them all into
    lists.
    """
    if not isinstance(value, list | tuple):
        return copy.deepcopy(value)
    inner = present[0] if isinstance(present, list | tuple) and present else None
    kind = type(present) if isinstance(present, list | tuple) else type(value)
    return kind(_as_nested(item, inner) for item in value)


def require_plain(value: Any, full_key: str, where: str) -> None:
    """Raise unless a value is made of numbers, text, None, lists and mappings, all the way down."""
    if isinstance(value, list | tuple):
        for item in value:
            require_plain(item, full_key, where)
    elif isinstance(value, dict):
        for item in value.values():
            require_plain(item, full_key, where)
    elif not isinstance(value, _SCALARS):
        raise ConfigError(
            f"{where}{full_key} holds {value!r}, of type {type(value).__name__}; settings are plain"
            " values"
        )
