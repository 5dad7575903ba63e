"""Augmentations: policies that look at an image, draw random numbers, and return a transform.

All draws come from NumPy's global generator: the loader seeds it for each training sample, so that
a sample does not depend on the process that makes it, and so that augmentations written for
Detectron2 are seeded too.

Legend: H and W height and width, C channels, N boxes.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, cast

import numpy as np

from detkit.data.transforms.transform import NoOpTransform, Transform, TransformList
from detkit.utils.errors import ContractError
from detkit.utils.registry import Registry

AUGMENTATION_REGISTRY = Registry("AUGMENTATION")
AUGMENTATION_REGISTRY.__doc__ = (
    """Augmentations by the `name` in `INPUT.AUGMENTATIONS`: classes or functions."""
)

# Share of the run that is over, in [0, 1], as the number of the draw says; like the random numbers,
# it does not depend on the process that makes the sample.
_PROGRESS: ContextVar[float] = ContextVar("_PROGRESS", default=0.0)


@contextlib.contextmanager
def run_progress(share: float) -> Iterator[None]:
    """Have augmentations know which share of the run is over, in [0, 1]: see `Until`."""
    token = _PROGRESS.set(share)
    try:
        yield
    finally:
        _PROGRESS.reset(token)


class AugInput:
    """The parts of a sample that augmentations look at, and that their transforms change.

    A subclass may have further attributes, for augmentations whose `get_transform` takes arguments
    of these names.

    Attributes:
        image_format: Order of the channels; see `INPUT.FORMAT`.
    """

    image_format = "BGR"

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ) -> None:
        """Hold the parts of one sample.

        Args:
            image: (H, W, C) or (H, W), uint8 in [0, 255], or float.
            boxes: (N, 4) XYXY in pixels.
            sem_seg: (H, W) integer labels.
        """
        if image.ndim not in (2, 3):
            raise ValueError(
                f"an image to augment has shape (H, W, C) or (H, W), got {image.shape}"
            )
        self.image = image
        self.boxes = boxes
        self.sem_seg = sem_seg

    def transform(self, tfm: Transform) -> None:
        """Replace each part by the transformed one."""
        self.image = tfm.apply_image(self.image)
        if self.boxes is not None:
            self.boxes = tfm.apply_box(self.boxes)
        if self.sem_seg is not None:
            self.sem_seg = tfm.apply_segmentation(self.sem_seg)

    def apply_augmentations(
        self, augmentations: Sequence[Augmentation | Transform]
    ) -> TransformList:
        """Replace each part by the augmented one, and return the transforms that were drawn."""
        augmented = AugmentationList(augmentations)(self)
        assert isinstance(augmented, TransformList)
        return augmented


class Augmentation(ABC):
    """A policy that returns a transform for a sample.

    The arguments of `get_transform` are the attributes of the `AugInput` with the same names:
    `image`, `boxes`, `sem_seg`; parts that a sample lacks are None. A single argument of another
    name is the image.

    Example:
        >>> from detkit.data import transforms as T
        >>> class Invert(T.Augmentation):
        ...     def get_transform(self, image):
        ...         return T.BlendTransform(src_image=255, src_weight=1.0, dst_weight=-1.0)
        >>> sample = T.AugInput(np.zeros((2, 2, 3), np.uint8))
        >>> transform = Invert()(sample)
        >>> int(sample.image.min())
        255
    """

    @abstractmethod
    def get_transform(self, *args: Any) -> Transform:
        """Decide on a transform; all random draws happen here."""

    def __call__(self, aug_input: AugInput) -> Transform:
        """Change the sample by a drawn transform, and return the transform."""
        tfm = self.get_transform(*_get_aug_input_args(self, aug_input))
        if not hasattr(tfm, "apply_image"):
            raise TypeError(
                f"{type(self).__name__}.get_transform must return a Transform, got {tfm!r}"
            )
        aug_input.transform(tfm)
        return tfm

    def _init(self, params: dict[str, Any] | None = None) -> None:
        """Set attributes from `locals()`, as constructors written for Detectron2 do."""
        for name, value in (params or {}).items():
            if name != "self" and not name.startswith("_"):
                setattr(self, name, value)

    def _rand_range(self, low: float = 1.0, high: float | None = None, size: Any = None) -> Any:
        """Draw from [low, high), or from [0, low) when only one bound is given."""
        low, high = (0, low) if high is None else (low, high)
        return np.random.uniform(low, high, size)

    def __repr__(self) -> str:
        """Return the call that builds it, as far as its arguments are attributes.

        Without those that have their default.
        """
        arguments = []
        for name, parameter in inspect.signature(type(self)).parameters.items():
            # The same object: what the caller gave is shown, also where it equals the default.
            value = vars(self).get(name, parameter.default)
            if value is not parameter.default:
                arguments.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"


def _get_aug_input_args(aug: Augmentation, aug_input: AugInput) -> list[Any]:
    """Return the arguments of `aug.get_transform` for a sample; augmentations of users call it.

    Raises:
        AttributeError: The sample lacks one.
    """
    # Detectron2's older form lists the parts, whatever the arguments are called.
    names = getattr(aug, "input_args", None)
    if not names:
        names = _argument_names(type(aug))
        # A single argument is the image, as in Detectron2; projects call it `img`.
        if len(names) == 1 and not hasattr(aug_input, names[0]):
            names = ["image"]
    for name in names:
        if not hasattr(aug_input, name):
            raise AttributeError(
                f"{type(aug).__name__}.get_transform takes {name!r}, which"
                f" {type(aug_input).__name__} lacks; it has {sorted(vars(aug_input))}"
            )
    return [getattr(aug_input, name) for name in names]


# Cached, because it is asked for each augmentation of each sample.
@functools.cache
def _argument_names(kind: type[Augmentation]) -> list[str]:
    """Return the names of the arguments of `get_transform`, without `self`."""
    parameters = list(inspect.signature(kind.get_transform).parameters.values())[1:]
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


class _Fixed(Augmentation):
    """A transform as an augmentation that always returns it."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def get_transform(self, *args: Any) -> Transform:
        return self.transform

    def __repr__(self) -> str:
        return repr(self.transform)


@AUGMENTATION_REGISTRY.register()
class AugmentationList(Augmentation):
    """Several augmentations, one after the other; each sees the sample as the last one left it."""

    def __init__(self, augs: Sequence[Augmentation | Transform]) -> None:
        self.augs = [as_augmentation(aug) for aug in augs]

    def get_transform(self, *args: Any) -> Transform:
        """Raise an error: later augmentations depend on the sample that the earlier ones leave."""
        raise NotImplementedError(
            "an AugmentationList decides while it is applied: call it with an AugInput"
        )

    def __call__(self, aug_input: AugInput) -> TransformList:
        """Change the sample by all augmentations in turn, and return their transforms."""
        return TransformList([aug(aug_input) for aug in self.augs])

    def __repr__(self) -> str:
        return f"AugmentationList[{', '.join(map(repr, self.augs))}]"


class RandomApply(Augmentation):
    """Applies an augmentation or a transform with probability `prob`."""

    def __init__(self, tfm_or_aug: Augmentation | Transform, prob: float = 0.5) -> None:
        self.prob = require_probability(prob)
        self.aug = as_augmentation(tfm_or_aug)

    def get_transform(self, *args: Any) -> Transform:
        """Draw whether to apply the augmentation inside, which gets the arguments."""
        if self._rand_range() < self.prob:
            return self.aug.get_transform(*args)
        return NoOpTransform()

    def __call__(self, aug_input: AugInput) -> Transform:
        """Change the sample, or leave it unchanged."""
        return self.aug(aug_input) if self._rand_range() < self.prob else NoOpTransform()

    def __repr__(self) -> str:
        return f"RandomApply({self.aug!r}, prob={self.prob})"


class Until(Augmentation):
    """Applies an augmentation in the first part of a run only."""

    def __init__(self, aug: Augmentation, share: float) -> None:
        """Take the augmentation, and the share of the run after which it ends, in (0, 1]."""
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"until must be a share of the run in (0, 1], got {share!r}")
        self.aug = aug
        self.share = share

    def get_transform(self, *args: Any) -> Transform:
        """Return the transform of the augmentation inside, which gets the arguments."""
        is_over = _PROGRESS.get() >= self.share
        return NoOpTransform() if is_over else self.aug.get_transform(*args)

    def __call__(self, aug_input: AugInput) -> Transform:
        """Change the sample, or leave it unchanged."""
        return NoOpTransform() if _PROGRESS.get() >= self.share else self.aug(aug_input)


def nested(augmentations: Sequence[Augmentation | Transform]) -> Iterator[Augmentation | Transform]:
    """Yield augmentations and those inside of them."""
    for augmentation in augmentations:
        yield augmentation
        if isinstance(augmentation, AugmentationList):
            yield from nested(augmentation.augs)
        if isinstance(augmentation, RandomApply | Until):
            yield from nested([augmentation.aug])


def as_augmentation(tfm_or_aug: Augmentation | Transform) -> Augmentation:
    """Return an augmentation itself, or one that always returns the given transform.

    Raises:
        TypeError: The argument is neither.
    """
    # By their methods: augmentations written for Detectron2 have other base classes.
    if hasattr(tfm_or_aug, "apply_image"):
        return _Fixed(cast(Transform, tfm_or_aug))
    if callable(tfm_or_aug) and hasattr(tfm_or_aug, "get_transform"):
        return tfm_or_aug
    raise TypeError(f"neither an Augmentation nor a Transform: {tfm_or_aug!r}")


def apply_augmentations(
    augmentations: Sequence[Augmentation | Transform], inputs: AugInput | np.ndarray
) -> tuple[AugInput | np.ndarray, TransformList]:
    """Augment a sample, or an image alone, and return it with the transforms that were drawn.

    An `AugInput` is changed in place and returned; an array is not changed.
    """
    if isinstance(inputs, AugInput):
        return inputs, inputs.apply_augmentations(augmentations)
    sample = AugInput(inputs)
    transforms = sample.apply_augmentations(augmentations)
    return sample.image, transforms


def apply_transform_gens(
    transform_gens: Sequence[Augmentation | Transform], image: AugInput | np.ndarray
) -> tuple[AugInput | np.ndarray, TransformList]:
    """Return `apply_augmentations`, under its older name."""
    return apply_augmentations(transform_gens, image)


# Detectron2's older names.
TransformGen = Augmentation
StandardAugInput = AugInput


def require_probability(prob: float) -> float:
    """Return the argument if it lies in [0, 1].

    Raises:
        ValueError: It does not.
    """
    if not 0 <= prob <= 1:
        raise ContractError(f"a probability must lie in [0, 1], got {prob}")
    return prob


def as_range(
    name: str,
    value: float | Sequence[float],
    *,
    around: float = 0.0,
    low: float = -np.inf,
    high: float = np.inf,
) -> tuple[float, float]:
    """Return the two ends of an argument that is a range.

    Args:
        name: Name of the argument.
        value: Two numbers; or one of 0 or more, for the range from `around` minus to `around` plus
            it. Around another number than 0 it is cut at `low`.
        around: See above.
        low: Smallest number that is allowed.
        high: Largest.

    Raises:
        ValueError: It is neither, or leaves the limits.
    """
    ends = np.asarray(value, dtype=np.float64)
    if ends.ndim == 0 and ends >= 0:
        lowest = around - float(ends)
        ends = np.array([max(lowest, low) if around else lowest, around + float(ends)])
    if ends.shape != (2,) or not low <= ends[0] <= ends[1] <= high:
        raise ValueError(
            f"{name} must be a range [from, to] within [{low:g}, {high:g}], or one number of at"
            f" least 0 for a range around {around:g}, got {value}"
        )
    return float(ends[0]), float(ends[1])
