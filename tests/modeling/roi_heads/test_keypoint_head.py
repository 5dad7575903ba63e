"""Tests of detkit.modeling.roi_heads.keypoint_head."""

import math

import pytest
import torch

from detkit.config import get_cfg
from detkit.layers import ShapeSpec
from detkit.modeling.roi_heads import BaseKeypointRCNNHead, build_keypoint_head
from detkit.modeling.roi_heads.keypoint_head import keypoint_rcnn_inference, keypoint_rcnn_loss
from detkit.structures import Boxes, Instances, Keypoints, heatmaps_to_keypoints
from tests.configs import cfg_with
from tests.helpers import slow_keypoint_cell

SIZE = (40, 50)
K, C = 3, 4


def regions(count, visibility=2, seed=0):
    """Proposals with keypoints, of which about half lie within."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(count, K, 2, generator=generator) * 20
    points = torch.cat([points, torch.full((count, K, 1), float(visibility))], dim=2)
    boxes = torch.tensor([[0.0, 0, 14, 14]]).repeat(count, 1)
    return Instances(SIZE, proposal_boxes=Boxes(boxes), gt_keypoints=Keypoints(points))


def background():
    """What is left of an image without objects: it has no gt_keypoints."""
    return Instances(SIZE, proposal_boxes=Boxes([]))


def detections(count):
    return Instances(SIZE, pred_boxes=Boxes(torch.tensor([[3.0, 4, 20, 30]]).repeat(count, 1)))


def logits(count, seed=0, size=8):
    return torch.randn(count, K, size, size, generator=torch.Generator().manual_seed(seed))


def make(*overrides):
    options = {
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": K,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": [5, 6],
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    }
    cfg = cfg_with(options, overrides)
    torch.manual_seed(0)
    return build_keypoint_head(cfg, ShapeSpec(channels=C, height=2, width=2))


def slow_terms(prediction, instances):
    """Cross entropy of each keypoint that counts, one by one."""
    terms, row = [], 0
    for x in instances:
        for points, box in zip(
            x.gt_keypoints.tensor.tolist() if len(x) else [],
            x.proposal_boxes.tensor.tolist(),
            strict=True,
        ):
            for k, point in enumerate(points):
                cell, counts = slow_keypoint_cell(point, box, prediction.shape[2])
                if counts:
                    values = prediction[row, k].double().flatten()
                    terms.append((values.exp().sum().log() - values[cell]).item())
            row += 1
    return terms


@pytest.mark.parametrize("normalizer", [None, 7.0], ids=["by those that count", "by a constant"])
def test_loss_equals_the_slow_reference(normalizer):
    instances, prediction = [regions(2, seed=1), background(), regions(3, seed=2)], logits(5)
    terms = slow_terms(prediction, instances)
    assert 0 < len(terms) < 15
    loss = keypoint_rcnn_loss(prediction, instances, normalizer)
    assert loss.item() == pytest.approx(sum(terms) / (normalizer or len(terms)), rel=1e-5)


def test_keypoints_that_do_not_count_do_not_learn():
    instances, prediction = regions(4), logits(4).requires_grad_()
    _, is_valid = instances.gt_keypoints.to_heatmap(instances.proposal_boxes.tensor, 8)
    keypoint_rcnn_loss(prediction, [instances], None).backward()
    assert torch.equal(prediction.grad.abs().sum(dim=(2, 3)) > 0, is_valid.bool())


@pytest.mark.parametrize("normalizer", [None, 7.0])
@pytest.mark.parametrize(
    "instances",
    [[background(), background()], [regions(2, visibility=0)]],
    ids=["no object", "nothing labelled"],
)
def test_loss_without_keypoints_is_zero_within_the_graph(instances, normalizer):
    prediction = logits(sum(map(len, instances))).requires_grad_()
    loss = keypoint_rcnn_loss(prediction, instances, normalizer)
    assert loss.item() == 0
    loss.backward()
    assert not prediction.grad.any()


def test_missing_keypoints_are_an_error():
    instances = regions(2)
    instances.remove("gt_keypoints")
    with pytest.raises(
        ValueError,
        match="trained on gt_keypoints, but instances have only .*MODEL.KEYPOINT_ON needs",
    ):
        keypoint_rcnn_loss(logits(2), [instances], None)


def test_another_number_of_keypoints_is_an_error():
    with pytest.raises(
        ValueError, match="NUM_KEYPOINTS is 4, but the data has 3 keypoints per object"
    ):
        keypoint_rcnn_loss(torch.zeros(2, 4, 8, 8), [regions(2)], None)


def test_detections_get_keypoints_with_scores():
    prediction, instances = logits(3), [detections(2), detections(0), detections(1)]
    keypoint_rcnn_inference(prediction, instances)
    assert [tuple(x.pred_keypoints.shape) for x in instances] == [(2, K, 3), (0, K, 3), (1, K, 3)]
    expected = heatmaps_to_keypoints(prediction, torch.tensor([[3.0, 4, 20, 30]] * 3))
    assert torch.equal(torch.cat([x.pred_keypoints for x in instances]), expected[:, :, [0, 1, 3]])
    assert torch.equal(torch.cat([x.pred_keypoint_heatmaps for x in instances]), prediction)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_head_trains_and_predicts(count):
    head, x = make(), torch.randn(count, C, 2, 2)
    losses = head(x, [regions(count), background()])
    assert set(losses) == {"loss_keypoint"}
    losses["loss_keypoint"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    instances = head.eval()(x, [detections(count), detections(0)])
    assert [tuple(y.pred_keypoints.shape) for y in instances] == [(count, K, 3), (0, K, 3)]
    assert instances[0].pred_keypoint_heatmaps.shape == (count, K, 8, 8)


def test_loss_is_finite_under_autocast():
    head = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(torch.randn(3, C, 2, 2), [regions(3)])["loss_keypoint"]
    assert loss.dtype == torch.float32
    assert math.log(64) / 2 < loss.item() < math.log(64) * 4


def test_constant_normalizer_counts_all_foreground_that_a_batch_may_have():
    instances, x = [regions(2), regions(3)], torch.randn(5, C, 2, 2)
    key = "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS"
    visible, constant, doubled = (
        make(),
        make(key, False),
        make("MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT", 2.0),
    )
    num_valid = sum(
        y.gt_keypoints.to_heatmap(y.proposal_boxes.tensor, 8)[1].sum().item() for y in instances
    )
    loss = visible(x, instances)["loss_keypoint"]
    # 16 proposals per image, a quarter of them foreground, 3 keypoints, 2 images.
    torch.testing.assert_close(
        constant(x, instances)["loss_keypoint"] * (16 * 0.25 * K * 2), loss * num_valid
    )
    torch.testing.assert_close(doubled(x, instances)["loss_keypoint"], loss * 2)


def test_names_and_shapes_of_weights_are_those_of_detectron2():
    shapes = {name: tuple(t.shape) for name, t in make().state_dict().items()}
    assert shapes == {
        "conv_fcn1.weight": (5, C, 3, 3),
        "conv_fcn1.bias": (5,),
        "conv_fcn2.weight": (6, 5, 3, 3),
        "conv_fcn2.bias": (6,),
        "score_lowres.weight": (6, K, 4, 4),
        "score_lowres.bias": (K,),
    }


def test_head_of_ones_own_needs_layers_only():
    class Head(BaseKeypointRCNNHead):
        def layers(self, x):
            return x

    assert Head(num_keypoints=K)(logits(2), [regions(2)])["loss_keypoint"] > 0
    with pytest.raises(NotImplementedError, match="BaseKeypointRCNNHead does not implement layers"):
        BaseKeypointRCNNHead(num_keypoints=K)(logits(2), [regions(2)])


def test_bad_arguments_are_an_error():
    with pytest.raises(
        ValueError, match="loss_normalizer must be a number or 'visible', got 'visable'"
    ):
        BaseKeypointRCNNHead(num_keypoints=K, loss_normalizer="visable")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs the channels of its input"):
        build_keypoint_head(get_cfg(), ShapeSpec())


class _NoLayer(BaseKeypointRCNNHead):
    def layers(self, x):
        return x


def test_subclass_of_the_base_takes_its_settings_from_the_config():
    cfg = cfg_with({"MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": 3.0})
    head = _NoLayer(cfg, ShapeSpec(channels=4))
    assert (head.num_keypoints, head.loss_weight, head.loss_normalizer) == (17, 3.0, "visible")
