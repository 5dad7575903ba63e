"""RegNet X and Y.

Paper: Ilija Radosavovic, Raj Prateek Kosaraju, Ross Girshick, Kaiming He, Piotr Dollar: Designing
Network Design Spaces, 2020, arXiv 2003.13678. Names of layers are those of its code, pycls.

Legend: N images, C channels, H and W height and width, S stride.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import CheckpointedSequential, CNNBlockBase, ShapeSpec, get_norm
from detkit.layers.conv import folded
from detkit.layers.norm import fixed_norm
from detkit.modeling.backbone.backbone import Backbone, check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.channel_attention import SqueezeExcitation
from detkit.modeling.backbone.fpn import FPN, build_fpn, build_retinanet_fpn

_WIDTH_MULTIPLE = 8


def regnet_stages(depth: int, w_0: int, w_a: float, w_m: float) -> list[tuple[int, int]]:
    """Return the width and number of blocks of each stage (section 3.3 of the paper).

    The widths of the blocks lie on the line `w_0 + w_a * block`; rounded to powers of `w_m` times
    `w_0`, and to multiples of 8, few different ones remain: the stages.

    Example:
        >>> regnet_stages(depth=23, w_0=96, w_a=38.65, w_m=2.43)  # RegNetX-4.0GF
        [(96, 2), (232, 5), (568, 14), (1376, 2)]

    Raises:
        ValueError: A number is out of range.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    if w_0 < _WIDTH_MULTIPLE or w_0 % _WIDTH_MULTIPLE:
        raise ValueError(f"w_0 must be a multiple of {_WIDTH_MULTIPLE}, got {w_0}")
    if w_a < 0:
        raise ValueError(f"w_a must be at least 0, got {w_a}")
    if not w_m > 1:
        raise ValueError(f"w_m must be above 1, got {w_m}")
    counts: dict[int, int] = {}
    for block in range(depth):
        power = round(math.log((w_0 + w_a * block) / w_0) / math.log(w_m))
        width = round(w_0 * w_m**power / _WIDTH_MULTIPLE) * _WIDTH_MULTIPLE
        counts[width] = counts.get(width, 0) + 1
    return list(counts.items())


def _conv(in_channels: int, out_channels: int, kernel_size: int, **kwargs: Any) -> nn.Conv2d:
    conv = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False, **kwargs
    )
    # The fan of pycls, which does not divide by the groups as torch's does.
    nn.init.normal_(conv.weight, std=math.sqrt(2.0 / (kernel_size**2 * out_channels)))
    return conv


def _convolve(conv: nn.Module, norm: nn.Module | None, x: Tensor) -> Tensor:
    """Return the map after a convolution and its norm, in one pass if the norm is fixed."""
    # As `layers.Conv2d` does; but there the norm is a part of the convolution, and named so.
    assert isinstance(conv, nn.Conv2d)
    fixed = fixed_norm(norm)
    x = conv._conv_forward(x, *folded(conv, conv.weight, conv.bias, fixed))
    return x if fixed is not None or norm is None else norm(x)


class RegNetStem(CNNBlockBase):
    """A 3x3 convolution with stride 2, and no pooling."""

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, stride=2)
        self.conv = _conv(in_channels, out_channels, 3, stride=2)
        self.bn = get_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / 2, W / 2)."""
        return _convolve(self.conv, self.bn, x).relu_()


class _Transform(nn.Module):
    """1x1, 3x3 with groups, squeeze-and-excitation, and 1x1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        groups: int,
        squeezed: int,
        norm: str,
    ) -> None:
        super().__init__()
        self.a = _conv(in_channels, out_channels, 1)
        self.a_bn = get_norm(norm, out_channels)
        self.b = _conv(out_channels, out_channels, 3, stride=stride, groups=groups)
        self.b_bn = get_norm(norm, out_channels)
        self.se = SqueezeExcitation(out_channels, squeezed) if squeezed else None
        self.c = _conv(out_channels, out_channels, 1)
        self.c_bn = get_norm(norm, out_channels)
        if isinstance(self.c_bn, nn.BatchNorm2d | nn.SyncBatchNorm | nn.GroupNorm):
            # Each block starts as its shortcut (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
            nn.init.zeros_(self.c_bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = _convolve(self.a, self.a_bn, x).relu_()
        x = _convolve(self.b, self.b_bn, x).relu_()
        if self.se is not None:
            x = self.se(x)
        return _convolve(self.c, self.c_bn, x)


class RegNetBlock(CNNBlockBase):
    """The paper's residual block, whose middle is as wide as its ends (figure 4)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        group_width: int,
        se_ratio: float,
        norm: str,
    ) -> None:
        """Build the block.

        Args:
            in_channels: Channels of the input.
            out_channels: Channels of the output.
            stride: S
            group_width: Channels in each group of the 3x3 convolution; divides `out_channels`.
            se_ratio: Channels in the middle of squeeze-and-excitation, per channel of the input of
                the block; 0 for none.
            norm: As in `get_norm`.
        """
        super().__init__(in_channels, out_channels, stride)
        self.proj: nn.Module | None = None
        if in_channels != out_channels or stride != 1:
            self.proj = _conv(in_channels, out_channels, 1, stride=stride)
            self.bn = get_norm(norm, out_channels)
        groups, squeezed = out_channels // group_width, round(in_channels * se_ratio)
        self.f = _Transform(in_channels, out_channels, stride, groups, squeezed, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H / S, W / S)."""
        out = self.f(x)
        out += x if self.proj is None else _convolve(self.proj, self.bn, x)
        return out.relu_()


class RegNet(Backbone):
    """A stem of stride 2 and stages `s1`, `s2`, ..., each of which halves the resolution.

    Example:
        >>> import torch
        >>> x_200mf = {"depth": 13, "w_0": 24, "w_a": 36.44, "w_m": 2.49, "group_width": 8}
        >>> regnet = RegNet(**x_200mf, out_features=["s2"])
        >>> {name: tuple(x.shape) for name, x in regnet(torch.zeros(1, 3, 64, 96)).items()}
        {'s2': (1, 56, 8, 12)}
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int = 3,
        stem_width: int = 32,
        depth: int,
        w_0: int,
        w_a: float,
        w_m: float,
        group_width: int,
        se_ratio: float = 0.0,
        norm: str = "BN",
        freeze_at: int = 0,
        out_features: Sequence[str],
        checkpoint: bool = False,
    ) -> None:
        """Build the network.

        Args:
            in_channels: Channels of the images.
            stem_width: Channels of the stem.
            depth: Number of blocks.
            w_0: See `regnet_stages`.
            w_a: Likewise.
            w_m: Likewise.
            group_width: Channels in each group of the 3x3 convolutions; widths of stages are
                rounded to multiples of it.
            se_ratio: See `RegNetBlock`; 0 is RegNet X, the paper's 0.25 is RegNet Y.
            norm: As in `get_norm`.
            freeze_at: Number of frozen parts: 1 the stem, 2 the stem and s1, ...
            out_features: Names of the maps to return: "stem", "s1", "s2", ... Later stages are not
                built.
            checkpoint: Keep only the input of each block in training, and compute the rest again in
                the backward pass: less memory, more time, the same gradients.

        Raises:
            ValueError: A number is out of range, or a name is unknown.
        """
        super().__init__()
        if se_ratio < 0:
            raise ValueError(f"se_ratio must be at least 0, got {se_ratio}")
        stages = regnet_stages(depth, w_0, w_a, w_m)
        names = ["stem", *(f"s{number}" for number in range(1, 1 + len(stages)))]
        check_features("out_features", out_features, names)
        self._out_features = list(out_features)
        self.stem = RegNetStem(in_channels, stem_width, norm)
        channels, stride = stem_width, self.stem.stride
        self._out_feature_channels, self._out_feature_strides = {"stem": channels}, {"stem": stride}
        last = max(names.index(name) for name in out_features)
        self.stage_names = tuple(names[1 : last + 1])
        # Not strict: there may be more stages than are built.
        for name, (width, num_blocks) in zip(self.stage_names, stages, strict=False):
            group = min(group_width, width)
            width = max(group, round(width / group) * group)
            stage = CheckpointedSequential() if checkpoint else nn.Sequential()
            for index in range(num_blocks):
                block = RegNetBlock(
                    channels,
                    width,
                    stride=2 if index == 0 else 1,
                    group_width=group,
                    se_ratio=se_ratio,
                    norm=norm,
                )
                stage.add_module(f"b{index + 1}", block)
                channels = width
            self.add_module(name, stage)
            stride *= 2
            self._out_feature_channels[name], self._out_feature_strides[name] = channels, stride
        self._freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Map config keys to arguments."""
        regnet = cfg.MODEL.REGNET
        return {
            "in_channels": input_shape.channels or 3,
            "stem_width": regnet.STEM_WIDTH,
            "depth": regnet.DEPTH,
            "w_0": regnet.W_0,
            "w_a": regnet.W_A,
            "w_m": regnet.W_M,
            "group_width": regnet.GROUP_WIDTH,
            "se_ratio": regnet.SE_RATIO,
            "norm": regnet.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "out_features": regnet.OUT_FEATURES,
            "checkpoint": regnet.CHECKPOINT,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps of images (N, C, H, W), by name."""
        outputs = {}
        for name in ("stem", *self.stage_names):
            x = self.get_submodule(name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def parameter_stages(self) -> dict[str, int]:
        """Return each parameter's stage: 0 the stem, 1 s1, ..."""
        parts = ["stem", *self.stage_names]
        return {name: parts.index(name.partition(".")[0]) for name, _ in self.named_parameters()}

    def _freeze(self, freeze_at: int) -> None:
        for name in ("stem", *self.stage_names)[: max(0, freeze_at)]:
            for block in self.get_submodule(name).modules():
                if isinstance(block, CNNBlockBase):
                    block.freeze()


@BACKBONE_REGISTRY.register()
def build_regnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RegNet:
    """Build the RegNet that `MODEL.REGNET` describes.

    Raises:
        ConfigError: A setting is out of range; the message names the key.
    """
    return RegNet(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_regnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a RegNet with the pyramid of `build_fpn`; see `build_regnet_backbone`."""
    return build_fpn(cfg, RegNet(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_regnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a RegNet with the pyramid of `build_retinanet_fpn`; see `build_regnet_backbone`."""
    return build_retinanet_fpn(cfg, RegNet(cfg, input_shape))
