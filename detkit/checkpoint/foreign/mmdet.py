"""The layout of MMDetection: its ResNets, its pyramid, and its two-stage heads since version 2.

Those heads have the semantics of Detectron2's: the background comes last, anchors are centred on
the corner of a cell (`MODEL.ANCHOR_GENERATOR.OFFSET 0.0`), and targets divided by 0.1 and 0.2 are
targets times the weights 10 and 5. Its one-stage heads differ in more than names (RetinaNet's P7
lacks a ReLU, and its anchors vary ratios slowest): they keep their names and are not loaded.
"""

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from detkit.checkpoint.foreign.layout import Layout, Rule, Translation, apply_rules, rename
from detkit.checkpoint.foreign.torchvision import first_pyramid_level, resnet_name

_RULES: tuple[Rule, ...] = (
    (r"rpn_head\.rpn_conv\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_head\.bbox_head\.(\d\.)?fc_cls\.(\w+)", r"roi_heads.box_predictor.\1cls_score.\2"),
    (r"roi_head\.bbox_head\.(\d\.)?fc_reg\.(\w+)", r"roi_heads.box_predictor.\1bbox_pred.\2"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
)
# The parts of a ConvModule: a convolution, and its norm, called `bn` or `gn`.
_CONV_MODULE = r"(conv|bn|gn)\.(\w+)"
_DEEP_STEM = r"stem\.([0134678])\.(\w+)"


def _is_mmdet(names: Collection[str]) -> bool:
    return any(
        name.startswith(("backbone.layer1.0.conv1.", "neck.lateral_convs.", "neck.fpn_convs."))
        for name in names
    )


def _name_of(name: str, value: Tensor, first_level: int) -> str | None:
    if name.startswith("backbone."):
        return _resnet_name(name.removeprefix("backbone."), value)
    neck = re.fullmatch(rf"neck\.(lateral|fpn)_convs\.(\d)\.{_CONV_MODULE}", name)
    if neck is not None:
        kind, index, part, tensor = neck.groups()
        where = f"fpn_{'lateral' if kind == 'lateral' else 'output'}{first_level + int(index)}"
        return f"{where}{'' if part == 'conv' else '.norm'}.{tensor}"
    # A cascade has its stage in front: `roi_head.bbox_head.0.shared_fcs.1.weight`.
    head = re.fullmatch(
        rf"roi_head\.(bbox|mask)_head\.(\d\.)?(?:shared_)?convs\.(\d)\.{_CONV_MODULE}", name
    )
    if head is not None:
        kind, stage, index, part, tensor = head.groups()
        where = "box_head.{}conv" if kind == "bbox" else "mask_head.{}mask_fcn"
        where = f"roi_heads.{where.format(stage or '')}{int(index) + 1}"
        return f"{where}{'' if part == 'conv' else '.norm'}.{tensor}"
    fully_connected = re.fullmatch(r"roi_head\.bbox_head\.(\d\.)?shared_fcs\.(\d)\.(\w+)", name)
    if fully_connected is not None:
        stage, index, tensor = fully_connected.groups()
        return f"roi_heads.box_head.{stage or ''}fc{int(index) + 1}.{tensor}"
    return apply_rules(name, _RULES)


def _resnet_name(name: str, value: Tensor) -> str | None:
    """Return `resnet_name`, also of deformable convolutions and of the stem of three 3x3."""
    offset = re.fullmatch(r"layer(\d)\.(\d+)\.conv2(?:\.conv)?_offset\.(weight|bias)", name)
    if offset is not None:
        return f"res{int(offset[1]) + 1}.{offset[2]}.conv2_offset.{offset[3]}"
    deep_stem = re.fullmatch(_DEEP_STEM, name)
    if deep_stem is not None:
        # Numbered as convolution, norm, ReLU, three times.
        number, part = divmod(int(deep_stem[1]), 3)
        return f"stem.conv{number + 1}{'.norm' if part == 1 else ''}.{deep_stem[2]}"
    return resnet_name(name, value)


def _translate(weights: Mapping[str, Tensor], file_name: str) -> Translation:
    first_level = first_pyramid_level(weights, "backbone.", r"neck\.lateral_convs\.0\.conv\.weight")
    renamed = rename(weights, lambda name, value: _name_of(name, value, first_level))
    return Translation(
        "MMDetection",
        {renamed.get(name, name): value for name, value in weights.items()},
        renamed,
        remarks=[
            "the names do not tell how images were prepared and where bottlenecks have their"
            " stride: img_norm_cfg (or data_preprocessor) and style of its config say which"
            " INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and MODEL.RESNETS.STRIDE_IN_1X1 to"
            " set ('pytorch': False, 'caffe': True)"
        ],
    )


MMDET = Layout(_is_mmdet, _translate)
