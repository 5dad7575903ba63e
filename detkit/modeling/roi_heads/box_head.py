"""From the pooled features of a region to a vector that classes and boxes are predicted from.

Legend: R regions over the batch, C channels, H x W cells of a region, F features per region.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec, c2_xavier_fill
from detkit.layers.conv import conv_norm_relu
from detkit.modeling.roi_heads.build import ROI_BOX_HEAD_REGISTRY
from detkit.utils.errors import ContractError


@ROI_BOX_HEAD_REGISTRY.register()
class FastRCNNConvFCHead(nn.Sequential):
    """3x3 convolutions, then fully connected layers, each followed by a ReLU.

    Source: two fully connected layers: Lin et al. 2016, arXiv 1612.03144, section 4.2; with
    convolutions: Wu and He 2018, arXiv 1803.08494, section 4.2.
    """

    @configurable
    def __init__(
        self,
        input_shape: ShapeSpec,
        *,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        conv_norm: str = "",
    ) -> None:
        """Stack the layers.

        Args:
            input_shape: C, H and W of the pooled features.
            conv_dims: Channels of each convolution.
            fc_dims: Width of each fully connected layer.
            conv_norm: Norm after each convolution, as for `get_norm`.

        Raises:
            ValueError: There is no layer at all.
            ValueError: The shape is not known.
        """
        super().__init__()
        channels, height, width = input_shape.channels, input_shape.height, input_shape.width
        if not conv_dims and not fc_dims:
            raise ContractError(
                "the box head needs a layer, but conv_dims and fc_dims are both empty"
            )
        if channels is None or height is None or width is None:
            raise ValueError(
                f"the box head needs channels, height and width of its input, got {input_shape}"
            )
        # Order and names of the layers are those of Detectron2's checkpoints: conv1, ..., fc1, ...
        # The lists are for a subclass that goes through the layers itself.
        self.conv_norm_relus: list[nn.Module] = []
        self.fcs: list[nn.Linear] = []
        for k, dim in enumerate(conv_dims, start=1):
            self.conv_norm_relus.append(conv_norm_relu(channels, dim, conv_norm))
            self.add_module(f"conv{k}", self.conv_norm_relus[-1])
            channels = dim
        self._output_shape = ShapeSpec(channels=channels, height=height, width=width)
        if not fc_dims:
            return
        # Flattened, not averaged: where in the region a feature lies tells the box.
        in_features = channels * height * width
        self.add_module("flatten", nn.Flatten())
        for k, dim in enumerate(fc_dims, start=1):
            self.fcs.append(nn.Linear(in_features, dim))
            self.add_module(f"fc{k}", self.fcs[-1])
            self.add_module(f"fc_relu{k}", nn.ReLU(inplace=True))
            in_features = dim
        # Once all are built, so that a seed gives the weights that it gives in Detectron2.
        for layer in self.fcs:
            c2_xavier_fill(layer)
        self._output_shape = ShapeSpec(channels=in_features)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to arguments."""
        head = cfg.MODEL.ROI_BOX_HEAD
        return {
            "input_shape": input_shape,
            "conv_dims": [head.CONV_DIM] * head.NUM_CONV,
            "fc_dims": [head.FC_DIM] * head.NUM_FC,
            "conv_norm": head.NORM,
        }

    @property
    def output_shape(self) -> ShapeSpec:
        """Shape of the output per region, without height and width if there is an FC layer."""
        return self._output_shape

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, F) for pooled features (R, C, H, W), or (R, F, H, W) without an FC layer."""
        return super().forward(x)
