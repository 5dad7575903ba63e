"""torchvision's layouts: its ResNets, and its detectors on a ResNet with a pyramid.

Besides the names, the background differs: in torchvision it is class 0, with boxes and masks of its
own that are not used; in Detectron2 it is the last class. Fully connected layers agree, as both
flatten (channels, height, width).

Legend: K classes without background, A anchors per cell, C categories with background.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor

from detkit.checkpoint.foreign.layout import (
    FROZEN_BN_EPS,
    RGB_OF_TORCHVISION,
    Rule,
    Translation,
    apply_rules,
    background_last,
    rename,
)

_BLOCK = r"layer(\d)\.(\d+)\."
# Convolution, norm and ReLU, three times: `stem` in MMDetection, `conv1` and `bn1` in timm.
_DEEP_STEM = r"(?:stem|conv1)\.([0134678])\.(\w+)"
_NORM_TENSOR = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_RESNET_RULES: tuple[Rule, ...] = (
    (r"conv1\.(weight|bias)", r"stem.conv1.\1"),
    (rf"bn1\.{_NORM_TENSOR}", r"stem.conv1.norm.\1"),
    (r"fc\.(weight|bias)", r"linear.\1"),
)
# The children of a ResNet, by their index in a sequence; 2 and 3 are ReLU and pooling.
_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
_HEAD_RULES: tuple[Rule, ...] = (
    (r"backbone\.fpn\.extra_blocks\.(p6|p7)\.(\w+)", r"top_block.\1.\2"),
    (r"rpn\.head\.cls_logits\.(\w+)", r"proposal_generator.rpn_head.objectness_logits.\1"),
    (r"rpn\.head\.bbox_pred\.(\w+)", r"proposal_generator.rpn_head.anchor_deltas.\1"),
    (r"roi_heads\.box_head\.fc6\.(\w+)", r"roi_heads.box_head.fc1.\1"),
    (r"roi_heads\.box_head\.fc7\.(\w+)", r"roi_heads.box_head.fc2.\1"),
    (r"(roi_heads\.box_predictor\.(?:cls_score|bbox_pred)\.\w+)", r"\1"),
    (r"roi_heads\.mask_head\.(mask_fcn\d)\.(\w+)", r"roi_heads.mask_head.\1.\2"),
    (r"roi_heads\.mask_predictor\.conv5_mask\.(\w+)", r"roi_heads.mask_head.deconv.\1"),
    (r"roi_heads\.mask_predictor\.mask_fcn_logits\.(\w+)", r"roi_heads.mask_head.predictor.\1"),
    (
        r"roi_heads\.keypoint_predictor\.kps_score_lowres\.(\w+)",
        r"roi_heads.keypoint_head.score_lowres.\1",
    ),
    (r"head\.classification_head\.cls_logits\.(\w+)", r"head.cls_score.\1"),
    (r"head\.regression_head\.bbox_reg\.(\w+)", r"head.bbox_pred.\1"),
)
# After loading these, torchvision sets the eps of the batch norms to 0 (`overwrite_eps`).
_FILES_WITHOUT_EPS = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "keypointrcnn_resnet50_fpn_coco-9f466800.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)
# COCO's category ids go from 1 to 90; these have no objects, so that 80 classes remain.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_CATEGORIES = 91
_COCO_CLASSES = 80


def resnet_name(name: str, value: Tensor) -> str | None:
    """Return Detectron2's name, without prefix, of a tensor of torchvision's ResNet, or None."""
    block = re.fullmatch(_BLOCK + r"(conv|bn)(\d)\." + _NORM_TENSOR, name)
    if block is not None:
        stage, index, kind, number, tensor = block.groups()
        return f"res{int(stage) + 1}.{index}.conv{number}{'.norm' if kind == 'bn' else ''}.{tensor}"
    shortcut = re.fullmatch(_BLOCK + r"downsample\.\d\." + _NORM_TENSOR, name)
    if shortcut is not None:
        stage, index, tensor = shortcut.groups()
        # By its shape, not by its index, which the average pool of a ResNet-D shifts by one.
        is_conv = value.dim() == 4
        return f"res{int(stage) + 1}.{index}.shortcut{'' if is_conv else '.norm'}.{tensor}"
    deep_stem = re.fullmatch(_DEEP_STEM, name)
    if deep_stem is not None:
        number, part = divmod(int(deep_stem[1]), 3)
        return f"stem.conv{number + 1}{'.norm' if part == 1 else ''}.{deep_stem[2]}"
    return apply_rules(name, _RESNET_RULES)


@dataclass(frozen=True)
class _Build:
    """Properties of a detector that the name of a single tensor does not show."""

    levels: dict[int, int]
    """Stage that each lateral convolution takes, by its index."""
    body: str
    """Prefix of the names in the ResNet."""
    is_sequential: bool
    """Whether the ResNet is a sequence of its children, as in `nn.Sequential(*children[:-2])`."""
    is_deep_rpn: bool
    has_retinanet_norms: bool


def translate_resnet(weights: Mapping[str, Tensor], file_name: str) -> Translation | None:
    """Translate a ResNet of torchvision, or return None if the weights are no such ResNet."""
    is_deep = "conv1.0.weight" in weights or "stem.0.weight" in weights
    if not (is_deep or "conv1.weight" in weights) or "layer1.0.conv1.weight" not in weights:
        return None

    def name_of(name: str, value: Tensor) -> str | None:
        # With a stem of three convolutions, `bn1` is the norm of the last one.
        is_last_norm = is_deep and name.startswith("bn1.")
        return resnet_name(name.replace("bn1.", "conv1.7.") if is_last_norm else name, value)

    translated, renamed = rename(weights, name_of)
    return Translation(
        "torchvision's ResNet", translated, renamed, RGB_OF_TORCHVISION, stride_in_1x1=False
    )


def translate_detector(weights: Mapping[str, Tensor], file_name: str) -> Translation | None:
    """Translate a detector of torchvision, or return None if the weights are no such detector."""

    def any_starts_with(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in weights)

    # By its heads too: the backbone may have no pyramid, or be no ResNet.
    heads = ("rpn.head.cls_logits.", "head.classification_head.cls_logits.")
    has_pyramid = "backbone.body.conv1.weight" in weights and any_starts_with("backbone.fpn.")
    if not has_pyramid and not any(map(any_starts_with, heads)):
        return None
    body = "backbone.body." if any_starts_with("backbone.body.") else "backbone."
    lateral = r"backbone\.fpn\.inner_blocks\.{}\.(?:0\.)?weight"
    first = pyramid_level(weights, body, lateral.format(0))
    build = _Build(
        # `returned_layers` [1, 4] has laterals of res2 and res5 alone.
        {i: pyramid_level(weights, body, lateral.format(i), first + i) for i in range(10)},
        body,
        "backbone.4.0.conv1.weight" in weights,
        is_deep_rpn=any_starts_with("rpn.head.conv.1."),
        has_retinanet_norms=any_starts_with("head.classification_head.conv.0.1."),
    )
    translated, renamed = rename(weights, lambda name, value: _detector_name(name, value, build))
    _drop_background(translated)
    if build.has_retinanet_norms:
        # Convolutions before norms have no bias in torchvision, and one in Detectron2.
        for name, value in list(translated.items()):
            if re.fullmatch(r"head\.(cls|bbox)_subnet\.\d+\.weight", name) and value.dim() == 4:
                translated[name.removesuffix("weight") + "bias"] = value.new_zeros(len(value))
    result = Translation(
        "torchvision's detector", translated, renamed, RGB_OF_TORCHVISION, stride_in_1x1=False
    )
    for model in torchvision.models.list_models(module=torchvision.models.detection):
        for published in torchvision.models.get_model_weights(model):
            if published.url.endswith(f"/{file_name}") and result.class_names is None:
                result.class_names = list(published.meta["categories"][1:])
    if file_name in _FILES_WITHOUT_EPS:
        fold_frozen_eps(result, 0.0)
    return result


def pyramid_level(
    weights: Mapping[str, Tensor], resnet_prefix: str, lateral: str, unknown: int = 2
) -> int:
    """Return the stage (2 for res2) that a lateral convolution of a pyramid takes.

    Args:
        weights: Name -> tensor.
        resnet_prefix: Start of the names in the ResNet.
        lateral: Pattern for the name of the convolution.
        unknown: Returned if no stage has its channels.
    """
    # By its input channels: the indices start at 0 in RetinaNet too, whose pyramid starts at res3.
    laterals = [value for name, value in weights.items() if re.fullmatch(lateral, name)]
    if not laterals:
        return unknown
    for stage in (1, 2, 3, 4):
        block = f"{resnet_prefix}layer{stage}.0"
        # The last convolution of a bottleneck or, without conv3, of a basic block.
        last = weights.get(f"{block}.conv3.weight", weights.get(f"{block}.conv2.weight"))
        if last is not None and last.shape[0] == laterals[0].shape[1]:
            return stage + 1
    return unknown


def _detector_name(name: str, value: Tensor, build: _Build) -> str | None:
    if name.startswith(build.body) and not name.startswith("backbone.fpn."):
        name = name.removeprefix(build.body)
        if build.is_sequential:
            index, _, rest = name.partition(".")
            name = f"{_CHILDREN.get(index, index)}.{rest}"
        return resnet_name(name, value)
    rpn_conv = re.fullmatch(r"rpn\.head\.conv\.(?:(\d)\.0\.)?(weight|bias)", name)
    if rpn_conv is not None:
        number = f".conv{rpn_conv[1]}" if build.is_deep_rpn else ""
        return f"proposal_generator.rpn_head.conv{number}.{rpn_conv[2]}"
    return apply_rules(name, _HEAD_RULES) or _numbered_name(name, build)


def _numbered_name(name: str, build: _Build) -> str | None:
    """Return the name of a part that has different indices in torchvision and Detectron2."""
    pyramid = re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.(\d)\.(?:(\d)\.)?(\w+)", name)
    if pyramid is not None:
        kind, index, part, tensor = pyramid.groups()
        where = f"fpn_{'lateral' if kind == 'inner' else 'output'}{build.levels[int(index)]}"
        return f"{where}{'.norm' if part == '1' else ''}.{tensor}"
    convs = re.fullmatch(r"roi_heads\.(box|mask)_head\.(\d)\.([01])\.(\w+)", name)
    if convs is not None:
        kind, index, part, tensor = convs.groups()
        conv = f"{'conv' if kind == 'box' else 'mask_fcn'}{int(index) + 1}"
        return f"roi_heads.{kind}_head.{conv}{'.norm' if part == '1' else ''}.{tensor}"
    keypoint = re.fullmatch(r"roi_heads\.keypoint_head\.(\d+)\.(\w+)", name)
    if keypoint is not None:  # the indices count convolutions and ReLUs
        return f"roi_heads.keypoint_head.conv_fcn{int(keypoint[1]) // 2 + 1}.{keypoint[2]}"
    fully_connected = re.fullmatch(r"roi_heads\.box_head\.(\d+)\.(\w+)", name)
    if fully_connected is not None:  # the indices count 4 convolutions, the flattening, and ReLUs
        return f"roi_heads.box_head.fc{(int(fully_connected[1]) - 5) // 2 + 1}.{fully_connected[2]}"
    subnet = re.fullmatch(
        r"head\.(classification|regression)_head\.conv\.(\d)\.(?:(\d)\.)?(weight|bias)", name
    )
    if subnet is None:
        return None
    kind, index, part, tensor = subnet.groups()
    number = int(index)
    if part is not None:
        # Detectron2's indices count convolutions, norms and ReLUs; these are of blocks of them.
        # Older files, without `part`, have Detectron2's indices.
        number = (3 if build.has_retinanet_norms else 2) * number + int(part)
    return f"head.{'cls' if kind == 'classification' else 'bbox'}_subnet.{number}.{tensor}"


def _drop_background(weights: dict[str, Tensor]) -> None:
    """Move the background to the last class, and drop its boxes and masks, in place."""
    num_anchors = _anchors_per_cell(weights)
    for name, value in weights.items():
        if name.startswith("roi_heads.box_predictor.cls_score."):
            weights[name] = background_last(value)
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            weights[name] = value[4:]
        elif name.startswith("roi_heads.mask_head.predictor."):
            weights[name] = value[1:]
        elif name.startswith("head.cls_score."):
            weights[name] = value.unflatten(0, (num_anchors, -1))[:, 1:].flatten(0, 1)


def _anchors_per_cell(weights: Mapping[str, Tensor]) -> int:
    deltas = weights.get("head.bbox_pred.bias")
    return 1 if deltas is None else len(deltas) // 4


def fold_frozen_eps(translation: Translation, eps: float) -> None:
    """Adapt the variances of a ResNet with another eps to detkit's eps of 1e-5, in place."""
    for name, value in translation.weights.items():
        if re.match(r"(stem|res\d)\.", name) and name.endswith(".running_var"):
            translation.weights[name] = value + (eps - FROZEN_BN_EPS)
    translation.remarks.append(
        f"changed the variances of the ResNet by {eps - FROZEN_BN_EPS:g}: its norms had eps"
        f" {eps:g}, detkit's have {FROZEN_BN_EPS:g}"
    )


def keep_coco_classes(translation: Translation, num_classes: int) -> None:
    """Reduce the classifier of COCO's 90 category ids to the 80 classes that have objects.

    Args:
        translation: Changed in place, if it has 90 classes.
        num_classes: K of the model; nothing is changed unless it is 80.
    """
    weights = translation.weights
    num_anchors = _anchors_per_cell(weights)
    if "roi_heads.box_predictor.cls_score.bias" in weights:
        categories = len(weights["roi_heads.box_predictor.cls_score.bias"])
    else:  # RetinaNet has no background; other models have no classifier
        categories = len(weights.get("head.cls_score.bias", ())) // num_anchors + 1
    if num_classes != _COCO_CLASSES or categories != _COCO_CATEGORIES:
        return
    kept = torch.tensor([i - 1 for i in range(1, _COCO_CATEGORIES) if i not in _UNUSED_COCO_IDS])
    with_background = torch.cat([kept, torch.tensor([_COCO_CATEGORIES - 1])])
    reduce: dict[str, Callable[[Tensor], Tensor]] = {
        "roi_heads.box_predictor.cls_score.": lambda rows: rows[with_background],
        "roi_heads.box_predictor.bbox_pred.": (
            lambda rows: rows.unflatten(0, (-1, 4))[kept].flatten(0, 1)
        ),
        "roi_heads.mask_head.predictor.": lambda rows: rows[kept],
        "head.cls_score.": lambda rows: rows.unflatten(0, (num_anchors, -1))[:, kept].flatten(0, 1),
    }
    for name, value in weights.items():
        for prefix, rows_of in reduce.items():
            if name.startswith(prefix):
                weights[name] = rows_of(value)
    if translation.class_names is not None:
        translation.class_names = [translation.class_names[i] for i in kept.tolist()]
    translation.remarks.append(
        "kept the 80 of COCO's 90 category ids that have objects, in their order"
    )
