"""What a foreign layout is: weights of the same networks that others save under other names.

Weights also load under wrong settings: only the results are worse. `differing_settings` compares
what can be seen in the model with what the weights were trained under.

Legend: K classes.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

Rule = tuple[str, str]
"""A regular expression that a whole name must match, and what Detectron2 calls it: a template for
`Match.expand`.
"""


@dataclass(frozen=True)
class Pixels:
    """How images were prepared for the network that the weights come from, in the units of detkit's
    config.
    """

    format: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float] | None
    """None where it is not known."""

    def settings(self) -> str:
        """Return the config keys and their values."""
        std = "" if self.std is None else f", MODEL.PIXEL_STD {list(self.std)}"
        return f"INPUT.FORMAT {self.format}, MODEL.PIXEL_MEAN {list(self.mean)}{std}"


# Means differ in the last digits from source to source, by less than one grey level.
_TOLERANCE = 1.0

RGB_OF_TORCHVISION = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
BGR_OF_CAFFE2 = Pixels("BGR", (103.53, 116.28, 123.675), None)


@dataclass
class Translation:
    """Weights under Detectron2's names. Those of a ResNet come without a prefix: `stem.conv1.weight`.

    What has no counterpart keeps its name.
    """

    layout: str
    """Whose layout it was, for messages."""
    weights: dict[str, Tensor]
    renamed: dict[str, str]
    """Name in the file -> name in `weights`."""
    pixels: Pixels | None = None
    stride_in_1x1: bool | None = None
    """Which convolution of a bottleneck has the stride; None where it is not known."""
    remarks: list[str] = field(default_factory=list)
    """What was changed besides names, or what the names cannot tell."""
    unrecognised: list[str] = field(default_factory=list)
    """Names in the file that have no counterpart, and were kept."""
    class_names: list[str] | None = None
    """Of the classes in their new order, where they are known."""


@dataclass(frozen=True)
class Layout:
    """How to recognise a layout and what to make of it."""

    recognises: Callable[[Collection[str]], bool]
    translate: Callable[[Mapping[str, Tensor], str], Translation]
    """Of the weights, and the name of their file."""


def rename(
    weights: Mapping[str, Tensor], name_of: Callable[[str, Tensor], str | None]
) -> dict[str, str]:
    """Return name in the file -> Detectron2's name, of the tensors that have one."""
    named = ((name, name_of(name, value)) for name, value in weights.items())
    return {name: new for name, new in named if new is not None}


def apply_rules(name: str, rules: Sequence[Rule]) -> str | None:
    """Return the name by the first rule that matches, or None."""
    for pattern, template in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(template)
    return None


def background_last(rows: Tensor) -> Tensor:
    """Move the background's row of a classifier from the first place, (K + 1, ...), to the last."""
    return rows.roll(-1, dims=0)


def differing_settings(translation: Translation, model: nn.Module) -> list[str]:
    """Say, in a sentence each, which settings of the model are not those that the weights were
    trained under.
    """
    found = []
    if translation.pixels is not None:
        found.append(_pixels_differ(translation.layout, translation.pixels, model))
    if translation.stride_in_1x1 is not None:
        found.append(_strides_differ(translation.layout, translation.stride_in_1x1, model))
    return [sentence for sentence in found if sentence]


def _pixels_differ(layout: str, pixels: Pixels, model: nn.Module) -> str:
    mean, std = (getattr(model, name, None) for name in ("pixel_mean", "pixel_std"))
    if not isinstance(mean, Tensor) or not isinstance(std, Tensor):
        return ""  # a backbone alone takes images as they come
    is_same = _is_close(mean, pixels.mean) and (pixels.std is None or _is_close(std, pixels.std))
    if is_same:
        return ""
    return (
        f"weights of {layout} want images prepared otherwise: set {pixels.settings()}; the model"
        f" has PIXEL_MEAN {_numbers(mean)}, PIXEL_STD {_numbers(std)}"
    )


def _strides_differ(layout: str, in_1x1: bool, model: nn.Module) -> str:
    """Compare with the blocks of the model that have a stride: two convolutions in a row may have
    it.
    """
    for block in model.modules():
        convs = [getattr(block, name, None) for name in ("conv1", "conv2", "conv3")]
        if all(isinstance(conv, nn.Conv2d) for conv in convs):
            strides = [conv.stride[0] for conv in convs[:2] if isinstance(conv, nn.Conv2d)]
            if max(strides) > 1 and (strides[0] > 1) != in_1x1:
                return (
                    f"the bottlenecks of {layout} have their stride in the"
                    f" {'1x1' if in_1x1 else '3x3'} convolution, the model's in the other: set"
                    f" MODEL.RESNETS.STRIDE_IN_1X1 {in_1x1}"
                )
    return ""


def _is_close(values: Tensor, wanted: tuple[float, ...]) -> bool:
    numbers = _numbers(values)
    return len(numbers) == len(wanted) and all(
        abs(a - b) < _TOLERANCE for a, b in zip(numbers, wanted, strict=True)
    )


def _numbers(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]
