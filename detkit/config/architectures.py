"""Which config keys a meta-architecture reads, declared by the architecture itself.

Data checks, `detkit predict` and test-time augmentation look them up here, so that a model of your
own is as well known to them as detkit's. The table fills when the modules of the models are
imported. A program that builds a data loader without any model therefore knows none: nothing is
checked against a number of classes then, as for a model that declares nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from detkit.config.defaults import get_cfg

BRANCHES = ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS")
"""Switches of parts that not every meta-architecture has."""

_CUSTOM = "MODEL.CUSTOM."

ModelClass = TypeVar("ModelClass", bound=Callable[..., Any])


@dataclass(frozen=True)
class Architecture:
    """The keys that a meta-architecture reads; None or empty where it has no such thing.

    Args:
        num_classes: Key of the number of object classes.
        num_stuff_classes: Key of the number of classes of its semantic head.
        score_thresholds: Keys of the scores below which detections are dropped.
        nms_threshold: Key of the IoU from which detections of a class suppress each other.
        branches: The keys of `BRANCHES` that it has a use for.
    """

    num_classes: str | None = None
    num_stuff_classes: str | None = None
    score_thresholds: tuple[str, ...] = ()
    nms_threshold: str | None = None
    branches: tuple[str, ...] = ()


_ARCHITECTURES: dict[str, Architecture] = {}


def declare_architecture(
    *,
    num_classes: str | None = None,
    num_stuff_classes: str | None = None,
    score_thresholds: Sequence[str] = (),
    nms_threshold: str | None = None,
    branches: Sequence[str] = (),
) -> Callable[[ModelClass], ModelClass]:
    """Declare the keys of a meta-architecture, beside `@META_ARCH_REGISTRY.register()`.

    Keys are full ones, those under MODEL.CUSTOM included. Training data are then checked against
    the number of classes, `detkit predict` sets the score thresholds, and a switch of `BRANCHES`
    that is on without a branch for it is an error. A subclass declares its own.

    Args:
        num_classes: See `Architecture`, as for all others.
        num_stuff_classes: Likewise.
        score_thresholds: Likewise.
        nms_threshold: Likewise.
        branches: Likewise.

    Raises:
        ConfigKeyError: A key is not declared.
        ValueError: A branch is none of `BRANCHES`.

    Example:
        >>> from detkit.config import declare_architecture, find_architecture
        >>> @declare_architecture(
        ...     num_classes="MODEL.CUSTOM.NUM_CLASSES",
        ...     score_thresholds=["MODEL.CUSTOM.SCORE_THRESH"],
        ...     branches=["MODEL.MASK_ON"],
        ... )
        ... class MyDetector:
        ...     pass
        >>> find_architecture("MyDetector").num_classes
        'MODEL.CUSTOM.NUM_CLASSES'
    """
    defaults = get_cfg()
    for key in (num_classes, num_stuff_classes, *score_thresholds, nms_threshold, *branches):
        if key is not None and not key.startswith(_CUSTOM):
            defaults.get_by_full_key(key)
    unknown = [key for key in branches if key not in BRANCHES]
    if unknown:
        raise ValueError(f"branches must be of {', '.join(BRANCHES)}, got {', '.join(unknown)}")
    architecture = Architecture(
        num_classes, num_stuff_classes, tuple(score_thresholds), nms_threshold, tuple(branches)
    )

    def declare(model_class: ModelClass) -> ModelClass:
        _ARCHITECTURES[model_class.__name__] = architecture
        return model_class

    return declare


def find_architecture(model: str | type) -> Architecture | None:
    """Return what an architecture declares, or None where it declares nothing.

    Args:
        model: Its registered name; or its class, which may also inherit a declaration.
    """
    names = [model] if isinstance(model, str) else [base.__name__ for base in model.__mro__]
    return next((_ARCHITECTURES[name] for name in names if name in _ARCHITECTURES), None)


def score_threshold_keys(name: str) -> tuple[str, ...]:
    """Return the score thresholds of an architecture, or those of all where it declares nothing.

    A model of one's own is often built of detkit's parts, which read their usual keys.
    """
    architecture = find_architecture(name)
    if architecture is not None:
        return architecture.score_thresholds
    every = [key for known in _ARCHITECTURES.values() for key in known.score_thresholds]
    return tuple(key for key in dict.fromkeys(every) if not key.startswith(_CUSTOM))
