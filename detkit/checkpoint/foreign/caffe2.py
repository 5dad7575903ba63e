"""The layout of Caffe2: MSRA's ImageNet weights (`R-50.pkl`) and the model zoo of Detectron.

Names are those of blobs: `res2_0_branch2a_w`, `fpn_inner_res4_5_sum_lateral_w`. In Detectron the
background is class 0, with boxes and masks of its own. Its anchors and boxes include their last
pixel, so its detectors are up to one pixel less precise in detkit until they are fine-tuned.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from detkit.checkpoint.foreign.layout import (
    BGR_OF_CAFFE2,
    FROZEN_BN_EPS,
    Rule,
    Translation,
    apply_rules,
    background_last,
    rename,
)

_CAFFE2_NAME = re.compile(
    r"^[^.]+_(w|b|s|bn_s|bn_b|bn_beta|bn_gamma|bn_rm|bn_riv|bn_running_mean|bn_running_var)$"
)
# Longest first: `_b` would match `_bn_b`.
_ENDINGS = {
    "_bn_running_mean": ".norm.running_mean",
    "_bn_running_var": ".norm.running_var",
    "_bn_gamma": ".norm.weight",
    "_bn_beta": ".norm.bias",
    "_bn_riv": ".norm.running_var",
    "_bn_rm": ".norm.running_mean",
    "_bn_s": ".norm.weight",
    "_bn_b": ".norm.bias",
    "_gn_s": ".norm.weight",
    "_gn_b": ".norm.bias",
    "_w": ".weight",
    "_b": ".bias",
}
_BRANCHES = {"1": "shortcut", "2a": "conv1", "2b": "conv2", "2c": "conv3"}
_RULES: tuple[Rule, ...] = (
    (r"(?:res_)?conv1", "stem.conv1"),
    (r"fc1000|pred", "linear"),
    (r"fpn_inner_res(\d)_\d+_sum(?:_lateral)?", r"fpn_lateral\1"),
    (r"fpn_res(\d)_\d+_sum", r"fpn_output\1"),
    (r"fpn_([67])", r"top_block.p\1"),
    # All levels share these weights; the suffix names the level that stores them.
    (r"conv_rpn(?:_fpn\d)?", "proposal_generator.rpn_head.conv"),
    (r"rpn_cls_logits(?:_fpn\d)?", "proposal_generator.rpn_head.objectness_logits"),
    (r"rpn_bbox_pred(?:_fpn\d)?", "proposal_generator.rpn_head.anchor_deltas"),
    (r"head_conv(\d)", r"roi_heads.box_head.conv\1"),
    (r"fc6", "roi_heads.box_head.fc1"),
    (r"fc7", "roi_heads.box_head.fc2"),
    (r"(cls_score|bbox_pred)", r"roi_heads.box_predictor.\1"),
    (r"_?\[?mask\]?_fcn(\d)", r"roi_heads.mask_head.mask_fcn\1"),
    (r"conv5_mask", "roi_heads.mask_head.deconv"),
    (r"mask_fcn_logits", "roi_heads.mask_head.predictor"),
    (r"conv_fcn(\d)", r"roi_heads.keypoint_head.conv_fcn\1"),
    # `kps_score` beside `kps_score_lowres` is a fixed bilinear upsampling, not learned.
    (r"kps_score_lowres", "roi_heads.keypoint_head.score_lowres"),
    (r"retnet_cls_pred_fpn\d", "head.cls_score"),
    (r"retnet_bbox_pred_fpn\d", "head.bbox_pred"),
)


def looks_like_caffe2(names: Collection[str]) -> bool:
    """Return whether most names follow Caffe2 (`res2_0_branch2a_w`)."""
    # Most, not any: a user's own state_dict may have a parameter called `scale_w`.
    return sum(bool(_CAFFE2_NAME.match(name)) for name in names) > len(names) / 2


def _name_of(name: str, value: Tensor) -> str | None:
    ending = next((e for e in _ENDINGS if name.endswith(e)), None)
    if ending is None:
        return None
    stem = name.removesuffix(ending)
    block = re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])(_offset)?", stem)
    subnet = re.fullmatch(r"retnet_(cls|bbox)_conv_n(\d)_fpn\d", stem)
    if block is not None:
        stage, index, branch, offset = block.groups()
        module = f"res{stage}.{index}.{_BRANCHES[branch]}{offset or ''}"
    elif subnet is not None:
        # Detectron2's indices count convolutions and ReLUs.
        module = f"head.{subnet[1]}_subnet.{2 * int(subnet[2])}"
    else:
        module = apply_rules(stem, _RULES)
    return None if module is None else module + _ENDINGS[ending]


def translate_caffe2(weights: Mapping[str, Tensor], file_name: str) -> Translation | None:
    """Translate Caffe2's names, or return None if the weights have others."""
    if not looks_like_caffe2(weights):
        return None
    # Momenta belong to the optimizer.
    kept = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
    translated, renamed = rename(kept, _name_of)
    for name, value in translated.items():
        if name.startswith("roi_heads.box_predictor.cls_score."):
            translated[name] = background_last(value)
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            translated[name] = value[4:]  # the box of the background
        elif name.startswith("roi_heads.mask_head.predictor.") and len(value) > 1:
            translated[name] = value[1:]  # its mask, unless there is one for all classes
    if any(re.search(r"_bn_(s|gamma)$", name) for name in kept):
        # Caffe2 folds the running statistics into weight and bias. With mean 0 and variance
        # 1 - eps, a norm computes exactly weight * x + bias.
        for name in [n for n in translated if n.endswith(".norm.weight")]:
            norm = name.removesuffix("weight")
            if norm + "running_mean" not in translated:
                ones = torch.ones_like(translated[name])
                translated[norm + "running_mean"] = torch.zeros_like(ones)
                translated[norm + "running_var"] = ones - FROZEN_BN_EPS
    # MSRA's ResNets have the stride in the first convolution, as in the paper; the ResNeXts, which
    # are recognised by their grouped 3x3 convolution, have it in the 3x3.
    conv = translated.get("res2.0.conv2.weight")
    is_grouped = conv is not None and conv.dim() == 4 and conv.shape[0] != conv.shape[1]
    return Translation("Caffe2", translated, renamed, BGR_OF_CAFFE2, stride_in_1x1=not is_grouped)
