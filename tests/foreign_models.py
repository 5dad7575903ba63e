"""Weights in the layouts of others, made from random numbers: no test needs a published file."""

import re

import torch
import torchvision
from torch import Tensor, nn


def random_torchvision_model(name: str, **kwargs) -> nn.Module:
    """Return a torchvision model in eval mode, all of it random: statistics of norms, too, which are trivial in a new one."""
    with torch.device("meta"):  # its own initialisation would take longer than the test
        model = torchvision.models.get_model(name, weights=None, **kwargs)
    return randomised(model.to_empty(device="cpu")).eval()


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill convolutions so that activations keep their size, norms near 1, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            fan_in = tensor[0].numel()
            tensor.uniform_(-1, 1, generator=generator).mul_((6 / fan_in) ** 0.5)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif name.endswith("running_var") or (name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.uniform_(-0.1, 0.1, generator=generator)
    return model


# Detectron2's names -> those of Detectron's blobs, as its model builders spell them.
_TO_CAFFE2 = (
    (r"stem\.conv1\.norm\.", "res_conv1_bn."),
    (r"stem\.conv1\.", "conv1."),
    (r"res(\d)\.(\d+)\.shortcut\.norm\.", r"res\1_\2_branch1_bn."),
    (r"res(\d)\.(\d+)\.shortcut\.", r"res\1_\2_branch1."),
    (r"res(\d)\.(\d+)\.conv1\.norm\.", r"res\1_\2_branch2a_bn."),
    (r"res(\d)\.(\d+)\.conv2\.norm\.", r"res\1_\2_branch2b_bn."),
    (r"res(\d)\.(\d+)\.conv3\.norm\.", r"res\1_\2_branch2c_bn."),
    (r"res(\d)\.(\d+)\.conv1\.", r"res\1_\2_branch2a."),
    (r"res(\d)\.(\d+)\.conv2\.", r"res\1_\2_branch2b."),
    (r"res(\d)\.(\d+)\.conv3\.", r"res\1_\2_branch2c."),
    (r"fpn_lateral5\.", "fpn_inner_res5_2_sum."),
    (r"fpn_lateral4\.", "fpn_inner_res4_5_sum_lateral."),
    (r"fpn_lateral3\.", "fpn_inner_res3_3_sum_lateral."),
    (r"fpn_lateral2\.", "fpn_inner_res2_2_sum_lateral."),
    (r"fpn_output(\d)\.", r"fpn_res\1_3_sum."),
    (r"top_block\.p(\d)\.", r"fpn_\1."),
    (r"proposal_generator\.rpn_head\.conv\.", "conv_rpn_fpn2."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn_cls_logits_fpn2."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_bbox_pred_fpn2."),
    (r"roi_heads\.box_head\.fc1\.", "fc6."),
    (r"roi_heads\.box_head\.fc2\.", "fc7."),
    (r"roi_heads\.box_predictor\.", ""),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", r"_[mask]_fcn\1."),
    (r"roi_heads\.mask_head\.deconv\.", "conv5_mask."),
    (r"roi_heads\.mask_head\.predictor\.", "mask_fcn_logits."),
    (r"roi_heads\.keypoint_head\.conv_fcn(\d)\.", r"conv_fcn\1."),
    (r"roi_heads\.keypoint_head\.score_lowres\.", "kps_score_lowres."),
    (r"head\.(cls|bbox)_subnet\.0\.", r"retnet_\1_conv_n0_fpn3."),
    (r"head\.(cls|bbox)_subnet\.2\.", r"retnet_\1_conv_n1_fpn3."),
    (r"head\.(cls|bbox)_subnet\.4\.", r"retnet_\1_conv_n2_fpn3."),
    (r"head\.(cls|bbox)_subnet\.6\.", r"retnet_\1_conv_n3_fpn3."),
    (r"head\.cls_score\.", "retnet_cls_pred_fpn3."),
    (r"head\.bbox_pred\.", "retnet_bbox_pred_fpn3."),
)

_TO_MMDET = (
    (r"stem\.conv1\.norm\.", "backbone.bn1."),
    (r"stem\.conv1\.", "backbone.conv1."),
    (r"res2\.", "backbone.layer1."),
    (r"res3\.", "backbone.layer2."),
    (r"res4\.", "backbone.layer3."),
    (r"res5\.", "backbone.layer4."),
    (r"(backbone\.layer.*)\.conv(\d)\.norm\.", r"\1.bn\2."),
    (r"(backbone\.layer.*)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"(backbone\.layer.*)\.shortcut\.", r"\1.downsample.0."),
    (r"proposal_generator\.rpn_head\.conv\.", "rpn_head.rpn_conv."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn_head.rpn_cls."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn_head.rpn_reg."),
    (r"roi_heads\.box_head\.((?:\d\.)?)fc1\.", r"roi_head.bbox_head.\1shared_fcs.0."),
    (r"roi_heads\.box_head\.((?:\d\.)?)fc2\.", r"roi_head.bbox_head.\1shared_fcs.1."),
    (r"roi_heads\.box_predictor\.((?:\d\.)?)cls_score\.", r"roi_head.bbox_head.\1fc_cls."),
    (r"roi_heads\.box_predictor\.((?:\d\.)?)bbox_pred\.", r"roi_head.bbox_head.\1fc_reg."),
    (r"roi_heads\.mask_head\.deconv\.", "roi_head.mask_head.upsample."),
    (r"roi_heads\.mask_head\.predictor\.", "roi_head.mask_head.conv_logits."),
)
_BLOB_ENDINGS = {
    "bn.weight": "bn_s",
    "bn.bias": "bn_b",
    "bn.running_mean": "bn_rm",
    "bn.running_var": "bn_riv",
    ".weight": "_w",
    ".bias": "_b",
}


def as_detectron_blobs(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a Detectron2 model's weights as Detectron saves them: names of blobs, the background first and with a box."""
    blobs = {}
    for name, value in state.items():
        stem = _short(name)
        for pattern, blob in _TO_CAFFE2:
            stem = re.sub(rf"^{pattern}", blob, stem)
        ending = next(e for e in _BLOB_ENDINGS if stem.endswith(e))
        if "box_predictor.cls_score." in name:
            value = torch.cat([value[-1:], value[:-1]])
        elif "box_predictor.bbox_pred." in name:
            value = torch.cat([torch.full_like(value[:4], -9), value])
        elif "mask_head.predictor." in name:
            value = torch.cat([torch.full_like(value[:1], -9), value])
        blobs[stem.removesuffix(ending) + _BLOB_ENDINGS[ending]] = value
    return blobs


def as_mmdet(state: dict[str, Tensor], first_level: int = 2) -> dict[str, Tensor]:
    """Return a Detectron2 model's weights under the names of MMDetection."""
    result = {}
    for name, value in state.items():
        new = _short(name)
        for pattern, theirs in _TO_MMDET:
            new = re.sub(rf"^{pattern}", theirs, new)
        new = re.sub(
            r"^fpn_lateral(\d)\.",
            lambda m: f"neck.lateral_convs.{int(m[1]) - first_level}.conv.",
            new,
        )
        new = re.sub(
            r"^fpn_output(\d)\.", lambda m: f"neck.fpn_convs.{int(m[1]) - first_level}.conv.", new
        )
        new = re.sub(
            r"^roi_heads\.mask_head\.mask_fcn(\d)\.",
            lambda m: f"roi_head.mask_head.convs.{int(m[1]) - 1}.conv.",
            new,
        )
        result[new] = value
    return result


def _short(name: str) -> str:
    return re.sub(r"^(backbone\.bottom_up\.|backbone\.|roi_heads\.(?=res5))", "", name)
