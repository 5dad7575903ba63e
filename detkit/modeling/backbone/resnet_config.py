"""Build a ResNet from `MODEL.RESNETS`, whose settings are checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from detkit.config import CfgNode
from detkit.layers import (
    NORM_NAMES,
    CheckpointedSequential,
    CNNBlockBase,
    Conv2d,
    EvalBatchNorm2d,
    FrozenBatchNorm2d,
    ShapeSpec,
    get_norm,
)
from detkit.modeling.backbone.backbone import check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.channel_attention import ContextBlock, SqueezeExcitation
from detkit.modeling.backbone.resnet import BLOCKS_PER_STAGE, ResNet
from detkit.modeling.backbone.resnet_blocks import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    DeepStem,
    DeformBottleneckBlock,
    ResidualBlock,
)
from detkit.utils.errors import ConfigError
from detkit.utils.text import did_you_mean

STAGE_NAMES = ("res2", "res3", "res4", "res5", "res6")
# Name in PLUGINS -> class, and name of the module in a block.
_PLUGINS = {
    "ContextBlock": (ContextBlock, "context_block"),
    "SqueezeExcitation": (SqueezeExcitation, "squeeze_excitation"),
}


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
    in_channels, norm = input_shape.channels or 3, resnet_norm(resnets)
    try:
        if resnets.DEEP_STEM:
            stem = DeepStem(in_channels, resnets.STEM_OUT_CHANNELS, norm)
        else:
            kernel_size = resnets.STEM_KERNEL_SIZE
            stem = BasicStem(in_channels, resnets.STEM_OUT_CHANNELS, norm, kernel_size)
    except ValueError as error:
        raise ConfigError(f"MODEL.RESNETS.STEM_OUT_CHANNELS: {error}") from error
    if resnets.CONV_WS:
        _standardize_weights(stem)
    # All stages, though `ResNet` drops those that no map needs: with the same seed, whatever is
    # built after the backbone then draws the same random numbers as in Detectron2.
    stages = []
    in_channels = stem.out_channels
    for index in range(resnets.NUM_STAGES):
        stages.append(make_configured_stage(resnets, index, in_channels))
        in_channels = stages[-1][-1].out_channels
    is_checkpointed = _per_stage(resnets.CHECKPOINT_PER_STAGE, False)
    checkpointed = [STAGE_NAMES[k] for k in range(resnets.NUM_STAGES) if is_checkpointed[k]]
    return ResNet(
        stem,
        stages,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        checkpointed=checkpointed,
    )


def make_configured_stage(resnets: CfgNode, index: int, in_channels: int) -> list[CNNBlockBase]:
    """Build the blocks of one stage.

    Args:
        resnets: `cfg.MODEL.RESNETS`, which `check_resnet_settings` has checked.
        index: 0 for res2 to 4 for res6.
        in_channels: Channels of its input.

    Raises:
        ConfigError: There is no such stage, or a norm cannot have its channels.
    """
    name = STAGE_NAMES[index]
    if index >= resnets.NUM_STAGES:
        raise ConfigError(
            f"MODEL.RESNETS.NUM_STAGES is {resnets.NUM_STAGES}, so that there is no {name}"
        )
    num_blocks = (resnets.BLOCKS_PER_STAGE or BLOCKS_PER_STAGE[resnets.DEPTH])[index]
    stride = _per_stage(resnets.STRIDE_PER_STAGE, 2)[index]
    if name == "res5" and resnets.RES5_DILATION == 2:
        stride = 1  # the dilation stands in for the stride: the resolution stays
    res2_channels = resnets.RES2_OUT_CHANNELS
    # Table 1 of the paper: basic blocks do not widen their output by 4.
    if resnets.DEPTH < 50 and res2_channels == 256:
        res2_channels = 64
    common: dict[str, Any] = {
        "out_channels": res2_channels * 2**index,
        "norm": resnet_norm(resnets),
        "avg_down": resnets.AVG_DOWN,
    }
    dilations = _dilations(resnets, index, num_blocks)
    blocks: list[CNNBlockBase] = []
    try:
        for number, dilation in enumerate(dilations):
            stride_of_block = stride if number == 0 else 1
            block_class, arguments = _block(resnets, index, stride_of_block, dilation)
            arguments.update(common, stride=stride_of_block, dilation=dilation)
            blocks.append(block_class(in_channels=in_channels, **arguments))
            in_channels = blocks[-1].out_channels
    except ValueError as error:
        raise ConfigError(f"MODEL.RESNETS, {name}: {error}") from error
    if resnets.ZERO_INIT_LAST_NORM:
        # Each block starts as its shortcut (Goyal et al. 2017, arXiv 1706.02677, section 5.1).
        for block in blocks:
            assert isinstance(block, BasicBlock | BottleneckBlock)
            assert block.last_norm is not None
            nn.init.zeros_(block.last_norm.get_parameter("weight"))
    for block in blocks:
        if resnets.CONV_WS:
            _standardize_weights(block)
        for plugin in resnets.PLUGINS:
            if name in plugin.get("stages", STAGE_NAMES):
                assert isinstance(block, ResidualBlock)
                _plug(block, plugin)
    return blocks


def _dilations(resnets: CfgNode, index: int, num_blocks: int) -> list[int]:
    """Return the dilation of each block of a stage."""
    dilations = _per_stage(resnets.DILATION_PER_STAGE, 1)
    if resnets.RES5_DILATION == 2 and len(dilations) > 3:
        dilations[3] = 2
    # torchvision's first block still has the dilation of the stage before it.
    is_torchvision = resnets.DILATION_STYLE == "torchvision"
    before = 1 if index == 0 else dilations[index - 1]
    first = min(before, dilations[index]) if is_torchvision else dilations[index]
    return [first] + [dilations[index]] * (num_blocks - 1)


def _standardize_weights(module: nn.Module) -> None:
    for conv in module.modules():
        # Not the convolutions that predict offsets, which have a bias.
        if isinstance(conv, Conv2d) and conv.bias is None:
            conv.is_standardized = True


def _plug(block: ResidualBlock, plugin: Mapping[str, Any]) -> None:
    plugin_class, name = _PLUGINS[plugin["name"]]
    position = plugin["position"]
    channels = getattr(block, position.removeprefix("after_")).out_channels
    squeezed = max(1, round(channels * plugin.get("ratio", 1 / 16)))
    if hasattr(block, name):
        name = f"{name}_{position}"
    block.plug(position, name, plugin_class(channels, squeezed))


def _per_stage(values: Sequence[Any], of_fifth: Any) -> list[Any]:
    """Return the values of all stages, where a list may have only those of the paper's four."""
    return [*values, of_fifth] if len(values) < len(STAGE_NAMES) else list(values)


def stage_module(resnets: CfgNode, index: int, blocks: Sequence[nn.Module]) -> nn.Sequential:
    """Return the blocks of a stage as a module, checkpointed if `CHECKPOINT_PER_STAGE` says so."""
    is_checkpointed = _per_stage(resnets.CHECKPOINT_PER_STAGE, False)[index]
    return (CheckpointedSequential if is_checkpointed else nn.Sequential)(*blocks)


def resnet_norm(resnets: CfgNode) -> str | Callable[[int], nn.Module]:
    """Return the norm that `NORM` and the keys beginning with it set, for `get_norm`."""
    # SyncBN too: without statistics of the batch there is nothing to synchronise.
    norm = EvalBatchNorm2d if resnets.NORM_EVAL else resnets.NORM
    eps, momentum = resnets.NORM_EPS, resnets.NORM_MOMENTUM
    if eps is None and momentum is None and resnets.NORM_GROUPS == 32:
        return norm

    def build(channels: int) -> nn.Module:
        if norm == "FrozenBN" and eps is not None:
            return FrozenBatchNorm2d(channels, eps)
        if norm == "GN":
            return nn.GroupNorm(resnets.NORM_GROUPS, channels, 1e-5 if eps is None else eps)
        module: Any = get_norm(norm, channels)
        if eps is not None:
            module.eps = eps
        if momentum is not None:
            module.momentum = momentum
        return module

    return build


def _block(
    resnets: CfgNode, index: int, stride: int, dilation: int
) -> tuple[type[CNNBlockBase], dict[str, Any]]:
    """Return the class of a block, and the arguments that only some classes have."""
    if resnets.DEPTH < 50:
        is_mmdetection = resnets.DILATION_STYLE == "mmdetection"
        return BasicBlock, {"dilation_conv2": 1 if is_mmdetection else dilation}
    arguments = {
        "bottleneck_channels": _bottleneck_channels(resnets, index),
        "num_groups": resnets.NUM_GROUPS,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
    }
    is_plain = stride > 1 and not resnets.DEFORM_ON_STRIDE
    if is_plain or not _per_stage(resnets.DEFORM_ON_PER_STAGE, False)[index]:
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
        "NUM_STAGES": (1, 2, 3, 4, 5),
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
    for number, plugin in enumerate(resnets.PLUGINS):
        _check_plugin(plugin, f"MODEL.RESNETS.PLUGINS[{number}]", resnets.DEPTH)
    _check_deformable(resnets)
    for key, only in (("NUM_GROUPS", 1), ("WIDTH_PER_GROUP", 64)):
        if resnets.DEPTH < 50 and resnets[key] != only:
            depth = f"depth {resnets.DEPTH}, whose blocks have no bottleneck"
            raise ConfigError(f"MODEL.RESNETS.{key} must be {only} for {depth}: got {resnets[key]}")


def _check_stage_lists(resnets: CfgNode) -> None:
    blocks = list(resnets.BLOCKS_PER_STAGE)
    if (blocks or resnets.NUM_STAGES > 4) and (
        len(blocks) < resnets.NUM_STAGES or min(blocks, default=0) < 1
    ):
        raise ConfigError(
            "MODEL.RESNETS.BLOCKS_PER_STAGE needs a number from 1 on for each of NUM_STAGES ="
            f" {resnets.NUM_STAGES} stages: got {blocks}"
        )
    numbers = ("STRIDE_PER_STAGE", "DILATION_PER_STAGE")
    flags = ("DEFORM_ON_PER_STAGE", "CHECKPOINT_PER_STAGE")
    # Types too: `cfg.MODEL.RESNETS.STRIDE_PER_STAGE = ...` in Python passes by the config's checks.
    for key in (*numbers, *flags):
        values = list(resnets[key])
        if len(values) not in (resnets.NUM_STAGES, 4):
            stages = ", ".join(STAGE_NAMES[: max(4, resnets.NUM_STAGES)])
            raise ConfigError(
                f"MODEL.RESNETS.{key} needs one value for each of {stages} (or of"
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
    if resnets.NORM_MOMENTUM is not None and norm not in ("BN", "SyncBN"):
        raise ConfigError(
            f"MODEL.RESNETS.NORM_MOMENTUM is for BN and SyncBN, which keep statistics: got {norm!r}"
        )
    if resnets.NORM_EPS is not None and norm == "":
        raise ConfigError("MODEL.RESNETS.NORM_EPS needs a norm: NORM is empty")
    if resnets.ZERO_INIT_LAST_NORM and norm in ("", "FrozenBN"):
        raise ConfigError(
            "MODEL.RESNETS.ZERO_INIT_LAST_NORM needs a norm that learns (BN, SyncBN, GN, LN), or"
            f" the blocks stay zero: NORM is {norm!r}"
        )


def _check_plugin(plugin: Any, where: str, depth: int) -> None:
    if not isinstance(plugin, Mapping):
        raise ConfigError(f"{where} must be a mapping with name and position: got {plugin!r}")
    last = 2 if depth < 50 else 3
    legal = {"name": list(_PLUGINS), "position": [f"after_conv{k + 1}" for k in range(last)]}
    unknown = set(plugin) - {"name", "position", "stages", "ratio"}
    if unknown:
        raise ConfigError(
            f"{where}: unknown {sorted(unknown)}; known: name, position, stages, ratio"
        )
    for field, values in legal.items():
        if plugin.get(field) not in values:
            hint = did_you_mean(str(plugin.get(field)), values)
            raise ConfigError(
                f"{where}: {field} must be one of {values}: got {plugin.get(field)!r}.{hint}"
            )
    stages, ratio = plugin.get("stages", STAGE_NAMES), plugin.get("ratio", 1 / 16)
    if not isinstance(stages, list | tuple) or not set(stages) <= set(STAGE_NAMES):
        raise ConfigError(f"{where}: stages must be a list of {list(STAGE_NAMES)}: got {stages!r}")
    if not isinstance(ratio, int | float) or not ratio > 0:
        raise ConfigError(f"{where}: ratio must be a number above 0: got {ratio!r}")


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
