"""The interface of backbones.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from detkit.layers import ShapeSpec
from detkit.utils.text import did_you_mean


class Backbone(nn.Module, ABC):
    """A network from images to named feature maps.

    A subclass defines `forward` and either sets `_out_features`, `_out_feature_channels` and
    `_out_feature_strides`, or overrides `output_shape`.
    """

    # Detectron2's names: subclasses written for it set them.
    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return feature maps (N, C, H / stride, W / stride) of images (N, 3, H, W), by name."""

    @property
    def size_divisibility(self) -> int:
        """What height and width of the input must be multiples of; 0 for any size."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Further constraints on the padding: see `ImageList.from_tensors`."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature map, by name."""
        shapes = {}
        for name in self._out_features:
            channels = self._out_feature_channels[name]
            shapes[name] = ShapeSpec(channels=channels, stride=self._out_feature_strides[name])
        return shapes


def check_features(where: str, features: Sequence[str], known: Collection[str]) -> None:
    """Check that there is a feature, and that all are known.

    Args:
        where: What asks for them, for the error message: an argument, or a config key.
        features: The names to check.
        known: The names that exist.

    Raises:
        ValueError: There is no feature, or an unknown one; the message has near misses.
    """
    if len(features) == 0:
        raise ValueError(f"{where} needs at least one of {list(known)}: got none")
    for name in features:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"{where} must be of {list(known)}: got {name!r}.{hint}")


def select_features(
    input_shape: Mapping[str, ShapeSpec], names: Sequence[str], key: str
) -> list[ShapeSpec]:
    """Return the shapes of the named features, in the order of the names.

    Args:
        input_shape: Shapes of the backbone's features, by name.
        names: Features that the head needs.
        key: Config key that holds the names, for the error message.

    Raises:
        ValueError: No name is given, or the backbone has no such feature.
    """
    check_features(key, names, input_shape)
    return [input_shape[name] for name in names]
