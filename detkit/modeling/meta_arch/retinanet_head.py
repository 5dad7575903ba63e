"""The two subnets that RetinaNet slides over every level of a pyramid.

Source: Lin et al. 2017, arXiv 1708.02002, section 4.

Legend: N images, C channels, L levels, A anchors per cell, K classes, H x W cells of a level.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, CycleBatchNormList, ShapeSpec, get_norm
from detkit.modeling.anchor_generator import build_anchor_generator


class RetinaNetHead(nn.Module):
    """A subnet of 3x3 convolutions for the classes and one for the boxes; the levels share them, the tasks do not.

    Batch norm keeps statistics per level, since what it sees there differs; its weights are shared.
    Any other norm is shared whole.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: Sequence[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: Sequence[int],
        norm: str = "",
        prior_prob: float = 0.01,
    ) -> None:
        """Build the head.

        Args:
            input_shape: Shapes of the L levels, all of C channels.
            num_classes: K.
            num_anchors: A, the same on every level.
            conv_dims: Channels of each convolution of a subnet.
            norm: Name of the norm after each of them, as in `get_norm`.
            prior_prob: Score of every class at the start, in (0, 1): nearly all answers are no, and
                a start from 0.5 would drown the few objects.

        Raises:
            ValueError: The levels differ in channels, or the probability is outside.
        """
        super().__init__()
        if not 0 < prior_prob < 1:
            raise ValueError(
                f"MODEL.RETINANET.PRIOR_PROB must lie between 0 and 1, got {prior_prob}"
            )
        in_channels = _only(
            [shape.channels for shape in input_shape], "channels", "MODEL.RETINANET.IN_FEATURES"
        )
        channels = [in_channels, *conv_dims]
        self.num_levels = len(input_shape)
        self.cls_subnet = _subnet(channels, norm, self.num_levels)
        self.bbox_subnet = _subnet(channels, norm, self.num_levels)
        self.cls_score = Conv2d(channels[-1], num_anchors * num_classes, kernel_size=3, padding=1)
        self.bbox_pred = Conv2d(channels[-1], num_anchors * 4, kernel_size=3, padding=1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict[str, Any]:
        """Map config keys to arguments.

        Raises:
            ValueError: The levels differ in the number of anchors per cell.
        """
        num_anchors = build_anchor_generator(cfg, input_shape).num_anchors
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.RETINANET.NUM_CLASSES,
            "num_anchors": _only(num_anchors, "anchors per cell", "MODEL.ANCHOR_GENERATOR"),
            "conv_dims": [input_shape[0].channels] * cfg.MODEL.RETINANET.NUM_CONVS,
            "norm": cfg.MODEL.RETINANET.NORM,
            "prior_prob": cfg.MODEL.RETINANET.PRIOR_PROB,
        }

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Predict for every anchor of every level.

        Args:
            features: L maps (N, C, H, W).

        Returns:
            Per level the class logits (N, A * K, H, W): those of anchor a are the channels K a to K
            a + K - 1. Per level the deltas (N, A * 4, H, W), likewise.

        Raises:
            ValueError: There are not L features.
        """
        if len(features) != self.num_levels:
            raise ValueError(
                f"the head is built for {self.num_levels} levels, got {len(features)} features"
            )
        logits = [
            self.cls_score(_apply(self.cls_subnet, x, level)) for level, x in enumerate(features)
        ]
        deltas = [
            self.bbox_pred(_apply(self.bbox_subnet, x, level)) for level, x in enumerate(features)
        ]
        return logits, deltas


def _subnet(channels: Sequence[int], norm: str, num_levels: int) -> nn.Sequential:
    make_norm = _norm_per_level(norm, num_levels)
    layers: list[nn.Module] = []
    for c_in, c_out in pairwise(channels):
        layers.append(Conv2d(c_in, c_out, kernel_size=3, padding=1))
        norm_layer = make_norm(c_out)
        layers += [] if norm_layer is None else [norm_layer]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def _norm_per_level(norm: str, num_levels: int) -> Callable[[int], nn.Module | None]:
    if norm in ("BN", "SyncBN"):
        return lambda channels: CycleBatchNormList(num_levels, norm, channels)
    return lambda channels: get_norm(norm, channels)


def _apply(subnet: nn.Sequential, x: Tensor, level: int) -> Tensor:
    for layer in subnet:
        x = layer(x, level) if isinstance(layer, CycleBatchNormList) else layer(x)
    return x


def _only(values: Sequence[int | None], what: str, key: str) -> int:
    """Return the number that all levels share."""
    if len(set(values)) != 1 or values[0] is None:
        raise ValueError(
            f"{key}: the RetinaNet head is shared by all levels, which need the same {what}; got"
            f" {list(values)}"
        )
    return values[0]
