"""Whether a method has been replaced by a user's own, which then has to be the one that is called.

A base that computes something in one go, where Detectron2 calls a method per image or per level,
does it Detectron2's way where the method is not the base's.
"""

from collections.abc import Callable
from typing import Any, TypeVar

Method = TypeVar("Method", bound=Callable[..., Any])


def overridable(method: Method) -> Method:
    """Mark a method, so that `is_overridden` can tell others from it."""
    vars(method)["_marked"] = method
    return method


def is_overridden(method: Callable[..., Any]) -> bool:
    """Return whether a bound method is not the one that was marked in the base.

    It may be that of a subclass, or have been assigned to the class or to the object.

    Example:
        >>> class Base:
        ...     @overridable
        ...     def step(self):
        ...         return 1
        >>> class Own(Base):
        ...     def step(self):
        ...         return 2
        >>> is_overridden(Own().step), is_overridden(Base().step)
        (True, False)
    """
    function = getattr(method, "__func__", method)
    # The mark names its method: `functools.wraps` copies marks.
    return getattr(function, "_marked", None) is not function
