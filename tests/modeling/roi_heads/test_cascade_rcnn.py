"""Tests of detkit.modeling.roi_heads.cascade_rcnn."""

import pytest
import torch
from torch import nn

from detkit.config import configurable
from detkit.layers import ShapeSpec
from detkit.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, build_roi_heads
from detkit.structures import Boxes
from detkit.utils.events import EventStorage
from tests.configs import cfg_with
from tests.helpers import random_boxes, slow_match, slow_pairwise_iou
from tests.modeling.roi_heads.inputs import SIZE, K, batch, proposals, truth

SHAPES = {"p2": ShapeSpec(channels=4, stride=4), "p3": ShapeSpec(channels=4, stride=8)}
S = 3
OBJECT = (6.0, 5.0, 26.0, 25.0)


def config(*overrides):
    options = {
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_HEADS.NUM_CLASSES": K,
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3"],
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": 1.0,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 3,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 8,
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    }
    return cfg_with(options, overrides)


def make(*overrides):
    torch.manual_seed(0)
    heads = build_roi_heads(config(*overrides), SHAPES)
    for predictor in heads.box_predictor:
        torch.nn.init.normal_(
            predictor.bbox_pred.weight, std=0.3
        )  # boxes that move from stage to stage
    return heads


def test_names_of_weights_are_those_of_detectron2():
    parts = [f"box_head.{k}.fc1" for k in range(S)]
    parts += [f"box_predictor.{k}.{part}" for k in range(S) for part in ("cls_score", "bbox_pred")]
    assert list(make().state_dict()) == [
        f"{part}.{kind}" for part in parts for kind in ("weight", "bias")
    ]


def test_every_stage_has_its_losses_and_its_metrics():
    with EventStorage() as storage:
        sampled, losses = make()(*batch(), [proposals(), proposals()], [truth(OBJECT), truth()])
    assert list(losses) == [
        f"{name}_stage{k}" for k in range(S) for name in ("loss_cls", "loss_box_reg")
    ]
    assert [p.has("gt_classes") for p in sampled] == [True, True]
    expected = {f"stage{k}/fast_rcnn/cls_accuracy" for k in range(S)} | {
        f"stage{k}/roi_head/num_fg_samples" for k in (1, 2)
    }
    assert expected <= set(storage.latest())


def test_stages_are_one_after_the_other():
    """Stage by stage with the parts of the heads: boxes clipped and handed on, scores averaged."""
    heads, (images, features) = make().eval(), batch()
    given = [proposals(), proposals(random_boxes(5, 60.0))]
    levels = list(features.values())
    boxes, probs = [p.proposal_boxes for p in given], 0
    with torch.no_grad():
        for head, predictor in zip(heads.box_head, heads.box_predictor, strict=True):
            logits, deltas = predictor(head(heads.box_pooler(levels, boxes)))
            probs = probs + logits.softmax(dim=1) / S
            moved = predictor.box2box_transform.apply_deltas(deltas, Boxes.cat(boxes).tensor)
            boxes = [Boxes(rows) for rows in moved.split([len(p) for p in given])]
            for boxes_i in boxes:
                boxes_i.clip(SIZE)
        found, _ = heads(images, features, given)
    for i, probs_i in enumerate(probs.split([len(p) for p in given])):
        expected = sorted(
            (score.item(), *boxes[i].tensor[r].tolist())
            for r, row in enumerate(probs_i)
            for score in row[:K]
        )
        got = sorted(
            (s.item(), *b)
            for s, b in zip(found[i].scores, found[i].pred_boxes.tensor.tolist(), strict=True)
        )
        torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_stages_label_by_their_own_overlap_without_sampling():
    heads, gt = make(), truth((5.0, 5.0, 40.0, 40.0), (20.0, 10.0, 58.0, 50.0))
    boxes = (gt.gt_boxes.tensor + 4 * torch.randn(50, 1, 4)).flatten(0, 1)
    iou = slow_pairwise_iou(gt.gt_boxes.tensor, boxes)
    counts = []
    for stage, threshold in enumerate((0.5, 0.6, 0.7)):
        (labelled,) = heads._match_and_label_boxes([proposals(boxes)], stage, [gt])
        _, labels = slow_match(iou, [threshold], [0, 1], allow_low_quality=False)
        best = iou.argmax(dim=0)
        expected = [gt.gt_classes[best[r]].item() if label else K for r, label in enumerate(labels)]
        assert labelled.gt_classes.tolist() == expected
        foreground = labelled.gt_classes < K
        assert torch.equal(
            labelled.gt_boxes.tensor[foreground], gt.gt_boxes.tensor[best[foreground]]
        )
        counts.append(int(foreground.sum()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0


def test_labelled_proposals_keep_the_fields_of_a_users_own():
    given = proposals([OBJECT, (0.0, 0.0, 3.0, 3.0)])
    given.objectness_logits = torch.tensor([2.0, -1.0])
    (labelled,) = make()._match_and_label_boxes([given], 1, [truth(OBJECT)])
    assert labelled.objectness_logits.tolist() == [2.0, -1.0]
    assert (labelled.gt_classes == K).tolist() == [False, True]
    assert not given.has("gt_classes")


def test_gradient_of_the_features_is_divided_by_the_stages():
    heads, (images, features) = make(), batch(1)
    features = {name: x.requires_grad_() for name, x in features.items()}
    gradients = []
    for num_stages in (S, 1):
        heads.num_cascade_stages = (
            num_stages  # the gradient of the first stage alone, with and without its share
        )
        _, losses = heads(images, features, [proposals()], [truth(OBJECT)])
        gradients.append(torch.autograd.grad(losses["loss_cls_stage0"], features["p2"])[0])
    torch.testing.assert_close(gradients[0] * S, gradients[1])


@pytest.mark.parametrize("num_proposals", [0, 3], ids=["no-proposals", "proposals"])
def test_batch_of_empty_images_trains(num_proposals):
    heads = make()
    empty = [proposals()[:num_proposals], proposals()[:num_proposals]]
    _, losses = heads(*batch(), empty, [truth(), truth()])
    assert all(losses[f"loss_box_reg_stage{k}"].item() == 0 for k in range(S))
    sum(losses.values()).backward()
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_boxes_that_leave_the_image_are_dropped_in_training_and_kept_in_inference():
    outside = [torch.tensor([[100.0, 10, 120, 20], [5, 5, 20, 20]])]
    heads = make()
    assert len(heads._create_proposals_from_boxes(outside, [SIZE])[0]) == 1
    assert len(heads.eval()._create_proposals_from_boxes(outside, [SIZE])[0]) == 2


def test_image_without_proposals_has_no_detections():
    instances, losses = make().eval()(*batch(), [proposals()[:0], proposals()])
    assert losses == {}
    assert len(instances[0]) == 0
    assert len(instances[1]) > 0


def test_number_of_stages_follows_the_config():
    weights = [[10.0, 10.0, 5.0, 5.0]] * 2
    heads = make(
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
        [0.5, 0.75],
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        weights,
    )
    _, losses = heads(*batch(1), [proposals()], [truth(OBJECT)])
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        pytest.param(
            ["MODEL.ROI_BOX_CASCADE_HEAD.IOUS", [0.5, 0.6]],
            "IOUS and BBOX_REG_WEIGHTS need a value per stage each, got 2 and 3",
            id="lengths",
        ),
        pytest.param(
            ["MODEL.ROI_HEADS.IOU_THRESHOLDS", [0.4]],
            r"must be the same, got 0\.4 and 0\.5",
            id="first-stage",
        ),
        pytest.param(
            [
                "MODEL.ROI_HEADS.IOU_LABELS",
                [0, -1, 1],
                "MODEL.ROI_HEADS.IOU_THRESHOLDS",
                [0.5, 0.6],
            ],
            r"one overlap and \[0, 1\], .*; got \[0\.5, 0\.6\] and \[0, -1, 1\]",
            id="ignored",
        ),
        pytest.param(
            ["MODEL.ROI_HEADS.IOU_LABELS", [1, 0]], r"got \[0\.5\] and \[1, 0\]", id="labels"
        ),
        pytest.param(
            ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True, "MODEL.MASK_ON", True],
            "TRAIN_ON_PRED_BOXES is True",
            id="predicted-boxes",
        ),
        pytest.param(
            ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", False],
            "CLS_AGNOSTIC_BBOX_REG is False",
            id="box-per-class",
        ),
    ],
)
def test_bad_settings_name_their_keys(overrides, message):
    with pytest.raises(ValueError, match=message):
        make(*overrides)


def test_predicted_boxes_without_later_branches_concern_nobody():
    assert isinstance(make("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True), CascadeROIHeads)


def test_stages_that_do_not_agree_are_an_error():
    heads = make()
    arguments = {"box_in_features": ["p2", "p3"], "box_pooler": heads.box_pooler, "num_classes": K}
    arguments |= {
        "batch_size_per_image": 4,
        "positive_fraction": 0.5,
        "proposal_matchers": heads.proposal_matchers,
    }
    with pytest.raises(ValueError, match=r"a matcher per stage: got \(2, 3, 3\)"):
        CascadeROIHeads(
            **arguments, box_heads=heads.box_head[:2], box_predictors=heads.box_predictor
        )
    per_class = FastRCNNOutputLayers(
        input_shape=ShapeSpec(channels=8),
        box2box_transform=heads.box_predictor[0].box2box_transform,
        num_classes=K,
    )
    with pytest.raises(ValueError, match="stage 2 of a cascade needs one box for all classes"):
        CascadeROIHeads(
            **arguments,
            box_heads=heads.box_head,
            box_predictors=[*heads.box_predictor[:2], per_class],
        )


def test_predictors_may_have_layers_of_their_own():
    class TwoLayers(FastRCNNOutputLayers):
        @configurable
        def __init__(self, input_shape, **kwargs):
            super().__init__(input_shape, **kwargs)
            self.bbox_pred = nn.Sequential(
                nn.Linear(self.bbox_pred.in_features, 8), nn.Linear(8, 4)
            )

    class Own(CascadeROIHeads):
        @classmethod
        def _init_box_head(cls, cfg, input_shape):
            parts = super()._init_box_head(cfg, input_shape)
            heads = parts["box_heads"]
            return {**parts, "box_predictors": [TwoLayers(cfg, h.output_shape) for h in heads]}

    assert len(Own(config(), SHAPES).box_predictor) == S


def test_every_stage_has_its_own_scale_of_deltas():
    weights = ((1.0, 1.0, 1.0, 1.0), (2.0, 2.0, 3.0, 3.0), (5.0, 5.0, 6.0, 6.0))
    heads = make("MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS", weights)
    assert (
        tuple(predictor.box2box_transform.weights for predictor in heads.box_predictor) == weights
    )


def test_entry_point_of_the_box_branch_gets_the_targets_as_in_detectron2():
    seen = []

    class Heads(CascadeROIHeads):
        def _forward_box(self, features, proposals, targets=None):
            seen.append(targets)
            return super()._forward_box(features, proposals, targets)

    heads = Heads(config(), SHAPES)
    targets = [truth(OBJECT), truth()]
    _, losses = heads(*batch(), [proposals(), proposals()], targets)
    assert "loss_cls_stage2" in losses
    heads.eval()(*batch(), [proposals(), proposals()])
    assert seen == [targets, None]
