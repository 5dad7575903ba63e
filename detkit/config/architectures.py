"""The config keys that each meta-architecture reads, declared by the architecture itself.

Data checks, `detkit predict` and test-time augmentation look them up here, for detkit's models and
for your own. Importing the module of a model fills the table. Without a declaration, for example in
a program that builds a data loader and no model, the number of classes is not checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from detkit.config.defaults import get_cfg

BRANCHES = ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.ROTATED_BOXES", "MODEL.LOAD_PROPOSALS")
"""Switches of parts that not every meta-architecture has."""

_CUSTOM = "MODEL.CUSTOM."

ModelClass = TypeVar("ModelClass", bound=Callable[..., Any])


@dataclass(frozen=True)
class Architecture:
    """The keys that a meta-architecture reads; None or empty where it has none.

    Args:
        num_classes: Key of the number of object classes.
        num_stuff_classes: Key of the number of classes of its semantic head.
        score_thresholds: Keys of the scores below which detections are dropped.
        nms_threshold: Key of the IoU above which detections of a class suppress each other.
        branches: The keys of `BRANCHES` that it supports.
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

    Training data are then checked against the number of classes, `detkit predict` sets the score
    thresholds, and enabling a switch of `BRANCHES` that is not in `branches` is an error. Arguments
    are full keys, also under MODEL.CUSTOM; see `Architecture`. A subclass declares its own.

    Raises:
        ConfigKeyError: A key is unknown.
        ValueError: A branch is not in `BRANCHES`.

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
    """Return the declaration of an architecture, or None.

    Args:
        model: Its registered name, or its class, which may inherit a declaration.
    """
    names = [model] if isinstance(model, str) else [base.__name__ for base in model.__mro__]
    return next((_ARCHITECTURES[name] for name in names if name in _ARCHITECTURES), None)


def score_threshold_keys(name: str) -> tuple[str, ...]:
    """Return the keys of the score thresholds of an architecture.

    Without a declaration, return those of all: custom models often consist of detkit's parts.
    """
    architecture = find_architecture(name)
    if architecture is not None:
        return architecture.score_thresholds
    every = [key for known in _ARCHITECTURES.values() for key in known.score_thresholds]
    return tuple(key for key in dict.fromkeys(every) if not key.startswith(_CUSTOM))
