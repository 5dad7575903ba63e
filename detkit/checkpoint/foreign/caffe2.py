"""The layout of Caffe2: MSRA's ImageNet weights (`R-50.pkl`) and the model zoo of Detectron.

Names are those of blobs: `res2_0_branch2a_w`, `fpn_inner_res4_5_sum_lateral_w`. Detectron counts
the background as class 0, and has boxes and masks for it. Its anchors and boxes end on the last
pixel instead of after it, so its detectors, run as Detectron2's, lose up to a pixel of precision
until they are trained on.
"""

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from detkit.checkpoint.foreign.layout import (
    BGR_OF_CAFFE2,
    Layout,
    Rule,
    Translation,
    apply_rules,
    background_last,
    rename,
)

_CAFFE2_NAME = re.compile(
    r"^[^.]+_(w|b|s|bn_s|bn_b|bn_beta|bn_gamma|bn_rm|bn_riv|bn_running_mean|bn_running_var)$"
)
_FROZEN_BN_EPS = 1e-5
# Endings, longest first: those of a norm say so.
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
    # The suffix is the level whose copy holds the weights that all levels share.
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
    # `kps_score` itself, without `_lowres`, is a fixed bilinear enlargement where there are two.
    (r"kps_score_lowres", "roi_heads.keypoint_head.score_lowres"),
    (r"retnet_cls_pred_fpn\d", "head.cls_score"),
    (r"retnet_bbox_pred_fpn\d", "head.bbox_pred"),
)


def looks_like_caffe2(names: Collection[str]) -> bool:
    """Return whether most names follow Caffe2 (`res2_0_branch2a_w`)."""
    # Most, not any: a state_dict of one's own may hold a parameter that is called `scale_w`.
    return sum(bool(_CAFFE2_NAME.match(name)) for name in names) > len(names) / 2


def _name_of(name: str, value: Tensor) -> str | None:
    ending = next((e for e in _ENDINGS if name.endswith(e)), None)
    if ending is None:
        return None
    stem = name.removesuffix(ending)
    module = _block_name(stem) or _subnet_name(stem) or apply_rules(stem, _RULES)
    return None if module is None else module + _ENDINGS[ending]


def _block_name(stem: str) -> str | None:
    block = re.fullmatch(r"res([2-5])_(\d+)_branch(1|2[abc])(_offset)?", stem)
    if block is None:
        return None
    stage, index, branch, offset = block.groups()
    return f"res{stage}.{index}.{_BRANCHES[branch]}{offset or ''}"


def _subnet_name(stem: str) -> str | None:
    subnet = re.fullmatch(r"retnet_(cls|bbox)_conv_n(\d)_fpn\d", stem)
    return None if subnet is None else f"head.{subnet[1]}_subnet.{2 * int(subnet[2])}"


def _translate(weights: Mapping[str, Tensor], file_name: str) -> Translation:
    # Momenta of the optimizer, and counters.
    kept = {name: value for name, value in weights.items() if not name.endswith("_momentum")}
    renamed = rename(kept, _name_of)
    translated = {renamed.get(name, name): value for name, value in kept.items()}
    _drop_background(translated)
    _add_statistics(translated, kept)
    is_grouped = _is_grouped(translated)
    # MSRA's own networks have the stride in the first convolution, as the paper does; the ResNeXts
    # in the 3x3.
    return Translation("Caffe2", translated, renamed, BGR_OF_CAFFE2, stride_in_1x1=not is_grouped)


def _drop_background(weights: dict[str, Tensor]) -> None:
    for name, value in weights.items():
        if name.startswith("roi_heads.box_predictor.cls_score."):
            weights[name] = background_last(value)
        elif name.startswith("roi_heads.box_predictor.bbox_pred."):
            weights[name] = value[4:]
        elif name.startswith("roi_heads.mask_head.predictor.") and len(value) > 1:
            weights[name] = value[1:]


def _add_statistics(translated: dict[str, Tensor], in_file: Collection[str]) -> None:
    """Return batch norms that were folded into a factor and a summand the statistics under which
    they mean just that.
    """
    if not any(re.search(r"_bn_(s|gamma)$", name) for name in in_file):
        return
    for name in [n for n in translated if n.endswith(".norm.weight")]:
        norm = name.removesuffix("weight")
        if norm + "running_mean" not in translated:
            translated[norm + "running_mean"] = torch.zeros_like(translated[name])
            translated[norm + "running_var"] = torch.ones_like(translated[name]) - _FROZEN_BN_EPS


def _is_grouped(weights: Mapping[str, Tensor]) -> bool:
    conv = weights.get("res2.0.conv2.weight")
    return conv is not None and conv.dim() == 4 and conv.shape[0] != conv.shape[1]


CAFFE2 = Layout(looks_like_caffe2, _translate)
