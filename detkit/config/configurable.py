"""`@configurable`: call a class or function with a config, or with plain arguments."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from detkit.config.cfg_node import CfgNode, KeyRead, recorded_reads
from detkit.utils.errors import ConfigError, UserError

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
Self = TypeVar("Self")

# A message that fits no single key names the keys themselves up to this many, else their groups.
_MAX_KEYS = 3


class _Configurable(Protocol[P, R_co]):
    """What may be called: the arguments as they are declared, or a config."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, cfg: CfgNode, *args: Any, **kwargs: Any) -> R_co: ...


class _Init(Protocol[P]):
    """A decorated `__init__`. Type checkers bind it as they bind a method: through `__get__`."""

    @overload
    def __get__(self, instance: None, owner: type, /) -> Callable[..., None]: ...
    @overload
    def __get__(self, instance: object, owner: type, /) -> _Configurable[P, None]: ...


# The second half of the union accepts every call. Type checkers must accept a call by both halves,
# so it hides nothing; it lets a subclass declare an `__init__` of another signature.
@overload
def configurable(
    init_func: Callable[Concatenate[Self, P], None],
) -> _Init[P] | Callable[..., None]: ...
@overload
def configurable(
    *, from_config: Callable[..., dict[str, Any]]
) -> Callable[[Callable[P, R]], _Configurable[P, R]]: ...
def configurable(
    init_func: Callable[..., Any] | None = None,
    *,
    from_config: Callable[..., dict[str, Any]] | None = None,
) -> Any:
    """Let a class or a function be called with a config in place of its arguments.

    On an `__init__`, the class brings a classmethod `from_config(cls, cfg, ...)`; on a function,
    `from_config` is given to the decorator. It returns the arguments by name. Arguments given
    beside the config win over those it returns, unless `from_config` takes them itself. Called
    without a config, the class or function is what it is without the decorator.

    A constructor checks and names its arguments and need not know the keys. A ValueError raised
    while a class is built from a config (by `from_config`, the constructor, or the function
    itself) becomes a `ConfigError` that also names the class and the keys:
    `RPN: nms_thresh must be at most 1, got 7 (set by MODEL.RPN.NMS_THRESH)`. What the `from_config`
    of a function raises stays as it is: it may do work of its own, such as loading a data set.

    Example:
        >>> from detkit.config import configurable, get_cfg
        >>> class Head:
        ...     @configurable
        ...     def __init__(self, *, num_classes: int) -> None:
        ...         self.num_classes = num_classes
        ...
        ...     @classmethod
        ...     def from_config(cls, cfg):
        ...         return {"num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}
        >>> cfg = get_cfg()
        >>> heads = Head(cfg), Head(num_classes=3), Head(cfg, num_classes=4)
        >>> [head.num_classes for head in heads]
        [80, 3, 4]

    Raises:
        TypeError: It decorates something other than an `__init__` or a function with `from_config`;
            `from_config` is missing, is no classmethod, or does not take `cfg` first.
    """
    if init_func is not None:
        return _wrap_init(init_func)
    if from_config is None:
        return configurable
    return functools.partial(_wrap_function, from_config=from_config)


def _wrap_init(init_func: Callable[..., None]) -> Callable[..., None]:
    if not inspect.isfunction(init_func) or init_func.__name__ != "__init__":
        raise TypeError(
            f"@configurable decorates __init__, got {init_func!r}; for a function give"
            " from_config=..."
        )

    @functools.wraps(init_func)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        from_config = getattr(cls, "from_config", None)
        if from_config is None or not inspect.ismethod(from_config):
            raise TypeError(
                f"{cls.__name__} is @configurable and needs a classmethod from_config(cls, cfg,"
                " ...)"
            )
        if not _called_with_cfg(*args, **kwargs):
            init_func(self, *args, **kwargs)
            return
        reads: list[KeyRead] = []
        arguments: dict[str, Any] = {}
        try:
            arguments = _explicit_arguments(from_config, reads, *args, **kwargs)
            init_func(self, **arguments)
        except UserError:
            raise
        except ValueError as error:
            raise _config_error(error, cls.__name__, arguments, kwargs, reads) from error

    return wrapped


def _wrap_function(
    function: Callable[..., Any], from_config: Callable[..., dict[str, Any]]
) -> Callable[..., Any]:
    if not inspect.isfunction(from_config):
        raise TypeError(
            f"from_config of a @configurable function must be a function, got {from_config!r}"
        )

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not _called_with_cfg(*args, **kwargs):
            return function(*args, **kwargs)
        reads: list[KeyRead] = []
        arguments = _explicit_arguments(from_config, reads, *args, **kwargs)
        try:
            return function(**arguments)
        except UserError:
            raise
        except ValueError as error:
            raise _config_error(error, function.__name__, arguments, kwargs, reads) from error

    vars(wrapped)["from_config"] = from_config
    return wrapped


def _called_with_cfg(*args: Any, **kwargs: Any) -> bool:
    first = args[0] if args else kwargs.get("cfg")
    return isinstance(first, CfgNode)


def _explicit_arguments(
    from_config: Callable[..., dict[str, Any]], reads: list[KeyRead], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments by name, and append the keys that `from_config` reads to `reads`."""
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(
            f"{from_config.__qualname__} must take `cfg` as its first argument, has"
            f" {list(parameters)}"
        )
    overrides: dict[str, Any] = {}
    if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name not in parameters}
    with recorded_reads(reads):
        return {**from_config(*args, **kwargs), **overrides}


def _config_error(
    error: ValueError,
    name: str,
    arguments: Mapping[str, Any],
    given: Mapping[str, Any],
    reads: Sequence[KeyRead],
) -> ValueError:
    """Return the error with the name of what was built, and the keys that set what it complains of.

    Args:
        error: What the constructor or `from_config` raised.
        name: Of the class or function.
        arguments: What the constructor was called with; empty where `from_config` raised.
        given: Arguments that came from the caller, not from the config.
        reads: The keys that `from_config` read.
    """
    message = str(error)
    # A key read twice counts once; groups are steps on the way to a key.
    values = {read.full_key: read.value for read in reads if not isinstance(read.value, CfgNode)}
    subject = _subject(message, arguments)
    if any(key in message for key in values):
        return ConfigError(f"{name}: {message}")
    if subject in given and subject in arguments:
        return ConfigError(f"{name}: {message}")  # set by the caller, not by a key
    keys = _responsible_keys(message, subject, arguments, values)
    if keys:
        source = f"set by {', '.join(keys)}"
    elif len(values) <= _MAX_KEYS:
        source = f"built from {', '.join(values)}"
    else:
        groups = dict.fromkeys(key.rpartition(".")[0] for key in values)
        source = f"built from the settings of {', '.join(groups)}"
    return ConfigError(
        f"{name}: {message.rstrip('.')} ({source})" if values else f"{name}: {message}"
    )


def _subject(message: str, arguments: Mapping[str, Any]) -> str:
    """Return the argument that a message is about, or its first word where it names none."""
    # `num_classes must be ...`, or `... got num_classes=3`.
    words = re.findall(r"[A-Za-z_]\w*=?", message)
    for i, word in enumerate(words):
        # In the middle of a sentence `norm` or `head` may be plain English; `num_classes` is not.
        if word.rstrip("=") in arguments and (i == 0 or "_" in word or "=" in word):
            return word.rstrip("=")
    return words[0].rstrip("=") if words else ""


def _responsible_keys(
    message: str, subject: str, arguments: Mapping[str, Any], values: Mapping[str, Any]
) -> list[str]:
    """Return the keys whose value went into the argument `subject`; none if that is unclear."""
    if subject in arguments:
        argument = arguments[subject]
        parts = argument if isinstance(argument, list | tuple) else ()
        matching = [
            key
            for key, value in values.items()
            if _equals(value, argument) or any(_equals(value, part) for part in parts)
        ]
    else:  # raised before there were arguments, by a part that has names of its own
        matching = [key for key, value in values.items() if _is_shown(value, message)]

    # Many settings are 0 or True. Among those of the right value, the names decide:
    # `pre_nms_topk` is PRE_NMS_TOPK_TRAIN and PRE_NMS_TOPK_TEST.
    words = set(subject.lower().split("_"))
    alike = {key: len(words & set(key.rpartition(".")[2].lower().split("_"))) for key in values}
    candidates = matching or [key for key in values if alike[key] == len(words)]
    most = max((alike[key] for key in candidates), default=0)
    if most == 0 and len(candidates) != 1:
        return []
    return [key for key in candidates if alike[key] == most][:_MAX_KEYS]


def _equals(value: Any, argument: Any) -> bool:
    """Return whether a setting and an argument are the same, lists and tuples being alike."""
    if isinstance(value, list | tuple):
        return (
            isinstance(argument, list | tuple)
            and len(value) == len(argument)
            and all(map(_equals, value, argument))
        )
    # An argument may also be a tensor or a module, which `==` must not meet.
    return isinstance(argument, int | float | str | None) and value == argument


def _is_shown(value: Any, message: str) -> bool:
    text = repr(list(value) if isinstance(value, tuple) else value)
    also = repr(tuple(value)) if isinstance(value, list | tuple) else text
    return any(re.search(rf"(?<![\w.]){re.escape(t)}(?![\w.])", message) for t in (text, also))
