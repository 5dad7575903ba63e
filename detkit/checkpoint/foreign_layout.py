"""What a foreign layout is: weights of the same networks that others save under other names.

Legend: K classes.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

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
