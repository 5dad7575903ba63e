"""Tests of detkit.modeling.roi_heads.fast_rcnn."""

import math

import pytest
import torch
import torch.nn.functional as F

from detkit.config import get_cfg
from detkit.layers import NMSMethod, ShapeSpec
from detkit.modeling.box_regression import Box2BoxTransform
from detkit.modeling.roi_heads.fast_rcnn import (
    FastRCNNOutputLayers,
    fast_rcnn_inference,
    sample_federated_classes,
)
from detkit.structures import Boxes, Instances
from detkit.utils.events import EventStorage
from tests.helpers import random_boxes, slow_batched_nms

K = 3
SIZE = (100, 100)
TRANSFORM = Box2BoxTransform((10, 10, 5, 5))


def make(**kwargs):
    torch.manual_seed(0)
    arguments = {
        "input_shape": ShapeSpec(channels=6),
        "box2box_transform": TRANSFORM,
        "num_classes": K,
        **kwargs,
    }
    return FastRCNNOutputLayers(**arguments)


def sampled(*classes, with_gt=True, seed=0):
    proposals = Instances(SIZE, proposal_boxes=Boxes(random_boxes(len(classes), seed=seed)))
    proposals.gt_classes = torch.tensor(classes, dtype=torch.int64)
    if with_gt:
        proposals.gt_boxes = Boxes(random_boxes(len(classes), seed=seed + 1))
    return proposals


def random_predictions(num, shared=False):
    generator = torch.Generator().manual_seed(5)
    deltas = torch.randn(num, 4 if shared else 4 * K, generator=generator)
    return torch.randn(num, K + 1, generator=generator), deltas


def test_names_shapes_and_start_of_the_weights():
    state = make(input_shape=ShapeSpec(channels=64, height=2, width=2)).state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "cls_score.weight": (K + 1, 256),
        "cls_score.bias": (K + 1,),
        "bbox_pred.weight": (4 * K, 256),
        "bbox_pred.bias": (4 * K,),
    }
    assert state["cls_score.weight"].std() == pytest.approx(0.01, rel=0.2)
    assert state["bbox_pred.weight"].std() == pytest.approx(0.001, rel=0.2)
    assert not state["cls_score.bias"].any()
    assert not state["bbox_pred.bias"].any()


def test_shape_may_be_the_number_of_features():
    assert make(input_shape=64).cls_score.in_features == 64


def test_class_agnostic_boxes_have_four_deltas():
    assert make(cls_agnostic_bbox_reg=True).bbox_pred.weight.shape == (4, 6)


def test_sigmoid_starts_at_a_probability_of_one_percent():
    assert make(use_sigmoid_ce=True).cls_score.bias.sigmoid().tolist() == pytest.approx(
        [0.01] * (K + 1), rel=1e-5
    )


def test_forward_flattens_its_input():
    scores, deltas = make(input_shape=ShapeSpec(channels=6, height=2, width=2))(
        torch.randn(5, 6, 2, 2)
    )
    assert (scores.shape, deltas.shape) == ((5, K + 1), (5, 4 * K))


@pytest.mark.parametrize("shared", [False, True], ids=["per-class", "shared"])
def test_losses_by_hand(shared):
    layers = make(cls_agnostic_bbox_reg=shared)
    proposals = [sampled(1, K), sampled(K, with_gt=False, seed=4), sampled(0, seed=8)]
    scores, deltas = random_predictions(4, shared)
    losses = layers.losses((scores, deltas), proposals)
    classes = [1, K, K, 0]
    torch.testing.assert_close(losses["loss_cls"], F.cross_entropy(scores, torch.tensor(classes)))
    expected = 0.0
    for row, proposal in {0: proposals[0], 3: proposals[2]}.items():
        target = TRANSFORM.get_deltas(
            proposal.proposal_boxes.tensor[:1], proposal.gt_boxes.tensor[:1]
        )
        own = deltas[row] if shared else deltas[row, 4 * classes[row] : 4 * classes[row] + 4]
        expected += (own - target[0]).abs().sum()
    torch.testing.assert_close(
        losses["loss_box_reg"], expected / 4
    )  # over all regions, not over the two objects


def test_sigmoid_loss_by_hand():
    scores, deltas = random_predictions(3)
    losses = make(use_sigmoid_ce=True).losses((scores, deltas), [sampled(0, 2, K)])
    target = torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 0, 0]])
    expected = F.binary_cross_entropy_with_logits(scores[:, :K], target, reduction="sum") / 3
    torch.testing.assert_close(losses["loss_cls"], expected)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 4.0], [0.5, 1.0, 4.0, 0.1]])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_weighted_and_focal_loss_by_hand(sigmoid, weights, gamma):
    scores, deltas = random_predictions(4)
    layers = make(use_sigmoid_ce=sigmoid, class_weights=weights, focal_loss_gamma=gamma)
    loss = layers.losses((scores, deltas), [sampled(0, 2, K, 1)])["loss_cls"]
    factors = [1.0] * (K + 1) if weights is None else [*weights, 1.0][: K + 1]
    expected = 0.0
    for row, truth in enumerate([0, 2, K, 1]):
        if sigmoid:
            for k in range(K):
                prob = scores[row, k].sigmoid() if k == truth else 1 - scores[row, k].sigmoid()
                expected += -factors[k] * (1 - prob) ** gamma * prob.log() / 4
        else:
            prob = scores[row].softmax(0)[truth]
            expected += -factors[truth] * (1 - prob) ** gamma * prob.log() / 4
    torch.testing.assert_close(loss, expected)
    assert layers.state_dict().keys() == make(use_sigmoid_ce=sigmoid).state_dict().keys()


@pytest.mark.parametrize("classes", [(), (0, K)])
def test_focal_loss_of_what_is_certain_has_a_finite_gradient(classes):
    layers = make(class_weights=[1.0] * K, focal_loss_gamma=0.5)
    scores = torch.zeros(len(classes), K + 1)
    scores[range(len(classes)), list(classes)] = 200.0
    scores.requires_grad_()
    deltas = torch.zeros(len(classes), 4 * K)
    layers.losses((scores, deltas), [sampled(*classes)])["loss_cls"].backward()
    assert scores.grad.isfinite().all()


def test_class_weights_and_focal_loss_from_the_config():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.merge_from_list(
        ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", [1, 3], "MODEL.ROI_BOX_HEAD.LOSS", "focal"]
    )
    layers = FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))
    assert (layers.class_weights.tolist(), layers.focal_loss_gamma) == ([1, 3, 1], 2.0)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    with pytest.raises(ValueError, match="ROI_BOX_HEAD.CLASS_WEIGHTS.* 5 classes"):
        FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))


def test_loss_weights_are_factors():
    predictions, proposals = random_predictions(3), [sampled(0, 2, K)]
    plain = make().losses(predictions, proposals)
    weighted = make(loss_weight={"loss_box_reg": 3.0}).losses(predictions, proposals)
    torch.testing.assert_close(weighted["loss_box_reg"], 3 * plain["loss_box_reg"])
    torch.testing.assert_close(weighted["loss_cls"], plain["loss_cls"])


@pytest.mark.parametrize("loss_type", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "classes", [(), (K, K), (0, K, 2)], ids=["no-regions", "background", "some"]
)
def test_every_parameter_gets_a_finite_gradient(classes, sigmoid, loss_type):
    layers = make(box_reg_loss_type=loss_type, use_sigmoid_ce=sigmoid)
    losses = layers.losses(layers(torch.randn(len(classes), 6)), [sampled(*classes)])
    sum(losses.values()).backward()
    for name, parameter in layers.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_losses_of_no_images_are_zero_and_have_a_gradient():
    scores, deltas = torch.randn(0, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    losses = make().losses((scores, deltas), [])
    assert [float(loss.detach()) for loss in losses.values()] == [0.0, 0.0]
    sum(losses.values()).backward()
    assert scores.grad is not None
    assert deltas.grad is not None


def test_accuracy_is_logged():
    scores = torch.eye(K + 1)[[0, K, K, 1]]  # predicted classes
    with EventStorage(0) as storage:
        make().losses((scores, torch.zeros(4, 4 * K)), [sampled(0, 1, K, K)])
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest == {
        "fast_rcnn/cls_accuracy": 0.5,
        "fast_rcnn/fg_cls_accuracy": 0.5,
        "fast_rcnn/false_negative": 0.5,
    }


@pytest.mark.parametrize("classes", [(), (K, K)], ids=["no-regions", "background"])
def test_accuracy_of_nothing_is_not_logged(classes):
    with EventStorage(0) as storage:
        make().losses(random_predictions(len(classes)), [sampled(*classes)])
        assert "fast_rcnn/fg_cls_accuracy" not in storage.latest()


def test_predicted_boxes_are_decoded_per_image():
    proposals = [sampled(0, 1), sampled(), sampled(2, seed=3)]
    boxes = make().predict_boxes((torch.zeros(3, K + 1), torch.zeros(3, 4 * K)), proposals)
    assert [len(b) for b in boxes] == [2, 0, 1]
    torch.testing.assert_close(boxes[2], proposals[2].proposal_boxes.tensor.repeat(1, K))
    assert make().predict_boxes((torch.zeros(0, K + 1), torch.zeros(0, 4 * K)), []) == []


@pytest.mark.parametrize("shared", [False, True], ids=["per-class", "shared"])
def test_boxes_for_true_classes_are_those_of_the_class(shared):
    layers, proposals = make(cls_agnostic_bbox_reg=shared), [sampled(2, 0, K)]
    predictions = random_predictions(3, shared)
    (chosen,) = layers.predict_boxes_for_gt_classes(predictions, proposals)
    (boxes,) = layers.predict_boxes(predictions, proposals)
    expected = boxes if shared else torch.stack([boxes[0, 8:12], boxes[1, :4], boxes[2, 8:12]])
    torch.testing.assert_close(chosen, expected)


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
def test_probabilities_per_image(sigmoid):
    scores = torch.tensor([[math.log(2), 0, 0, 0.0]]).repeat(3, 1)
    probs = make(use_sigmoid_ce=sigmoid).predict_probs(
        (scores, torch.empty(0)), [sampled(0, 1), sampled(1)]
    )
    expected = [2 / 3, 0.5, 0.5, 0.5] if sigmoid else [0.4, 0.2, 0.2, 0.2]
    assert [len(p) for p in probs] == [2, 1]
    assert probs[0][1].tolist() == pytest.approx(expected)


def test_inference_takes_threshold_and_topk():
    layers = make(test_score_thresh=0.5, test_topk_per_image=1)
    proposals = Instances(
        SIZE, proposal_boxes=Boxes([[0, 0, 10, 10], [50, 50, 60, 60], [20, 20, 30, 30]])
    )
    scores = torch.tensor([[5.0, 0, 0, 0], [0, 9, 0, 0], [0, 0, 0, 9]])
    (found,), (regions,) = layers.inference((scores, torch.zeros(3, 4 * K)), [proposals])
    assert found.pred_classes.tolist() == regions.tolist() == [1]
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor([[50.0, 50, 60, 60]]))


def test_losses_and_boxes_are_float32_under_autocast():
    layers, proposals = make(), [sampled(0, 1, K)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = layers(torch.randn(3, 6))
        losses = layers.losses(predictions, proposals)
        found, _ = layers.inference(predictions, proposals)
    assert predictions[0].dtype == torch.bfloat16
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found[0].pred_boxes.tensor.dtype == found[0].scores.dtype == torch.float32


def test_config_gives_everything():
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 7
    cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = True
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT = 2.5
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE = "giou"
    cfg.MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA = 0.5
    cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS = (1.0, 2.0, 3.0, 4.0)
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.3
    cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 0.6
    cfg.TEST.DETECTIONS_PER_IMAGE = 11
    layers = FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))
    assert layers.cls_score.weight.shape == (8, 6)
    assert layers.bbox_pred.weight.shape == (4, 6)
    assert layers.loss_weight == {"loss_box_reg": 2.5}
    assert (layers.box_reg_loss_type, layers.smooth_l1_beta) == ("giou", 0.5)
    assert layers.box2box_transform.weights == (1.0, 2.0, 3.0, 4.0)
    assert (layers.test_score_thresh, layers.test_nms_thresh, layers.test_topk_per_image) == (
        0.3,
        0.6,
        11,
    )


def federated_cfg(*overrides):
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = K
    cfg.MODEL.ROI_BOX_HEAD.USE_FED_LOSS = True
    cfg.merge_from_list(["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True, *overrides])
    return cfg


@pytest.mark.parametrize(
    ("counts", "power", "weights"),
    [
        pytest.param([4, 9, 0], 0.5, [2.0, 3.0, 0.0], id="root"),
        pytest.param([4, 9, 0], 2.0, [16.0, 81.0, 0.0], id="square"),
        pytest.param([], 0.5, [1.0] * 3, id="none"),
    ],
)
def test_federated_loss_samples_by_powers_of_the_counts(counts, power, weights):
    cfg = federated_cfg("MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS", counts)
    cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER = power
    cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES = 2
    layers = FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))
    assert layers.fed_loss_num_classes == 2
    assert layers.state_dict()["fed_loss_cls_weights"].tolist() == weights


def test_federated_loss_is_the_sigmoid_loss_of_the_classes_it_looks_at():
    logits, deltas = random_predictions(3)
    proposals = [sampled(0, 0, K)]
    cost = F.binary_cross_entropy_with_logits(
        logits[:, :K], F.one_hot(torch.tensor([0, 0, K]), K + 1)[:, :K].float(), reduction="none"
    )
    # The class that appears and background make two: there is place for one more, which can only be class 2.
    layers = make(use_sigmoid_ce=True, fed_loss_cls_weights=[1.0, 0.0, 5.0], fed_loss_num_classes=3)
    loss = layers.losses((logits, deltas), proposals)["loss_cls"]
    torch.testing.assert_close(loss, cost[:, [0, 2]].sum() / 3)
    layers = make(use_sigmoid_ce=True, fed_loss_cls_weights=[1.0, 0.0, 5.0], fed_loss_num_classes=1)
    torch.testing.assert_close(
        layers.losses((logits, deltas), proposals)["loss_cls"], cost[:, 0].sum() / 3
    )


def test_federated_loss_is_asked_for_as_in_detectron2():
    weights = torch.tensor([1.0, 0.0, 5.0])
    layers = make(
        use_sigmoid_ce=True,
        use_fed_loss=True,
        get_fed_loss_cls_weights=lambda: weights,
        fed_loss_num_classes=2,
    )
    assert layers.fed_loss_cls_weights.tolist() == weights.tolist()
    assert make(get_fed_loss_cls_weights=lambda: weights).fed_loss_cls_weights is None
    with pytest.raises(ValueError, match="use_fed_loss needs get_fed_loss_cls_weights, got None"):
        make(use_sigmoid_ce=True, use_fed_loss=True)


def test_federated_loss_without_sigmoid_names_the_keys():
    cfg = federated_cfg("MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", False)
    with pytest.raises(
        ValueError, match="use_sigmoid_ce must be True.*set by MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"
    ):
        FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        pytest.param([1, 2], "needs a number for each of 3 classes, got 2", id="too-few"),
        pytest.param([1, 2, -3], "must be at least 0", id="negative"),
    ],
)
def test_federated_weights_must_fit_the_classes(counts, message):
    def build():
        cfg = federated_cfg("MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS", counts)
        FastRCNNOutputLayers(cfg, ShapeSpec(channels=6))

    with pytest.raises(ValueError, match=f"MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS {message}"):
        build()


def test_unknown_box_loss_is_found_when_the_layers_are_built():
    with pytest.raises(ValueError, match="box_reg_loss_type must be one of"):
        make(box_reg_loss_type="l3")


def infer(boxes, scores, score_thresh=0.05, nms_thresh=0.5, topk=100, **kwargs):
    instances, regions = fast_rcnn_inference(
        [boxes], [scores], [SIZE], score_thresh, nms_thresh, topk, **kwargs
    )
    return instances[0], regions[0]


def random_boxes_and_scores(num, num_classes, shared=False):
    boxes = random_boxes(num if shared else num * num_classes)
    scores = torch.rand(num, num_classes + 1, generator=torch.Generator().manual_seed(3))
    return boxes.reshape(num, -1), scores


@pytest.mark.parametrize("shared", [False, True], ids=["per-class", "shared"])
def test_detections_are_those_of_the_slow_reference(shared):
    boxes, scores = random_boxes_and_scores(20, 3, shared)
    found, regions = infer(boxes, scores, score_thresh=0.4, topk=15)
    picked = [(r, k) for r in range(20) for k in range(3) if scores[r, k] > 0.4]
    candidates = Boxes(
        torch.stack([boxes[r] if shared else boxes[r, 4 * k : 4 * k + 4] for r, k in picked])
    )
    candidates.clip(SIZE)
    candidate_scores = torch.stack([scores[r, k] for r, k in picked])
    keep = slow_batched_nms(
        candidates.tensor, candidate_scores, torch.tensor([k for _, k in picked]), 0.5
    )[:15]
    torch.testing.assert_close(found.pred_boxes.tensor, candidates.tensor[keep])
    torch.testing.assert_close(found.scores, candidate_scores[keep])
    assert found.pred_classes.tolist() == [picked[i][1] for i in keep.tolist()]
    assert regions.tolist() == [picked[i][0] for i in keep.tolist()]
    assert found.image_size == SIZE


def test_soft_suppression_gives_lowered_scores():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8]])
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    found, regions = infer(boxes, scores, nms=NMSMethod("linear"))
    assert regions.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5 * (1 - 0.8)])
    assert infer(boxes, scores, nms=NMSMethod("linear"), score_thresh=0.2)[1].tolist() == [0]


def test_class_agnostic_suppression_leaves_a_region_one_class():
    boxes, scores = torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.3, 0.5, 0.2]])
    assert infer(boxes, scores)[0].pred_classes.tolist() == [1, 0]
    assert infer(boxes, scores, nms=NMSMethod(class_agnostic=True))[0].pred_classes.tolist() == [1]


def test_threshold_is_exclusive_and_background_is_no_detection():
    found, _ = infer(torch.zeros(1, 8), torch.tensor([[0.5, 0.6, 0.9]]), score_thresh=0.5)
    assert found.pred_classes.tolist() == [1]


def test_classes_do_not_suppress_each_other():
    found, _ = infer(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([[0.5, 0.6, 0.0]]))
    assert found.pred_classes.tolist() == [1, 0]


def test_negative_topk_keeps_all():
    boxes, scores = random_boxes_and_scores(20, 3)
    found, _ = infer(boxes, scores, score_thresh=0.0, nms_thresh=1.0, topk=-1)
    assert len(found) == 60


@pytest.mark.parametrize("num", [0, 3], ids=["no-regions", "none-above-threshold"])
def test_nothing_is_found(num):
    found, regions = infer(torch.zeros(num, 8), torch.zeros(num, 3))
    assert len(found) == len(regions) == 0
    assert found.pred_boxes.tensor.shape == (0, 4)


def test_region_that_is_not_finite_is_left_out():
    boxes, scores = (
        torch.tensor([[0.0, 0, 9, 9], [20, 20, 29, 29]]),
        torch.tensor([[0.5, 0.5], [0.9, 0.1]]),
    )
    boxes[1, 2] = float("nan")
    found, regions = infer(boxes, scores)
    assert regions.tolist() == [0]
    assert found.scores.tolist() == [0.5]


def test_images_are_independent():
    boxes, scores = random_boxes_and_scores(20, 3)
    together, _ = fast_rcnn_inference(
        [boxes, boxes[:5]], [scores, scores[:5]], [SIZE, SIZE], 0.3, 0.5, 10
    )
    alone, _ = infer(boxes[:5], scores[:5], 0.3, 0.5, 10)
    torch.testing.assert_close(together[1].pred_boxes.tensor, alone.pred_boxes.tensor)


WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 6.0])


def draw_classes(gt_classes, num_sampled, weights=WEIGHTS):
    return sample_federated_classes(
        torch.tensor(gt_classes, dtype=torch.int64), num_sampled, weights
    )


@pytest.mark.parametrize(
    ("gt_classes", "num_sampled", "expected"),
    [
        pytest.param([1, 1, 4], 4, 4, id="filled-up"),
        pytest.param([1, 4, len(WEIGHTS)], 4, 3, id="background-counts"),
        pytest.param([0, 1, 2, 3], 2, 4, id="more-appear"),
        pytest.param([], 3, 3, id="nothing-appears"),
        pytest.param([4], 50, 6, id="all"),
        pytest.param([1], 50, 5, id="all-but-those-of-weight-0"),
    ],
)
def test_number_of_classes(gt_classes, num_sampled, expected):
    drawn = draw_classes(gt_classes, num_sampled)
    assert drawn.shape == (len(WEIGHTS),)
    assert drawn.sum() == expected
    assert all(drawn[k] for k in gt_classes if k < len(WEIGHTS))


def test_classes_are_drawn_by_their_weights():
    torch.manual_seed(0)
    counts = torch.stack([draw_classes([], 1) for _ in range(4000)]).sum(dim=0)
    torch.testing.assert_close(counts / 4000, WEIGHTS / WEIGHTS.sum(), atol=0.03, rtol=0)


def test_several_are_drawn_as_one_after_the_other_without_replacement():
    torch.manual_seed(0)
    drawn = torch.stack([draw_classes([], 2) for _ in range(4000)]).float().mean(dim=0)
    torch.manual_seed(0)
    expected = torch.zeros(4000, len(WEIGHTS))
    for row in expected:
        row[torch.multinomial(WEIGHTS, 2)] = 1
    torch.testing.assert_close(drawn, expected.mean(dim=0), atol=0.04, rtol=0)
