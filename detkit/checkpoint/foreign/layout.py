"""Foreign layouts of weights: the same networks, saved under the names of another project.

Weights load under wrong settings too, and only the results are worse. `differing_settings` compares
the settings of a model with those that the weights were trained with.

Legend: K classes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

FROZEN_BN_EPS = 1e-5
"""Of detkit's frozen norms."""
Rule = tuple[str, str]
"""A pattern for a whole name, and the template of Detectron2's name, for `Match.expand`."""


@dataclass(frozen=True)
class Pixels:
    """The image format that weights were trained with, in the units of the config."""

    format: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float] | None
    """None if unknown."""

    def settings(self) -> str:
        """Return the config keys and their values, as text."""
        std = "" if self.std is None else f", MODEL.PIXEL_STD {list(self.std)}"
        return f"INPUT.FORMAT {self.format}, MODEL.PIXEL_MEAN {list(self.mean)}{std}"


# Published means differ in the last digits, by less than one grey level.
_TOLERANCE = 1.0

RGB_OF_TORCHVISION = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
BGR_OF_CAFFE2 = Pixels("BGR", (103.53, 116.28, 123.675), None)


@dataclass
class Translation:
    """Weights under Detectron2's names; tensors without a counterpart keep their name.

    Names in a ResNet have no prefix: `stem.conv1.weight`.
    """

    layout: str
    """Name of the layout, for messages."""
    weights: dict[str, Tensor]
    renamed: dict[str, str]
    """Name in the file -> name in `weights`."""
    pixels: Pixels | None = None
    stride_in_1x1: bool | None = None
    """Whether the first convolution of a bottleneck has the stride; None if unknown."""
    remarks: list[str] = field(default_factory=list)
    """For the user: changes besides the names, and what the names do not show."""
    unrecognised: list[str] = field(default_factory=list)
    """Names in the file that have no counterpart."""
    class_names: list[str] | None = None
    """Names of the classes in their new order, if known."""


def rename(
    weights: Mapping[str, Tensor], name_of: Callable[[str, Tensor], str | None]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename tensors; those for which `name_of` returns None keep their name.

    Returns:
        The renamed weights, and old name -> new name of those with a new one.
    """
    result, renamed = {}, {}
    for name, value in weights.items():
        new = name_of(name, value)
        if new is not None:
            renamed[name] = new
        result[name if new is None else new] = value
    return result, renamed


def apply_rules(name: str, rules: Sequence[Rule]) -> str | None:
    """Return the name by the first rule that matches, or None."""
    for pattern, template in rules:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(template)
    return None


def background_last(rows: Tensor) -> Tensor:
    """Move the row of the background in a (K + 1, ...) classifier from first to last."""
    return rows.roll(-1, dims=0)


def differing_settings(translation: Translation, model: nn.Module) -> list[str]:
    """Return a message for each setting of the model that the weights were not trained with."""
    found = []
    layout, pixels = translation.layout, translation.pixels
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    # A plain backbone has neither.
    if pixels is not None and isinstance(mean, Tensor) and isinstance(std, Tensor):
        is_same_std = pixels.std is None or _is_close(std, pixels.std)
        if not (_is_close(mean, pixels.mean) and is_same_std):
            found.append(
                f"weights of {layout} expect other pixels: set {pixels.settings()}; the model has"
                f" PIXEL_MEAN {_numbers(mean)}, PIXEL_STD {_numbers(std)}"
            )
    in_1x1 = translation.stride_in_1x1
    if in_1x1 is not None and _has_other_stride(model, in_1x1):
        found.append(
            f"bottlenecks of {layout} have their stride in the {'1x1' if in_1x1 else '3x3'}"
            f" convolution: set MODEL.RESNETS.STRIDE_IN_1X1 {in_1x1}"
        )
    return found


def _has_other_stride(model: nn.Module, in_1x1: bool) -> bool:
    """Return whether some bottleneck of the model has its stride in the other convolution."""
    for block in model.modules():
        convs = [getattr(block, name, None) for name in ("conv1", "conv2", "conv3")]
        if all(isinstance(conv, nn.Conv2d) for conv in convs):
            strides = [conv.stride[0] for conv in convs[:2] if isinstance(conv, nn.Conv2d)]
            if max(strides) > 1 and (strides[0] > 1) != in_1x1:
                return True
    return False


def _is_close(values: Tensor, wanted: tuple[float, ...]) -> bool:
    numbers = _numbers(values)
    if len(numbers) != len(wanted):
        return False
    return all(abs(a - b) < _TOLERANCE for a, b in zip(numbers, wanted, strict=True))


def _numbers(values: Tensor) -> list[float]:
    return [round(value, 3) for value in values.flatten().tolist()]
