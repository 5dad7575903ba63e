"""Feature pyramid networks.

Papers: Tsung-Yi Lin, Piotr Dollar, Ross Girshick, Kaiming He, Bharath Hariharan, Serge Belongie:
Feature Pyramid Networks for Object Detection, 2016, arXiv 1612.03144; for P6 and P7: Tsung-Yi Lin
et al.: Focal Loss for Dense Object Detection, 2017, arXiv 1708.02002.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode
from detkit.layers import Conv2d, ShapeSpec, c2_xavier_fill, get_norm
from detkit.modeling.backbone.backbone import Backbone, check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.resnet_config import build_resnet_backbone
from detkit.utils.errors import ConfigError, ContractError

_UPSAMPLE_MODES = ("nearest", "bilinear", "bicubic")


class FPN(Backbone):
    """A pyramid of feature maps with equal channels, each merged with the coarser ones.

    Every input map goes through a 1x1 convolution, is merged with the upsampled map above it, and
    goes through a 3x3 convolution. The levels are named by their stride: `p2` has stride 2^2, `p5`
    has 2^5. Of several maps with the same stride, as a dilated stage gives, the second has the next
    number.

    Example:
        >>> import torch
        >>> from detkit.modeling.backbone import BasicStem, ResNet
        >>> stages = ResNet.make_default_stages(18)
        >>> resnet = ResNet(BasicStem(), stages, out_features=["res3", "res4", "res5"])
        >>> fpn = FPN(resnet, ["res3", "res4", "res5"], 256, top_block=LastLevelMaxPool())
        >>> {name: tuple(x.shape[1:]) for name, x in fpn(torch.zeros(1, 3, 64, 96)).items()}
        {'p3': (256, 8, 12), 'p4': (256, 4, 6), 'p5': (256, 2, 3), 'p6': (256, 1, 2)}
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        out_channels: int,
        norm: str = "",
        top_block: Any = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
        upsample_mode: str = "nearest",
        align_corners: bool = False,
    ) -> None:
        """Build the pyramid.

        Args:
            bottom_up: The network whose maps are merged.
            in_features: Names of the maps, finest first. Stages between them may be left out.
            out_channels: C of every level.
            norm: Norm after each convolution, as in `get_norm`. Without a norm the convolutions
                have a bias.
            top_block: Computes further, coarser levels: a module with `in_feature` (the name of its
                input, a map of the bottom-up network or of the pyramid) and `num_levels` (the
                number of maps in the list that its `forward` returns).
            fuse_type: "sum" or "avg" of a map and the one above it.
            square_pad: Side of the square that images are padded to; 0 for no square.
            upsample_mode: How the map above is upsampled: "nearest" as in the paper, "bilinear" or
                "bicubic".
            align_corners: Whether the outermost pixels of the two maps lie on each other; for
                "bilinear" and "bicubic".

        Raises:
            ValueError: A feature is unknown.
            ValueError: Strides fall, or are no powers of two.
            ValueError: `fuse_type` or `upsample_mode` is unknown.
        """
        super().__init__()
        shapes = bottom_up.output_shape()
        _check_in_features(in_features, shapes)
        if fuse_type not in ("sum", "avg"):
            raise ContractError(f"fuse_type must be 'sum' or 'avg': got {fuse_type!r}")
        if upsample_mode not in _UPSAMPLE_MODES:
            raise ValueError(
                f"upsample_mode must be one of {list(_UPSAMPLE_MODES)}: got {upsample_mode!r}"
            )
        strides = [shapes[name].stride or 0 for name in in_features]
        self._numbers = _level_numbers(strides)

        self.bottom_up = bottom_up
        for name, number in zip(in_features, self._numbers, strict=True):
            lateral = _fpn_conv(shapes[name].channels or 0, out_channels, 1, norm)
            self.add_module(f"fpn_lateral{number}", lateral)
            self.add_module(f"fpn_output{number}", _fpn_conv(out_channels, out_channels, 3, norm))
        self.top_block: Any = top_block
        self.in_features = tuple(in_features)
        self._fuse_type = fuse_type
        self._square_pad = square_pad
        self._upsample_mode = upsample_mode
        # torch refuses the argument for the other modes.
        self._align_corners = None if upsample_mode == "nearest" else align_corners
        self._size_divisibility = math.lcm(strides[-1], bottom_up.size_divisibility or 1)

        numbers = list(self._numbers)
        for _ in range(top_block.num_levels if top_block is not None else 0):
            numbers.append(numbers[-1] + 1)
            strides.append(strides[-1] * 2)
        self._out_features = [f"p{number}" for number in numbers]
        self._out_feature_strides = dict(zip(self._out_features, strides, strict=True))
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        """The stride of the coarsest merged map, or a multiple that the bottom-up network needs."""
        # With other sizes maps are not larger than the next by exactly the ratio of strides.
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The square that images are padded to, if any."""
        return {"square_size": self._square_pad}

    @property
    def lateral_convs(self) -> list[nn.Module]:
        """The 1x1 convolutions, coarsest map first, for a subclass with a `forward` of its own."""
        return [self.get_submodule(f"fpn_lateral{number}") for number in self._numbers[::-1]]

    @property
    def output_convs(self) -> list[nn.Module]:
        """The 3x3 convolutions, coarsest level first."""
        return [self.get_submodule(f"fpn_output{number}") for number in self._numbers[::-1]]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels (N, C, H / stride, W / stride) of images (N, 3, H, W), finest first.

        Sides are rounded as the bottom-up network rounds them; models pad images to multiples of
        `size_divisibility`.
        """
        bottom_up = self.bottom_up(x)
        coarse_to_fine = list(zip(self.in_features, self._numbers, strict=True))[::-1]
        merged: dict[int, Tensor] = {}
        above = None
        for name, number in coarse_to_fine:
            lateral = self.get_submodule(f"fpn_lateral{number}")(bottom_up[name])
            if above is not None:
                # Nearest in the paper (section 3). To the size of the map, as in torchvision: sides
                # need not be multiples of the stride, and stages may be left out.
                upsampled = F.interpolate(
                    merged[above],
                    size=lateral.shape[-2:],
                    mode=self._upsample_mode,
                    align_corners=self._align_corners,
                )
                # In place: a convolution does not need its own output in the backward pass.
                lateral += upsampled
                if self._fuse_type == "avg":
                    lateral /= 2
            merged[number] = lateral
            above = number
        # A 3x3 convolution after merging reduces the aliasing of upsampling (section 3).
        levels: dict[str, Tensor] = {}
        for number in self._numbers:
            levels[f"p{number}"] = self.get_submodule(f"fpn_output{number}")(merged[number])
        if self.top_block is not None:
            # RetinaNet's P6 reads C5, a map of the bottom-up network; the others read a level.
            source = self.top_block.in_feature
            further = self.top_block(bottom_up[source] if source in bottom_up else levels[source])
            levels.update(zip(self._out_features[len(levels) :], further, strict=True))
        return levels


class LastLevelMaxPool(nn.Module):
    """One more level for proposals of large objects: every second pixel of P5 as P6."""

    num_levels = 1

    def __init__(self, in_feature: str = "p5") -> None:
        super().__init__()
        self.in_feature = in_feature

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return [(N, C, H / 2, W / 2)]."""
        # A window of one pixel: the paper's P6 is P5 subsampled (section 4.1).
        return [F.max_pool2d(x, kernel_size=1, stride=2)]


class LastLevelP6P7(nn.Module):
    """Two more levels, P6 from C5 (or P5) and P7 from P6, as in RetinaNet."""

    num_levels = 2

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5") -> None:
        super().__init__()
        self.in_feature = in_feature
        # Plain `nn.Conv2d`: no norm, and the ReLU between them is in `forward`.
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        c2_xavier_fill(self.p6)
        c2_xavier_fill(self.p7)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return [(N, C, H / 2, W / 2), (N, C, H / 4, W / 4)]."""
        p6 = self.p6(x)
        # Not in place: P6 is a level itself, without the ReLU.
        return [p6, self.p7(F.relu(p6))]


def build_top_block(
    kind: str, channels: int, coarsest_level: str, c5: tuple[str, int] | None = None
) -> LastLevelMaxPool | LastLevelP6P7 | None:
    """Build the top block that `MODEL.FPN.TOP_BLOCK` names; None for "none".

    Args:
        kind: Its name.
        channels: C of every level.
        coarsest_level: The level below the block.
        c5: Name and channels of the map that P6 is made of; None makes it of the coarsest level.
    """
    if kind == "LastLevelMaxPool":
        return LastLevelMaxPool(coarsest_level)
    if kind == "LastLevelP6P7":
        in_feature, in_channels = c5 or (coarsest_level, channels)
        return LastLevelP6P7(in_channels, channels, in_feature)
    return None


def build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the pyramid of Faster R-CNN: a level per `MODEL.FPN.IN_FEATURES`, one by max-pooling.

    Raises:
        ConfigError: A setting of `MODEL.FPN` is out of range or does not match the backbone.
    """
    return _build_fpn(cfg, bottom_up, "LastLevelMaxPool")


def build_retinanet_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Build the pyramid of RetinaNet: a level per `MODEL.FPN.IN_FEATURES`, two by convolution.

    These two, P6 and P7 in the paper, are computed from the coarsest of the features, res5 there;
    with `MODEL.FPN.P6_FROM` "P5" from the coarsest level, as in torchvision.

    Raises:
        ConfigError: A setting of `MODEL.FPN` is out of range or does not match the backbone.
    """
    return _build_fpn(cfg, bottom_up, "LastLevelP6P7")


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet with the pyramid of `build_fpn`.

    Raises:
        ConfigError: A setting is out of range; the message names the key.
    """
    return build_fpn(cfg, build_resnet_backbone(cfg, input_shape))


@BACKBONE_REGISTRY.register()
def build_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build a ResNet with the pyramid of `build_retinanet_fpn`; see `build_resnet_fpn_backbone`."""
    return build_retinanet_fpn(cfg, build_resnet_backbone(cfg, input_shape))


def _build_fpn(cfg: CfgNode, bottom_up: Backbone, usual_top_block: str) -> FPN:
    fpn = cfg.MODEL.FPN
    shapes = _in_feature_shapes(cfg, bottom_up)
    coarsest_level = f"p{_level_numbers([shape.stride or 0 for shape in shapes])[-1]}"
    c5 = (fpn.IN_FEATURES[-1], shapes[-1].channels or 0) if fpn.P6_FROM == "C5" else None
    kind = fpn.TOP_BLOCK or usual_top_block
    top_block = build_top_block(kind, fpn.OUT_CHANNELS, coarsest_level, c5)
    try:
        return FPN(
            bottom_up,
            fpn.IN_FEATURES,
            fpn.OUT_CHANNELS,
            fpn.NORM,
            top_block,
            fpn.FUSE_TYPE,
            fpn.SQUARE_PAD,
            fpn.UPSAMPLE_MODE,
            fpn.ALIGN_CORNERS,
        )
    except ValueError as error:
        raise ConfigError(f"MODEL.FPN: {error}") from error


def _in_feature_shapes(cfg: CfgNode, bottom_up: Backbone) -> list[ShapeSpec]:
    shapes = bottom_up.output_shape()
    try:
        _check_in_features(cfg.MODEL.FPN.IN_FEATURES, shapes)
    except ValueError as error:
        raise ConfigError(
            f"MODEL.FPN.IN_FEATURES: {error} (what {type(bottom_up).__name__} gives, chosen by"
            " MODEL.RESNETS.OUT_FEATURES or its like)"
        ) from error
    return [shapes[name] for name in cfg.MODEL.FPN.IN_FEATURES]


def _fpn_conv(in_channels: int, out_channels: int, kernel_size: int, norm: str) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        padding=kernel_size // 2,
        bias=not norm,
        norm=get_norm(norm, out_channels),
    )
    # Not MSRA's, which is for a ReLU: no ReLU follows these convolutions.
    c2_xavier_fill(conv)
    return conv


def _level_numbers(strides: Sequence[int]) -> list[int]:
    """Return the log of each stride; of equal strides, the second has the next number."""
    numbers: list[int] = []
    for stride in strides:
        number = int(math.log2(stride))
        numbers.append(max(number, numbers[-1] + 1) if numbers else number)
    return numbers


def _assert_strides_are_log2_contiguous(strides: Sequence[int]) -> None:
    """Refuse strides of which one is not twice the one before: for pyramids of users' own.

    Raises:
        AssertionError: They are not.
    """
    for finer, coarser in itertools.pairwise(strides):
        if coarser != 2 * finer:
            raise ContractError(f"stride {coarser} is not twice stride {finer}: {list(strides)}")


def _check_in_features(in_features: Sequence[str], shapes: dict[str, ShapeSpec]) -> None:
    check_features("in_features", in_features, shapes)
    strides = [shapes[name].stride or 0 for name in in_features]
    if any(stride < 1 or stride & (stride - 1) for stride in strides):
        raise ValueError(
            f"the strides must be powers of two, as levels are named by them: {strides}"
        )
    if any(coarse < fine for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(
            f"the stride must not fall from feature to feature: {list(in_features)} have {strides}"
        )
