import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from detkit.checkpoint.foreign import translate, translate_for
from detkit.checkpoint.foreign.caffe2 import looks_like_caffe2
from detkit.checkpoint.foreign.layout import differing_settings
from tests.foreign_models import as_detectron_blobs

GOLDEN = Path(__file__).parents[2] / "golden"
MODELS = json.loads(gzip.decompress((GOLDEN / "state_dicts.json.gz").read_bytes()))


def numbered(model):
    """Weights with the names of a model of Detectron2's zoo and as many rows, each with a number of its own."""
    rows = {name: shape[0] for name, shape in MODELS[model]["keys"].items()}
    return {
        name: torch.arange(count).float() + 1000 * i for i, (name, count) in enumerate(rows.items())
    }


@pytest.mark.parametrize(
    "model",
    [
        "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml",
        "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
        "COCO-Detection/rpn_R_50_FPN_1x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_X_101_32x8d_FPN_3x.yaml",
        "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    ],
)
def test_blobs_of_zoo_models_come_back(model):
    weights = numbered(model)
    translation = translate_for(as_detectron_blobs(weights), weights)
    assert translation.layout == "Caffe2"
    assert set(translation.weights) == set(weights)
    assert all(torch.equal(translation.weights[name], value) for name, value in weights.items())


def test_background_moves_from_the_first_class_to_the_last():
    blobs = {
        "cls_score_w": torch.arange(3.0)[:, None],
        "bbox_pred_b": torch.arange(12.0),
        "mask_fcn_logits_b": torch.arange(3.0),
    }
    weights = translate(blobs).weights
    assert weights["roi_heads.box_predictor.cls_score.weight"].flatten().tolist() == [1, 2, 0]
    assert weights["roi_heads.box_predictor.bbox_pred.bias"].tolist() == list(range(4, 12))
    assert weights["roi_heads.mask_head.predictor.bias"].tolist() == [1, 2]


def test_mask_for_all_classes_together_is_kept():
    weights = translate({"mask_fcn_logits_b": torch.ones(1), "conv5_mask_w": torch.ones(1)}).weights
    assert weights["roi_heads.mask_head.predictor.bias"].tolist() == [1]


def test_folded_norms_get_statistics_that_change_nothing():
    blobs = {
        "conv1_w": torch.ones(2, 3, 7, 7),
        "res_conv1_bn_s": torch.tensor([2.0, 3.0]),
        "res_conv1_bn_b": torch.ones(2),
    }
    weights = translate(blobs).weights
    norm = nn.BatchNorm2d(2).eval()
    norm.load_state_dict(
        {name.removeprefix("stem.conv1.norm."): v for name, v in weights.items() if "norm" in name},
        strict=False,
    )
    x = torch.rand(1, 2, 4, 4)
    torch.testing.assert_close(norm(x), x * torch.tensor([2.0, 3.0]).view(1, 2, 1, 1) + 1)


@pytest.mark.parametrize(
    ("blob", "name"),
    [
        ("res2_0_branch2a_bn_rm", "res2.0.conv1.norm.running_mean"),
        ("res2_0_branch2a_bn_riv", "res2.0.conv1.norm.running_var"),
        ("res2_0_branch2a_bn_running_var", "res2.0.conv1.norm.running_var"),
        ("res2_0_branch2a_bn_gamma", "res2.0.conv1.norm.weight"),
        ("res2_0_branch2a_gn_s", "res2.0.conv1.norm.weight"),
        ("conv1_gn_s", "stem.conv1.norm.weight"),
        ("rpn_cls_logits_w", "proposal_generator.rpn_head.objectness_logits.weight"),
        ("fpn_inner_res5_2_sum_gn_b", "fpn_lateral5.norm.bias"),
        ("head_conv1_gn_s", "roi_heads.box_head.conv1.norm.weight"),
        ("fc1000_b", "linear.bias"),
        ("_[mask]_fcn1_w", "roi_heads.mask_head.mask_fcn1.weight"),
        ("conv5_mask_b", "roi_heads.mask_head.deconv.bias"),
        ("conv_fcn8_w", "roi_heads.keypoint_head.conv_fcn8.weight"),
        ("kps_score_lowres_w", "roi_heads.keypoint_head.score_lowres.weight"),
    ],
)
def test_spellings(blob, name):
    assert name in translate({blob: torch.ones(1)}).weights


def test_group_norms_get_no_statistics():
    assert set(translate({"conv1_gn_s": torch.ones(1), "conv1_gn_b": torch.ones(1)}).weights) == {
        "stem.conv1.norm.weight",
        "stem.conv1.norm.bias",
    }


def test_state_of_the_optimizer_is_left_out_and_the_unknown_keeps_its_name():
    weights = translate(
        {"conv1_w": torch.ones(1), "conv1_w_momentum": torch.ones(1), "other_w": torch.ones(1)}
    ).weights
    assert set(weights) == {"stem.conv1.weight", "other_w"}


class Model(nn.Module):
    def __init__(self, mean, std=(1.0, 1.0, 1.0)):
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))


def test_channel_order_is_compared_with_the_models():
    translation = translate({"conv1_w": torch.ones(1)})
    assert differing_settings(translation, Model([103.53, 116.28, 123.675])) == []
    (told,) = differing_settings(translation, Model([123.675, 116.28, 103.53]))
    assert (
        "set INPUT.FORMAT BGR, MODEL.PIXEL_MEAN [103.53, 116.28, 123.675]; the model has PIXEL_MEAN [123.675"
        in told
    )


BLOBS = ["conv1_w", "res2_0_branch2a_w", "res2_0_branch2a_bn_s", "fc1000_b"]


def test_names_of_blobs_are_recognised_beside_a_few_others():
    assert looks_like_caffe2([*BLOBS, "epoch"])


@pytest.mark.parametrize(
    "names",
    [
        pytest.param([], id="nothing"),
        pytest.param(["backbone.res2.0.conv1.weight", "layer1.0.bn1.running_var"], id="torch"),
        pytest.param(
            ["conv.weight", "conv.bias", "scale_w"], id="one parameter called like a blob"
        ),
        pytest.param([*BLOBS, "conv.weight", "a.bias", "b.bias", "c.bias"], id="half of them"),
    ],
)
def test_names_of_which_most_are_no_blobs_are_not_recognised(names):
    assert not looks_like_caffe2(names)
