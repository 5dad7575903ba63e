"""The convolutions of a region proposal network.

Legend: N images, C channels, A anchors per cell, B numbers per box, H x W cells of a level.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, ShapeSpec
from detkit.modeling.anchor_generator import build_anchor_generator, same_on_all_levels
from detkit.modeling.proposal_generator.build import RPN_HEAD_REGISTRY


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions, then a 1x1 each for objectness and deltas. All levels share them.

    Source: Ren et al. 2015, arXiv 1506.01497, section 3.1.
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        num_anchors: int,
        box_dim: int = 4,
        conv_dims: Sequence[int] = (-1,),
    ) -> None:
        """Build the head.

        Args:
            in_channels: C of every level.
            num_anchors: A, the same on every level.
            box_dim: B, the deltas per anchor.
            conv_dims: Channels of each 3x3 convolution; -1 keeps those of its input.

        Raises:
            ValueError: There is no convolution.
            ValueError: Channels are neither positive nor -1.
        """
        super().__init__()
        if not conv_dims or not all(dim == -1 or dim > 0 for dim in conv_dims):
            raise ValueError(
                "conv_dims must have a number per convolution, positive or -1 (as the input), got"
                f" {list(conv_dims)}"
            )
        convs: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for k, dim in enumerate(conv_dims):
            out_channels = channels if dim == -1 else dim
            # The ReLU works in place: the convolution does not need its output for the gradient,
            # and that of p2 is among the largest maps.
            relu = nn.ReLU(inplace=True)
            convs[f"conv{k}"] = Conv2d(
                channels, out_channels, kernel_size=3, padding=1, activation=relu
            )
            channels = out_channels
        # Names of weights as in Detectron2: `conv` for a single one, `conv.conv0`, `conv.conv1`,
        # ... for several.
        self.conv = convs["conv0"] if len(convs) == 1 else nn.Sequential(convs)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * box_dim, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ConfigError: The levels differ in channels, or in the number of anchors per cell.
        """
        anchor_generator = build_anchor_generator(cfg, input_shape)
        channels = [shape.channels for shape in input_shape]
        num_anchors = anchor_generator.num_anchors
        return {
            "in_channels": same_on_all_levels(channels, "channels", "MODEL.RPN.IN_FEATURES"),
            "num_anchors": same_on_all_levels(
                num_anchors, "anchors per cell", "MODEL.ANCHOR_GENERATOR"
            ),
            "box_dim": anchor_generator.box_dim,
            "conv_dims": cfg.MODEL.RPN.CONV_DIMS,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict for every anchor of every level.

        Args:
            features: Maps (N, C, H, W).

        Returns:
            Per level the objectness logits (N, A, H, W). Per level the deltas (N, A * B, H, W):
            those of anchor a are the channels B a to B a + B - 1.
        """
        hidden = [self.conv(x) for x in features]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]
