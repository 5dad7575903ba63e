"""`@configurable`: lets a class or function be called with a config or with plain arguments."""

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

# A message names at most this many keys; beyond, it names their groups.
_MAX_KEYS = 3


class _Configurable(Protocol[P, R_co]):
    """A callable that takes its declared arguments or a config."""

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


# `Callable[..., None]` lets a subclass declare an `__init__` with another signature. It hides no
# error: type checkers accept a call only if both members of the union do.
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

    A class with a decorated `__init__` needs a classmethod `from_config(cls, cfg, ...)`; for a
    function, `from_config` is an argument of the decorator. It returns the arguments by name.
    Arguments given beside the config override those it returns, unless `from_config` takes them
    itself. A call without a config is not changed.

    Constructors check arguments by name and do not know the keys. A ValueError raised in a call
    with a config (by the `from_config` of a class, the constructor, or the function) becomes a
    `ConfigError` that names class and keys:
    `RPN: nms_thresh must be at most 1, got 7 (set by MODEL.RPN.NMS_THRESH)`. Errors of a function's
    `from_config` are not changed, as it may do other work, such as loading a data set.

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
        TypeError: It decorates neither an `__init__` nor a function with `from_config`.
        TypeError: `from_config` is missing, not a classmethod, or does not take `cfg` first.
    """
    if init_func is not None:
        return _wrap_init(init_func)
    if from_config is None:
        return configurable
    return functools.partial(_wrap_function, from_config=from_config)


class NoFromConfigError(TypeError, AttributeError):
    """A `@configurable` class has no `from_config`; Detectron2 raises an AttributeError."""


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
            kind = NoFromConfigError if from_config is None else TypeError
            raise kind(
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
            raise  # complete already, for example from a part that was built inside
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

    vars(wrapped)["from_config"] = from_config  # an attribute as in Detectron2
    return wrapped


def _called_with_cfg(*args: Any, **kwargs: Any) -> bool:
    first = args[0] if args else kwargs.get("cfg")
    return isinstance(first, CfgNode)


def _explicit_arguments(
    from_config: Callable[..., dict[str, Any]], reads: list[KeyRead], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments by name; append the keys that `from_config` reads to `reads`."""
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(
            f"{from_config.__qualname__} must take `cfg` as its first argument, has"
            f" {list(parameters)}"
        )
    # As in Detectron2, a `from_config` with *args or **kwargs receives all arguments.
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
    """Return a ConfigError with the name of the class and the keys that set the invalid argument.

    Args:
        error: Raised by the constructor or `from_config`.
        name: Name of the class or function.
        arguments: Arguments of the constructor; empty if `from_config` raised.
        given: Arguments that the caller gave beside the config.
        reads: The keys that `from_config` read.
    """
    message = str(error)
    # A key that was read twice counts once; groups are read on the way to a key.
    values = {read.full_key: read.value for read in reads if not isinstance(read.value, CfgNode)}
    subject = _subject(message, arguments)
    is_set_by_caller = subject in given and subject in arguments
    if not values or is_set_by_caller or any(key in message for key in values):
        return ConfigError(f"{name}: {message}")
    keys = _responsible_keys(message, subject, arguments, values)
    if keys:
        source = f"set by {', '.join(keys)}"
    elif len(values) <= _MAX_KEYS:
        source = f"built from {', '.join(values)}"
    else:
        groups = dict.fromkeys(key.rpartition(".")[0] for key in values)
        source = f"built from the settings of {', '.join(groups)}"
    return ConfigError(f"{name}: {message.rstrip('.')} ({source})")


def _subject(message: str, arguments: Mapping[str, Any]) -> str:
    """Return the argument that a message is about, or the first word if it names no argument."""
    # The message is like `num_classes must be ...` or `... got num_classes=3`.
    words = re.findall(r"[A-Za-z_]\w*=?", message)
    for i, word in enumerate(words):
        # In the middle of a sentence, `norm` or `head` may be plain English, unlike `num_classes`.
        if word.rstrip("=") in arguments and (i == 0 or "_" in word or "=" in word):
            return word.rstrip("=")
    return words[0].rstrip("=") if words else ""


def _responsible_keys(
    message: str, subject: str, arguments: Mapping[str, Any], values: Mapping[str, Any]
) -> list[str]:
    """Return the keys that set the argument `subject`; none if that is unclear."""
    if subject in arguments:
        argument = arguments[subject]
        parts = [argument, *(argument if isinstance(argument, list | tuple) else ())]
        matching = [k for k, value in values.items() if any(_equals(value, p) for p in parts)]
    else:  # raised by `from_config`, or by a part whose arguments have other names
        matching = [key for key, value in values.items() if _is_shown(value, message)]

    # Many settings are 0 or True. Among keys with the right value, those with the most words of the
    # argument's name are chosen: PRE_NMS_TOPK_TRAIN and PRE_NMS_TOPK_TEST for `pre_nms_topk`.
    words = set(subject.lower().split("_"))
    alike = {key: len(words & set(key.rpartition(".")[2].lower().split("_"))) for key in values}
    candidates = matching or [key for key in values if alike[key] == len(words)]
    most = max((alike[key] for key in candidates), default=0)
    if most == 0 and len(candidates) != 1:
        return []
    return [key for key in candidates if alike[key] == most][:_MAX_KEYS]


def _equals(value: Any, argument: Any) -> bool:
    """Return whether a setting equals an argument; a list may equal a tuple."""
    if isinstance(value, list | tuple):
        return (
            isinstance(argument, list | tuple)
            and len(value) == len(argument)
            and all(map(_equals, value, argument))
        )
    # Other arguments are not compared: `==` of tensors is element-wise.
    return isinstance(argument, int | float | str | None) and value == argument


def _is_shown(value: Any, message: str) -> bool:
    """Return whether a message contains a value, as a list or a tuple, not inside a longer word."""
    texts = [repr(value)]
    if isinstance(value, list | tuple):
        texts = [repr(list(value)), repr(tuple(value))]
    return any(re.search(rf"(?<![\w.]){re.escape(text)}(?![\w.])", message) for text in texts)
