import functools

import pytest

from detkit.utils.overriding import is_overridden, overridable


def of_subclass(base):
    return type("Own", (base,), {"step": lambda self: 2})().step


def assigned_to_object(base):
    instance = base()
    instance.step = lambda: 2
    return instance.step


def assigned_to_class(base):
    base.step = lambda self: 2
    return base().step


def wrapped_in_class(base):
    original = base.step
    base.step = functools.wraps(original)(lambda self: original(self))
    return base().step


@pytest.mark.parametrize(
    ("method_of", "expected"),
    [
        (lambda base: base().step, False),
        (lambda base: type("Own", (base,), {})().step, False),
        (of_subclass, True),
        (assigned_to_object, True),
        (assigned_to_class, True),
        (wrapped_in_class, True),
    ],
    ids=["base", "inherited", "subclass", "object", "class", "wrapped"],
)
def test_method_that_is_not_the_marked_one_is_overridden(method_of, expected):
    class Base:
        @overridable
        def step(self):
            return 1

    assert is_overridden(method_of(Base)) is expected
