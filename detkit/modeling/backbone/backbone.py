"""What every backbone offers to the rest of a model.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from detkit.layers import ShapeSpec


class Backbone(nn.Module, ABC):
    """A network from images to named feature maps.

    A subclass writes `forward` and either sets `_out_features`, `_out_feature_channels` and
    `_out_feature_strides`, or overrides `output_shape`.
    """

    _out_features: list[str]
    _out_feature_channels: dict[str, int]
    _out_feature_strides: dict[str, int]

    @abstractmethod
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the feature maps (N, C, H / stride, W / stride) of images (N, 3, H, W), by name."""

    @property
    def size_divisibility(self) -> int:
        """The height and width of the input must be multiples of this; 0 asks for nothing."""
        return 0

    @property
    def padding_constraints(self) -> dict[str, int]:
        """What else the backbone asks of the padding: see `ImageList.from_tensors`."""
        return {}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature map, by name."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._out_features
        }
