"""Whether a subclass has a method of its own, which then has to be the one that is called."""

from collections.abc import Callable
from typing import Any


def is_overridden(instance: object, method: Callable[..., Any]) -> bool:
    """Return whether an object's class replaces a method of its base.

    A base that computes something in one go, where Detectron2 calls a method per image or per
    level, does it Detectron2's way for subclasses that override the method.

    Args:
        instance: Of a subclass.
        method: The function of the base class, `Base.method`.

    Example:
        >>> class Base:
        ...     def step(self):
        ...         return 1
        >>> class Own(Base):
        ...     def step(self):
        ...         return 2
        >>> is_overridden(Own(), Base.step), is_overridden(Base(), Base.step)
        (True, False)
    """
    return getattr(type(instance), method.__name__) is not method
