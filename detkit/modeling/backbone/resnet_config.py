"""Build a ResNet from `MODEL.RESNETS`, whose settings are checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from detkit.config import CfgNode
from detkit.layers import (
    NORM_NAMES,
    CheckpointedSequential,
    CNNBlockBase,
    EvalBatchNorm2d,
    ShapeSpec,
)
from detkit.modeling.backbone.backbone import check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.resnet import BLOCKS_PER_STAGE, ResNet, make_stage
from detkit.modeling.backbone.resnet_blocks import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeepStem,
    DeformBottleneckBlock,
)
from detkit.utils.errors import ConfigError
from detkit.utils.text import did_you_mean

STAGE_NAMES = ("res2", "res3", "res4", "res5")


@BACKBONE_REGISTRY.register()
def build_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet that `MODEL.RESNETS` describes, frozen up to `MODEL.BACKBONE.FREEZE_AT`.

    Depths 18 and 34 have 64 channels in res2, where the deeper ones have 256: for them a
    `RES2_OUT_CHANNELS` left at its default 256 means 64, and any other value means itself.

    Raises:
        ValueError: A setting is out of range, or excludes another; the message names the key.
    """
    resnets = cfg.MODEL.RESNETS
    check_resnet_settings(resnets)
    known = ["stem", *STAGE_NAMES[: resnets.NUM_STAGES]]
    check_features("MODEL.RESNETS.OUT_FEATURES", resnets.OUT_FEATURES, known)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if freeze_at not in range(6):
        raise ConfigError(f"MODEL.BACKBONE.FREEZE_AT must be 0 to 5: got {freeze_at}")

    stem_class = DeepStem if resnets.DEEP_STEM else BasicStem
    in_channels, norm = input_shape.channels or 3, resnet_norm(resnets)
    try:
        stem = stem_class(in_channels, resnets.STEM_OUT_CHANNELS, norm)
    except ValueError as error:
        raise ConfigError(f"MODEL.RESNETS.STEM_OUT_CHANNELS: {error}") from error
    # Only as far as the last map is needed, as in `ResNet`.
    num_stages = max(known.index(name) for name in resnets.OUT_FEATURES)
    stages = []
    in_channels = stem.out_channels
    for index in range(num_stages):
        stages.append(make_configured_stage(resnets, index, in_channels))
        in_channels = stages[-1][-1].out_channels
    checkpointed = [
        STAGE_NAMES[index] for index in range(num_stages) if resnets.CHECKPOINT_PER_STAGE[index]
    ]
    return ResNet(
        stem,
        stages,
        out_features=resnets.OUT_FEATURES,
        freeze_at=freeze_at,
        checkpointed=checkpointed,
    )


def make_configured_stage(resnets: CfgNode, index: int, in_channels: int) -> list[CNNBlockBase]:
    """Build the blocks of one stage.

    Args:
        resnets: `cfg.MODEL.RESNETS`, which `check_resnet_settings` has checked.
        index: 0 for res2 to 3 for res5.
        in_channels: Channels of its input.

    Raises:
        ConfigError: There is no such stage, or a norm cannot have its channels.
    """
    name = STAGE_NAMES[index]
    if index >= resnets.NUM_STAGES:
        raise ConfigError(
            f"MODEL.RESNETS.NUM_STAGES is {resnets.NUM_STAGES}, so that there is no {name}"
        )
    num_blocks = BLOCKS_PER_STAGE[resnets.DEPTH][index]
    stride, dilation = resnets.STRIDE_PER_STAGE[index], resnets.DILATION_PER_STAGE[index]
    if name == "res5" and resnets.RES5_DILATION == 2:
        stride, dilation = 1, 2  # the dilation stands in for the stride: the resolution stays
    res2_channels = resnets.RES2_OUT_CHANNELS
    # Table 1 of the paper: basic blocks do not widen their output by 4.
    if resnets.DEPTH < 50 and res2_channels == 256:
        res2_channels = 64
    block_class, arguments = _block(resnets, index)
    try:
        blocks = make_stage(
            block_class,
            num_blocks,
            in_channels=in_channels,
            out_channels=res2_channels * 2**index,
            stride_per_block=[stride] + [1] * (num_blocks - 1),
            dilation=dilation,
            norm=resnet_norm(resnets),
            avg_down=resnets.AVG_DOWN,
            **arguments,
        )
    except ValueError as error:
        raise ConfigError(f"MODEL.RESNETS, {name}: {error}") from error
    if resnets.ZERO_INIT_LAST_NORM:
        # Each block starts as its shortcut (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
        for block in blocks:
            assert isinstance(block, BasicBlock | BottleneckBlock)
            assert block.last_norm is not None
            nn.init.zeros_(block.last_norm.get_parameter("weight"))
    return blocks


def stage_module(resnets: CfgNode, index: int, blocks: Sequence[nn.Module]) -> nn.Sequential:
    """Return the blocks of a stage as a module, checkpointed if `CHECKPOINT_PER_STAGE` says so."""
    is_checkpointed = resnets.CHECKPOINT_PER_STAGE[index]
    return (CheckpointedSequential if is_checkpointed else nn.Sequential)(*blocks)


def resnet_norm(resnets: CfgNode) -> str | Callable[[int], nn.Module]:
    """Return the norm that `NORM` and `NORM_EVAL` set, for `get_norm`."""
    # SyncBN too: without statistics of the batch there is nothing to synchronise.
    return EvalBatchNorm2d if resnets.NORM_EVAL else resnets.NORM


def _block(resnets: CfgNode, index: int) -> tuple[type[CNNBlockBase], dict[str, Any]]:
    """Return the class of a stage's blocks, and the arguments that only some classes have."""
    if resnets.DEPTH < 50:
        return BasicBlock, {}
    arguments = {
        "bottleneck_channels": _bottleneck_channels(resnets, index),
        "num_groups": resnets.NUM_GROUPS,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
    }
    if not resnets.DEFORM_ON_PER_STAGE[index]:
        return BottleneckBlock, arguments
    arguments["deform_modulated"] = resnets.DEFORM_MODULATED
    arguments["deform_num_groups"] = resnets.DEFORM_NUM_GROUPS
    return DeformBottleneckBlock, arguments


def _bottleneck_channels(resnets: CfgNode, index: int) -> int:
    # "32x8d" is 32 groups of 8 channels in res2; stages double the width of a group.
    return resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index


def check_resnet_settings(resnets: CfgNode) -> None:
    """Check the settings of stages and blocks in `cfg.MODEL.RESNETS`.

    Raises:
        ValueError: A setting is out of range, or excludes another; the message names the key.
    """
    legal_values = {
        "DEPTH": BLOCKS_PER_STAGE,
        "NUM_STAGES": (1, 2, 3, 4),
        "RES5_DILATION": (1, 2),
        "NORM": NORM_NAMES,
    }
    for key, legal in legal_values.items():
        value = resnets[key]
        if value not in legal:
            hint = did_you_mean(value, NORM_NAMES) if key == "NORM" else ""
            raise ConfigError(
                f"MODEL.RESNETS.{key} must be one of {list(legal)}: got {value!r}.{hint}"
            )
    _check_stage_lists(resnets)
    _check_res5_dilation(resnets)
    _check_norm(resnets)
    _check_deformable(resnets)
    for key, only in (("NUM_GROUPS", 1), ("WIDTH_PER_GROUP", 64)):
        if resnets.DEPTH < 50 and resnets[key] != only:
            depth = f"depth {resnets.DEPTH}, whose blocks have no bottleneck"
            raise ConfigError(f"MODEL.RESNETS.{key} must be {only} for {depth}: got {resnets[key]}")


def _check_stage_lists(resnets: CfgNode) -> None:
    numbers = ("STRIDE_PER_STAGE", "DILATION_PER_STAGE")
    flags = ("DEFORM_ON_PER_STAGE", "CHECKPOINT_PER_STAGE")
    # Types too: `cfg.MODEL.RESNETS.STRIDE_PER_STAGE = ...` in Python passes by the config's checks.
    for key in (*numbers, *flags):
        values = list(resnets[key])
        if len(values) not in (resnets.NUM_STAGES, len(STAGE_NAMES)):
            raise ConfigError(
                f"MODEL.RESNETS.{key} needs one value for each of {', '.join(STAGE_NAMES)} (or of"
                f" the first NUM_STAGES = {resnets.NUM_STAGES}): got {values}"
            )
        if key in numbers and any(type(value) is not int or value < 1 for value in values):
            raise ConfigError(f"MODEL.RESNETS.{key} must be whole numbers from 1 on: got {values}")
        if key in flags and any(type(value) is not bool for value in values):
            raise ConfigError(f"MODEL.RESNETS.{key} must be True or False per stage: got {values}")


def _check_res5_dilation(resnets: CfgNode) -> None:
    if resnets.RES5_DILATION == 1:
        return
    if resnets.NUM_STAGES < 4:
        raise ConfigError(
            f"MODEL.RESNETS.RES5_DILATION: 2 needs a res5: NUM_STAGES is {resnets.NUM_STAGES}"
        )
    if resnets.STRIDE_PER_STAGE[3] > 2 or resnets.DILATION_PER_STAGE[3] > 2:
        raise ConfigError(
            "MODEL.RESNETS.RES5_DILATION: 2 means stride 1 and dilation 2 of res5, but"
            f" STRIDE_PER_STAGE and DILATION_PER_STAGE say {resnets.STRIDE_PER_STAGE[3]} and"
            f" {resnets.DILATION_PER_STAGE[3]}"
        )


def _check_norm(resnets: CfgNode) -> None:
    norm = resnets.NORM
    if resnets.NORM_EVAL and norm not in ("BN", "SyncBN"):
        raise ConfigError(
            "MODEL.RESNETS.NORM_EVAL keeps batch norms in eval mode, NORM must be BN or SyncBN:"
            f" got {norm!r}"
        )
    if resnets.ZERO_INIT_LAST_NORM and norm in ("", "FrozenBN"):
        raise ConfigError(
            "MODEL.RESNETS.ZERO_INIT_LAST_NORM needs a norm that learns (BN, SyncBN, GN, LN), or"
            f" the blocks stay zero: NORM is {norm!r}"
        )


def _check_deformable(resnets: CfgNode) -> None:
    flags = list(resnets.DEFORM_ON_PER_STAGE)
    if any(flags) and resnets.DEPTH < 50:
        raise ConfigError(
            f"MODEL.RESNETS.DEFORM_ON_PER_STAGE must be False for depth {resnets.DEPTH}: only"
            f" bottlenecks (depth 50 and more) can be deformable, got {flags}"
        )
    for index, is_on in enumerate(flags):
        channels = _bottleneck_channels(resnets, index)
        if is_on and channels % resnets.DEFORM_NUM_GROUPS != 0:
            raise ConfigError(
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS must divide the {channels} channels of the"
                f" bottlenecks in {STAGE_NAMES[index]}: got {resnets.DEFORM_NUM_GROUPS}"
            )
