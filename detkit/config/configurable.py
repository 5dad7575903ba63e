"""`@configurable`: call a class or function with a config, or with plain arguments."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from detkit.config.cfg_node import CfgNode


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

    Example:
        >>> class Head(nn.Module):
        ...     @configurable
        ...     def __init__(self, *, num_classes: int) -> None: ...
        ...     @classmethod
        ...     def from_config(cls, cfg):
        ...         return {"num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES}
        >>> Head(cfg), Head(num_classes=3), Head(cfg, num_classes=3)

    Raises:
        TypeError: It decorates something other than an `__init__` or a function with `from_config`;
            `from_config` is missing, is no classmethod, or does not take `cfg` first.
    """
    if init_func is not None:
        return _wrap_init(init_func)
    if from_config is None:
        return configurable
    return functools.partial(_wrap_function, from_config=from_config)


def _wrap_init(init_func: Callable[..., Any]) -> Callable[..., None]:
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
        if _called_with_cfg(*args, **kwargs):
            kwargs = _explicit_arguments(from_config, *args, **kwargs)
            args = ()
        init_func(self, *args, **kwargs)

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
        if _called_with_cfg(*args, **kwargs):
            return function(**_explicit_arguments(from_config, *args, **kwargs))
        return function(*args, **kwargs)

    wrapped.from_config = from_config  # type: ignore[attr-defined]
    return wrapped


def _called_with_cfg(*args: Any, **kwargs: Any) -> bool:
    first = args[0] if args else kwargs.get("cfg")
    return isinstance(first, CfgNode)


def _explicit_arguments(
    from_config: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Run `from_config` with the arguments it takes; those that it does not take override what it
    returns.
    """
    parameters = inspect.signature(from_config).parameters
    if next(iter(parameters), None) != "cfg":
        raise TypeError(
            f"{from_config.__qualname__} must take `cfg` as its first argument, has"
            f" {list(parameters)}"
        )
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
        return from_config(*args, **kwargs)
    overrides = {name: kwargs.pop(name) for name in list(kwargs) if name not in parameters}
    return {**from_config(*args, **kwargs), **overrides}
