"""Tests of detkit.modeling.roi_heads.res5_roi_heads."""

import numpy as np
import pytest
import torch
from torch import nn

from detkit.layers import ShapeSpec
from detkit.modeling.backbone import BottleneckBlock
from detkit.modeling.roi_heads import Res5ROIHeads, build_roi_heads
from detkit.structures import Boxes, ImageList, Instances, PolygonMasks
from tests.configs import cfg_with
from tests.helpers import slow_roi_align
from tests.modeling.roi_heads.inputs import SIZE, K, truth

SHAPES = {"res4": ShapeSpec(channels=64, stride=16)}
OBJECT = (6.0, 5.0, 40.0, 45.0)


def config(*overrides):
    options = {
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": K,
        "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 4,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 2,
    }
    return cfg_with(options, overrides)


def make(*overrides):
    torch.manual_seed(0)
    return build_roi_heads(config(*overrides), SHAPES)


def batch(num_images=2):
    torch.manual_seed(1)
    images = ImageList(torch.zeros(num_images, 3, *SIZE), [SIZE] * num_images)
    return images, {"res4": torch.randn(num_images, 64, 4, 6)}


def proposals(*boxes):
    boxes = torch.tensor(boxes or [[5.0, 5, 45, 45], [30, 10, 90, 60], [0, 0, 96, 64]])
    return Instances(SIZE, proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes)))


def test_training_gives_sampled_proposals_and_losses():
    sampled, losses = make()(*batch(), [proposals(), proposals()], [truth(OBJECT), truth()])
    assert set(losses) == {"loss_cls", "loss_box_reg"}
    assert [len(p) for p in sampled] == [4, 3]


def test_classes_come_from_the_mean_over_the_blocks_of_aligned_samples():
    heads, (images, features), given = make().eval(), batch(1), proposals()
    rois = torch.cat([torch.zeros(len(given), 1), given.proposal_boxes.tensor], dim=1)
    with torch.no_grad():
        pooled = slow_roi_align(features["res4"], rois, 4, 1 / 16, 0, aligned=True)
        probs = heads.box_predictor.cls_score(heads.res5(pooled).mean(dim=(2, 3))).softmax(dim=1)
        (found,), _ = heads(images, features, [given])
    best = probs[:, :K].max()
    assert found.scores[0].item() == pytest.approx(best.item(), rel=1e-4)


def test_stage_is_res5_of_the_config():
    heads = make("MODEL.RESNETS.NUM_GROUPS", 2)
    assert [type(block) for block in heads.res5] == [BottleneckBlock] * 3
    assert [block.stride for block in heads.res5] == [2, 1, 1]
    assert heads.res5[0].conv2.groups == 2
    assert heads.box_predictor.cls_score.in_features == heads.res5[-1].out_channels == 128


class _WithNorm(Res5ROIHeads):
    @classmethod
    def _build_res5_block(cls, cfg):
        stage, channels = super()._build_res5_block(cfg)
        stage.add_module("norm", nn.BatchNorm2d(channels))
        return stage, channels


class _WithNormOfTheObject(Res5ROIHeads):
    """As code from before it was a classmethod, which Detectron2 runs too."""

    def _build_res5_block(self, cfg):
        stage, channels = super()._build_res5_block(cfg)
        stage.add_module("norm", nn.BatchNorm2d(channels))
        return stage, channels


@pytest.mark.parametrize("heads_class", [_WithNorm, _WithNormOfTheObject])
def test_subclass_may_build_another_stage(heads_class):
    heads = heads_class(config(), SHAPES)
    assert heads.res5.norm.num_features == heads.box_predictor.cls_score.in_features == 128
    _, losses = heads(*batch(), [proposals(), proposals()], [truth(OBJECT), truth()])
    sum(losses.values()).backward()
    assert heads.res5.norm.weight.grad.abs().sum() > 0


def test_pooled_features_of_other_channels_are_taken():
    heads = build_roi_heads(config(), {"res4": ShapeSpec(channels=24, stride=16)})
    assert heads.res5[0].in_channels == 24


def test_stage_of_a_shallow_network_has_basic_blocks():
    heads = make("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.WIDTH_PER_GROUP", 64)
    assert len(heads.res5) == 2


@pytest.mark.parametrize("num_proposals", [0, 3], ids=["no-proposals", "proposals"])
def test_batch_of_empty_images_trains(num_proposals):
    heads = make("MODEL.RESNETS.NORM", "BN").train()
    empty = [proposals()[:num_proposals], proposals()[:num_proposals]]
    if num_proposals == 0:  # batch norm cannot take nothing
        heads = make().train()
    _, losses = heads(*batch(), empty, [truth(), truth()])
    assert losses["loss_box_reg"].item() == 0
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_image_without_proposals_has_no_detections():
    instances, losses = make().eval()(*batch(), [proposals()[:0], proposals()])
    assert losses == {}
    assert len(instances[0]) == 0
    assert len(instances[1]) > 0


def test_given_boxes_are_kept():
    given = [Instances(SIZE, pred_boxes=Boxes([OBJECT]), pred_classes=torch.tensor([1]))]
    (kept,) = make().eval().forward_with_given_boxes(batch(1)[1], given)
    assert kept.pred_boxes.tensor.tolist() == [list(OBJECT)]


MASKS = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)


def with_masks(gt):
    boxes = gt.gt_boxes.tensor.tolist()
    gt.gt_masks = PolygonMasks(
        [[np.array([x1, y1, x2, y1, x2, y2, x1, y2])] for x1, y1, x2, y2 in boxes]
    )
    return gt


@pytest.mark.parametrize("objects", [(OBJECT,), ()], ids=["object", "empty"])
def test_masks_are_trained_on_the_features_of_the_boxes(objects):
    heads = make(*MASKS)
    assert {"mask_head.deconv.weight", "mask_head.predictor.weight"} < set(heads.state_dict())
    _, losses = heads(
        *batch(), [proposals(), proposals()], [with_masks(truth(*objects)), with_masks(truth())]
    )
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_mask"}
    assert (losses["loss_mask"].item() > 0) == bool(objects)
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name


def test_detections_have_masks():
    found, _ = make(*MASKS).eval()(*batch(), [proposals(), proposals()[:0]])
    assert found[0].pred_masks.shape[1:] == (
        1,
        4,
        4,
    )  # 4 cells, 2 after the stride of res5, 4 after the upsampling
    assert len(found[0].pred_masks) == len(found[0]) > 0
    assert found[1].pred_masks.shape == (0, 1, 4, 4)


def test_given_boxes_are_not_for_training():
    with pytest.raises(RuntimeError, match=r"call eval\(\) on the model first"):
        make().forward_with_given_boxes({}, [])


def test_given_boxes_need_their_fields():
    with pytest.raises(ValueError, match="image 0 need a field 'pred_classes'"):
        make().eval().forward_with_given_boxes({}, [Instances(SIZE, pred_boxes=Boxes([]))])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ("MODEL.KEYPOINT_ON", True),
            "MODEL.KEYPOINT_ON is True, but Res5ROIHeads has no keypoint branch",
        ),
        (
            ("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True, "MODEL.MASK_ON", True),
            "TRAIN_ON_PRED_BOXES is True, but .* Res5ROIHeads share",
        ),
    ],
)
def test_setting_that_these_heads_cannot_follow_is_an_error(override, message):
    with pytest.raises(ValueError, match=message):
        make(*override)


def test_predicted_boxes_without_masks_concern_nobody():
    assert not make("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True).mask_on


def test_several_features_are_an_error():
    shapes = {**SHAPES, "res5": ShapeSpec(channels=64, stride=32)}
    cfg = config("MODEL.ROI_HEADS.IN_FEATURES", ["res4", "res5"])
    with pytest.raises(
        ValueError,
        match=r"IN_FEATURES must be one feature for Res5ROIHeads, got \['res4', 'res5'\]",
    ):
        build_roi_heads(cfg, shapes)


def test_training_without_ground_truth_is_an_error():
    with pytest.raises(ValueError, match="targets is None"):
        make()(*batch(), [proposals(), proposals()])
