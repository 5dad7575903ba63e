"""The convolutions of a region proposal network.

Legend: N images, C channels, A anchors per cell, B numbers per box, H x W cells of a level.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, ShapeSpec
from detkit.modeling.anchor_generator import build_anchor_generator
from detkit.modeling.proposal_generator.build import RPN_HEAD_REGISTRY


@RPN_HEAD_REGISTRY.register()
class StandardRPNHead(nn.Module):
    """3x3 convolutions, then one 1x1 for the objectness and one for the deltas of every anchor; shared by all levels.

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
            ValueError: There is no convolution, or its channels are neither positive nor -1.
        """
        super().__init__()
        channels = _resolve_channels(in_channels, conv_dims)
        convs = [_conv3x3(c_in, c_out) for c_in, c_out in pairwise(channels)]
        # Names of weights as in Detectron2: `conv` for a single one, `conv.conv0`, `conv.conv1`,
        # ... for several.
        self.conv: nn.Module = convs[0] if len(convs) == 1 else nn.Sequential()
        if isinstance(self.conv, nn.Sequential):
            for k, conv in enumerate(convs):
                self.conv.add_module(f"conv{k}", conv)
        self.objectness_logits = nn.Conv2d(channels[-1], num_anchors, kernel_size=1)
        self.anchor_deltas = nn.Conv2d(channels[-1], num_anchors * box_dim, kernel_size=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ValueError: The levels differ in channels, or in the number of anchors per cell.
        """
        anchor_generator = build_anchor_generator(cfg, input_shape)
        return {
            "in_channels": _only(
                [shape.channels for shape in input_shape], "channels", "MODEL.RPN.IN_FEATURES"
            ),
            "num_anchors": _only(
                anchor_generator.num_anchors, "anchors per cell", "MODEL.ANCHOR_GENERATOR"
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


def _conv3x3(in_channels: int, out_channels: int) -> Conv2d:
    # In place: the convolution does not need its output for the gradient, and that of p2 is among
    # the largest maps.
    return Conv2d(
        in_channels, out_channels, kernel_size=3, padding=1, activation=nn.ReLU(inplace=True)
    )


def _resolve_channels(in_channels: int, conv_dims: Sequence[int]) -> list[int]:
    if not conv_dims or not all(dim == -1 or dim > 0 for dim in conv_dims):
        raise ValueError(
            "MODEL.RPN.CONV_DIMS needs a number per convolution, positive or -1 (as the input),"
            f" got {list(conv_dims)}"
        )
    channels = [in_channels]
    for dim in conv_dims:
        channels.append(channels[-1] if dim == -1 else dim)
    return channels


def _only(values: Sequence[int | None], what: str, key: str) -> int:
    """Return the number that all levels share."""
    if len(set(values)) != 1 or values[0] is None:
        raise ValueError(
            f"{key}: the RPN head is shared by all levels, which need the same {what}; got"
            f" {list(values)}"
        )
    return values[0]
