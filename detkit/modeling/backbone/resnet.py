"""ResNet and ResNeXt.

Papers: Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning for Image Recognition, 2015,
arXiv 1512.03385; Saining Xie, Ross Girshick, Piotr Dollar, Zhuowen Tu, Kaiming He: Aggregated Residual Transformations
for Deep Neural Networks, 2016, arXiv 1611.05431.

Legend: N images, C channels, H and W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from detkit.config import CfgNode
from detkit.layers import NORM_NAMES, CNNBlockBase, ShapeSpec
from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.resnet_blocks import BasicBlock, BasicStem, BottleneckBlock, DeformBottleneckBlock
from detkit.utils.near_miss import did_you_mean

_BLOCKS_PER_STAGE = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
_STAGE_NAMES = ("res2", "res3", "res4", "res5")


def make_stage(
    block_class: type[CNNBlockBase], num_blocks: int, *, in_channels: int, out_channels: int, **kwargs: Any
) -> list[CNNBlockBase]:
    """Give the blocks of one stage, each taking what the one before it gives.

    Args:
        block_class: Built with ``in_channels``, ``out_channels`` and the keyword arguments.
        num_blocks: How many.
        in_channels: Channels that the first block takes.
        out_channels: Channels that every block gives.
        **kwargs: Arguments for every block. One whose name ends in ``_per_block`` is a list with a value for each:
            ``stride_per_block=[2, 1, 1]`` gives the blocks ``stride`` 2, 1 and 1.

    Raises:
        ValueError: If such a list has not one value per block.
    """
    blocks = []
    for index in range(num_blocks):
        arguments = {}
        for name, value in kwargs.items():
            if name.endswith("_per_block"):
                if len(value) != num_blocks:
                    raise ValueError(f"{name} needs one value for each of {num_blocks} blocks: got {value}")
                arguments[name.removesuffix("_per_block")] = value[index]
            else:
                arguments[name] = value
        blocks.append(block_class(in_channels=in_channels, out_channels=out_channels, **arguments))
        in_channels = out_channels
    return blocks


class ResNet(Backbone):
    """A stem, and stages of residual blocks that are named ``res2``, ``res3``, ...; optionally a classifier."""

    make_stage = staticmethod(make_stage)

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Build the network.

        Args:
            stem: From image to the input of the first stage.
            stages: The blocks of each stage; usually from ``make_stage``. Stages after the last one that
                ``out_features`` names are left out, so that no parameter goes without a gradient.
            num_classes: K. None builds no classifier.
            out_features: Which maps to give: "stem", "res2", ..., and "linear" with a classifier. None gives the last.
            freeze_at: See ``freeze``.

        Raises:
            ValueError: If a name in ``out_features`` is not known, or there is none.
        """
        super().__init__()
        names = ["stem", *(f"res{number}" for number in range(2, 2 + len(stages)))]
        if num_classes is not None:
            names.append("linear")
        self._out_features = [names[-1]] if out_features is None else list(out_features)
        _check_features("out_features", self._out_features, names)
        last = max(names.index(name) for name in self._out_features)

        self.stem = stem
        self._out_feature_strides = {"stem": stem.stride}
        self._out_feature_channels = {"stem": stem.out_channels}
        self.stage_names = tuple(name for name in names[1 : last + 1] if name != "linear")
        stride, channels = stem.stride, stem.out_channels
        for name, blocks in zip(self.stage_names, stages, strict=False):
            self.add_module(name, nn.Sequential(*blocks))
            for block in blocks:
                stride, channels = stride * block.stride, block.out_channels
            self._out_feature_strides[name], self._out_feature_channels[name] = stride, channels

        self.linear = None
        if num_classes is not None and "linear" in self._out_features:
            self.linear = nn.Linear(channels, num_classes)
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)
        self.freeze(freeze_at)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages, each a sequence of blocks."""
        return [self.get_submodule(name) for name in self.stage_names]  # type: ignore[misc]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Give the maps of ``out_features`` for images (N, C, H, W), by name; "linear" is (N, K) logits."""
        if x.dim() != 4:
            raise ValueError(f"ResNet takes images (N, C, H, W): got shape {tuple(x.shape)}")
        outputs = {}
        for name in ("stem", *self.stage_names):
            x = self.get_submodule(name)(x)
            if name in self._out_features:
                outputs[name] = x
        if self.linear is not None:
            outputs["linear"] = self.linear(x.mean(dim=(2, 3)))
        return outputs

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Give channels and stride of each feature map, by name; of "linear" the classes."""
        return {
            name: ShapeSpec(channels=self.linear.out_features)
            if name == "linear" and self.linear is not None
            else ShapeSpec(channels=self._out_feature_channels[name], stride=self._out_feature_strides[name])
            for name in self._out_features
        }

    def freeze(self, freeze_at: int = 0) -> ResNet:
        """Stop training the first parts; their batch norms become FrozenBatchNorm2d. Common when fine-tuning.

        Args:
            freeze_at: How many parts: 0 none, 1 the stem, 2 the stem and res2, ..., 5 everything up to res5.
        """
        for part in [self.stem, *(block for stage in self.stages[: max(0, freeze_at - 1)] for block in stage)]:
            if freeze_at >= 1:
                part.freeze()  # type: ignore[operator]
        return self

    @staticmethod
    def make_default_stages(
        depth: int, block_class: type[CNNBlockBase] | None = None, **kwargs: Any
    ) -> list[list[CNNBlockBase]]:
        """Give the four stages of a ResNet as in the paper.

        Args:
            depth: 18, 34, 50, 101 or 152.
            block_class: None takes the paper's: basic blocks for 18 and 34, bottlenecks from 50 on.
            **kwargs: Further arguments of ``make_stage``, e.g. ``norm``; not strides and channels, which follow.

        Raises:
            ValueError: If the depth is none of those.
        """
        _check_depth("depth", depth)
        if block_class is None:
            block_class = BasicBlock if depth < 50 else BottleneckBlock
        out_channels = [64, 128, 256, 512] if depth < 50 else [256, 512, 1024, 2048]
        stages = []
        in_channels = 64
        for num_blocks, stride, channels in zip(_BLOCKS_PER_STAGE[depth], (1, 2, 2, 2), out_channels, strict=True):
            if issubclass(block_class, BottleneckBlock):
                kwargs["bottleneck_channels"] = channels // 4
            strides = [stride] + [1] * (num_blocks - 1)
            stages.append(
                make_stage(
                    block_class,
                    num_blocks,
                    in_channels=in_channels,
                    out_channels=channels,
                    stride_per_block=strides,
                    **kwargs,
                )
            )
            in_channels = channels
        return stages


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that ``MODEL.RESNETS`` describes, frozen up to ``MODEL.BACKBONE.FREEZE_AT``.

    Depths 18 and 34 have 64 channels in res2, where the deeper ones have 256: for them a ``RES2_OUT_CHANNELS`` left at
    its default 256 means 64, and any other value means itself.

    Raises:
        ValueError: If a setting is out of range, or does not go with the depth; the message names the key.
    """
    _check_settings(cfg)
    resnets = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels or 3, resnets.STEM_OUT_CHANNELS, resnets.NORM)
    num_stages = max((_STAGE_NAMES.index(name) + 1 for name in resnets.OUT_FEATURES if name != "stem"), default=0)
    stages = []
    in_channels = stem.out_channels
    for index in range(num_stages):
        stages.append(make_configured_stage(resnets, index, in_channels))
        in_channels = stages[-1][-1].out_channels
    return ResNet(stem, stages, out_features=resnets.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)


def make_configured_stage(resnets: CfgNode, index: int, in_channels: int) -> list[CNNBlockBase]:
    """Give the blocks of one stage, of res2 (index 0) to res5 (index 3), as ``MODEL.RESNETS`` describes them."""
    num_blocks = _BLOCKS_PER_STAGE[resnets.DEPTH][index]
    dilation = resnets.RES5_DILATION if _STAGE_NAMES[index] == "res5" else 1
    # A dilated stage keeps the resolution: the dilation stands in for the stride.
    first_stride = 1 if index == 0 or dilation == 2 else 2
    block_class, arguments = _block(resnets, index, dilation)
    return make_stage(
        block_class,
        num_blocks,
        in_channels=in_channels,
        out_channels=_res2_out_channels(resnets) * 2**index,
        stride_per_block=[first_stride] + [1] * (num_blocks - 1),
        norm=resnets.NORM,
        **arguments,
    )


def _block(resnets: CfgNode, index: int, dilation: int) -> tuple[type[CNNBlockBase], dict[str, Any]]:
    """Give the class of a stage's blocks, and the arguments that only this class has."""
    if resnets.DEPTH < 50:
        return BasicBlock, {"dilation": dilation}
    arguments = {
        "bottleneck_channels": _bottleneck_channels(resnets, index),
        "num_groups": resnets.NUM_GROUPS,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
        "dilation": dilation,
    }
    if not resnets.DEFORM_ON_PER_STAGE[index]:
        return BottleneckBlock, arguments
    arguments["deform_modulated"] = resnets.DEFORM_MODULATED
    arguments["deform_num_groups"] = resnets.DEFORM_NUM_GROUPS
    return DeformBottleneckBlock, arguments


def _bottleneck_channels(resnets: CfgNode, index: int) -> int:
    return resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index


def _res2_out_channels(resnets: CfgNode) -> int:
    if resnets.DEPTH < 50 and resnets.RES2_OUT_CHANNELS == 256:
        return 64
    return resnets.RES2_OUT_CHANNELS


def _check_settings(cfg: CfgNode) -> None:
    resnets = cfg.MODEL.RESNETS
    _check_depth("MODEL.RESNETS.DEPTH", resnets.DEPTH)
    _check_features("MODEL.RESNETS.OUT_FEATURES", resnets.OUT_FEATURES, ["stem", *_STAGE_NAMES])
    if resnets.NORM not in NORM_NAMES:
        hint = did_you_mean(resnets.NORM, NORM_NAMES)
        raise ValueError(f"MODEL.RESNETS.NORM must be one of {list(NORM_NAMES)}: got {resnets.NORM!r}.{hint}")
    if resnets.RES5_DILATION not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2: got {resnets.RES5_DILATION}")
    if cfg.MODEL.BACKBONE.FREEZE_AT not in range(6):
        raise ValueError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to 5: got {cfg.MODEL.BACKBONE.FREEZE_AT}")
    _check_deformable(resnets)
    if resnets.DEPTH < 50:
        _check_basic_block_settings(resnets)


def _check_deformable(resnets: CfgNode) -> None:
    flags = list(resnets.DEFORM_ON_PER_STAGE)
    if len(flags) != len(_STAGE_NAMES):
        raise ValueError(f"MODEL.RESNETS.DEFORM_ON_PER_STAGE needs one value for each of {_STAGE_NAMES}: got {flags}")
    if not any(flags):
        return
    if resnets.DEPTH < 50:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE must be False four times for depth {resnets.DEPTH}: only bottlenecks "
            f"(depth 50 and more) can be deformable, got {flags}"
        )
    for index, is_on in enumerate(flags):
        channels = _bottleneck_channels(resnets, index)
        if is_on and channels % resnets.DEFORM_NUM_GROUPS != 0:
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS must divide the {channels} channels of the bottlenecks in "
                f"{_STAGE_NAMES[index]}: got {resnets.DEFORM_NUM_GROUPS}"
            )


def _check_basic_block_settings(resnets: CfgNode) -> None:
    for key, only in (("NUM_GROUPS", 1), ("WIDTH_PER_GROUP", 64)):
        if resnets[key] != only:
            depth = f"depth {resnets.DEPTH}, whose blocks have no bottleneck"
            raise ValueError(f"MODEL.RESNETS.{key} must be {only} for {depth}: got {resnets[key]}")


def _check_depth(where: str, depth: int) -> None:
    if depth not in _BLOCKS_PER_STAGE:
        raise ValueError(f"{where} must be one of {list(_BLOCKS_PER_STAGE)}: got {depth}")


def _check_features(where: str, features: Sequence[str], known: Sequence[str]) -> None:
    if len(features) == 0:
        raise ValueError(f"{where} needs at least one of {list(known)}: got none")
    for name in features:
        if name not in known:
            raise ValueError(f"{where} must be of {list(known)}: got {name!r}.{did_you_mean(name, known)}")
