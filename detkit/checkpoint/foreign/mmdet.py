"""The layout of MMDetection: its ResNets, its pyramid, and its two-stage heads since version 2.

These heads agree with Detectron2's: the background is last, anchors are centred on the corner of a
cell (`MODEL.ANCHOR_GENERATOR.OFFSET 0.0`), and box targets are divided by 0.1 and 0.2, that is,
multiplied by 10 and 5. Its one-stage heads differ in more than names (RetinaNet's P7 has no ReLU,
and its anchors are ordered by ratio first): they keep their names and are not loaded.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from detkit.checkpoint.foreign.layout import Rule, Translation, apply_rules, rename
from detkit.checkpoint.foreign.torchvision import pyramid_level, resnet_name

_RULES: tuple[Rule, ...] = (
    (r"rpn_head\.rpn_conv\.(\w+)", r"proposal_generator.rpn_head.conv.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_head\.bbox_head\.(\d\.)?fc_cls\.(\w+)", r"roi_heads.box_predictor.\1cls_score.\2"),
    (r"roi_head\.bbox_head\.(\d\.)?fc_reg\.(\w+)", r"roi_heads.box_predictor.\1bbox_pred.\2"),
    (r"roi_head\.mask_head\.upsample\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_head\.mask_head\.conv_logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
)
# A ConvModule consists of a convolution and a norm, which is called `bn` or `gn`.
_CONV_MODULE = r"(conv|bn|gn)\.(\w+)"
_OWN_PREFIXES = ("backbone.layer1.0.conv1.", "neck.lateral_convs.", "neck.fpn_convs.")


def _name_of(name: str, value: Tensor, first_level: int) -> str | None:
    if name.startswith("backbone."):
        return _resnet_name(name.removeprefix("backbone."), value)
    neck = re.fullmatch(rf"neck\.(lateral|fpn)_convs\.(\d)\.{_CONV_MODULE}", name)
    if neck is not None:
        kind, index, part, tensor = neck.groups()
        where = f"fpn_{'lateral' if kind == 'lateral' else 'output'}{first_level + int(index)}"
        return f"{where}{'' if part == 'conv' else '.norm'}.{tensor}"
    # In a cascade, the index of the stage comes first: `roi_head.bbox_head.0.shared_fcs.1.weight`.
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
    """Return `resnet_name`, extended to deformable convolutions."""
    offset = re.fullmatch(r"layer(\d)\.(\d+)\.conv2(?:\.conv)?_offset\.(weight|bias)", name)
    if offset is not None:
        return f"res{int(offset[1]) + 1}.{offset[2]}.conv2_offset.{offset[3]}"
    return resnet_name(name, value)


def translate_mmdet(weights: Mapping[str, Tensor], file_name: str) -> Translation | None:
    """Translate MMDetection's names, or return None if the weights have others."""
    if not any(name.startswith(_OWN_PREFIXES) for name in weights):
        return None
    first_level = pyramid_level(weights, "backbone.", r"neck\.lateral_convs\.0\.conv\.weight")
    remark = (
        "set INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD as in img_norm_cfg (or"
        " data_preprocessor) of its config, and MODEL.RESNETS.STRIDE_IN_1X1 by style: 'pytorch' is"
        " False, 'caffe' True"
    )
    translated, renamed = rename(weights, lambda name, value: _name_of(name, value, first_level))
    return Translation("MMDetection", translated, renamed, remarks=[remark])
