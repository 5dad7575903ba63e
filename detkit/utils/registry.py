"""Registries of classes and functions that a config selects by name."""

import importlib
import pydoc
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

from detkit.utils.errors import UnknownNameError, UserError
from detkit.utils.text import did_you_mean

T = TypeVar("T")


class DuplicateNameError(UserError, KeyError, AssertionError):
    """A name under which another object is already registered; see `ContractError`."""


class UnknownImportError(UnknownNameError, ImportError):
    """A dotted path that leads to nothing."""


class Registry:
    """A table from name to object, filled by a decorator.

    Example:
        >>> from detkit.utils.registry import Registry
        >>> BACKBONE_REGISTRY = Registry("BACKBONE")
        >>> @BACKBONE_REGISTRY.register()
        ... class MyBackbone: ...
        >>> BACKBONE_REGISTRY.get("MyBackbone") is MyBackbone
        True
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Under this name notebooks for Detectron2 take out what a cell is to register again.
        self._obj_map: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """What the registry holds, as it appears in error messages."""
        return self._name

    @overload
    def register(self, obj: None = None) -> Callable[[T], T]: ...
    @overload
    def register(self, obj: T) -> T: ...
    def register(self, obj: Any = None) -> Any:
        """Add an object under its `__name__`: `@R.register()`, or `R.register(obj)`.

        Raises:
            DuplicateNameError: Another object has that name. An object defined in the same place,
                as in a reloaded module, replaces the first one.
        """
        if obj is None:
            return self._add
        return self._add(obj)

    def _add(self, obj: Any) -> Any:
        name = obj.__name__
        known = self._obj_map.get(name)
        if known is not None and known is not obj and qualified_name(known) != qualified_name(obj):
            raise DuplicateNameError(
                f"{self._name} registry already has {name!r}, from {qualified_name(known)}: rename"
                f" {qualified_name(obj)}"
            )
        self._obj_map[name] = obj
        return obj

    def get(self, name: str) -> Any:
        """Return the object registered under a name.

        Raises:
            UnknownNameError: No object has that name; the message lists the closest names.
        """
        if name in self._obj_map:
            return self._obj_map[name]
        hint = did_you_mean(name, self._obj_map)
        known = ", ".join(sorted(self._obj_map)) or "none"
        raise UnknownNameError(
            f"{name!r} is not registered as {self._name}.{hint} Registered: {known}. "
            "To register a part of your own, add its module to IMPORTS."
        )

    def __contains__(self, name: object) -> bool:
        return name in self._obj_map

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self._obj_map.items())

    def __len__(self) -> int:
        return len(self._obj_map)

    def __repr__(self) -> str:
        return f"Registry({self._name}: {', '.join(sorted(self._obj_map))})"


def qualified_name(obj: Any) -> str:
    """Return the dotted path of a class or function, from which `locate` finds it."""
    return f"{getattr(obj, '__module__', '?')}.{getattr(obj, '__qualname__', repr(obj))}"


def locate(name: str) -> Any:
    """Return the object that a dotted path names, such as `torch.nn.ReLU` or a method.

    Raises:
        UnknownImportError: There is none.
    """
    found = pydoc.locate(name)
    if found is not None:
        return found
    module, _, attribute = name.rpartition(".")
    try:
        # A module that a function of its package hides, such as `torch.optim.sgd`.
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UnknownImportError(f"there is nothing to import under {name!r}") from error
