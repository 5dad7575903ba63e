"""Tests of detkit.modeling.meta_arch.dense_detector."""

import pytest
import torch
from torch import nn

from detkit.layers import ShapeSpec
from detkit.modeling import Backbone, Box2BoxTransform, DenseDetector
from detkit.modeling.meta_arch.dense_detector import decode_level, predictions_by_anchor
from detkit.structures import Boxes
from tests.helpers import random_boxes

TRANSFORM = Box2BoxTransform((1.0, 1.0, 1.0, 1.0))


class TwoStrides(Backbone):
    """Features whose order of names is not that of their strides."""

    def forward(self, x):
        return {"coarse": x, "fine": x}

    def output_shape(self):
        return {"coarse": ShapeSpec(channels=3, stride=8), "fine": ShapeSpec(channels=3, stride=4)}


def make(**kwargs):
    return DenseDetector(
        backbone=TwoStrides(), head=nn.Identity(), pixel_mean=[0.0], pixel_std=[1.0], **kwargs
    )


def decode(scores, deltas=None, thresh=0.5, topk=100):
    anchors = Boxes(random_boxes(len(scores)))
    deltas = torch.zeros(len(scores), 4) if deltas is None else deltas
    return anchors, decode_level(
        anchors,
        scores,
        deltas,
        TRANSFORM,
        score_thresh=thresh,
        topk_candidates=topk,
        image_size=(100, 100),
    )


def test_features_are_taken_finest_first_unless_named():
    assert make().head_in_features == ["fine", "coarse"]
    assert make(head_in_features=["coarse"]).head_in_features == ["coarse"]


def test_predictions_come_in_the_order_of_the_anchors():
    maps = torch.arange(2 * 6 * 4 * 5).reshape(2, 6, 4, 5).float()  # two anchors of three numbers
    rows = predictions_by_anchor(maps, 3)
    assert rows.shape == (2, 4 * 5 * 2, 3)
    for y, x, a, d in [(0, 0, 0, 0), (1, 2, 1, 0), (3, 4, 0, 2), (2, 0, 1, 1)]:
        assert rows[1, (y * 5 + x) * 2 + a, d] == maps[1, 3 * a + d, y, x]


def test_candidates_are_the_best_above_the_threshold():
    scores = torch.tensor([[0.5, 0.9], [0.1, 0.6], [0.8, 0.7]])  # 0.5 does not exceed the threshold
    anchors, found = decode(scores, topk=3)
    assert found.scores.tolist() == pytest.approx([0.9, 0.8, 0.7])
    assert found.pred_classes.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.pred_boxes.tensor, anchors.tensor[[0, 2, 2]])


def test_deltas_move_the_boxes():
    deltas = torch.tensor([[0.5, 0.0, 0.0, 0.0]])
    anchors, found = decode(torch.tensor([[0.9]]), deltas)
    moved = anchors.tensor[0].clone()
    moved[0::2] += 0.5 * (moved[2] - moved[0])
    torch.testing.assert_close(found.pred_boxes.tensor[0], moved)


def test_nothing_above_the_threshold_gives_nothing():
    _, found = decode(torch.zeros(3, 2))
    assert len(found) == 0
    assert found.pred_boxes.tensor.shape == (0, 4)


def test_boxes_that_are_not_finite_are_left_out():
    deltas = torch.zeros(2, 4)
    deltas[0, 0] = float("nan")
    _, found = decode(torch.tensor([[0.9], [0.8]]), deltas)
    assert found.scores.tolist() == pytest.approx([0.8])


def test_subclass_brings_training_and_inference():
    for name in ("forward_training", "forward_inference"):
        with pytest.raises(NotImplementedError, match=f"DenseDetector does not implement {name}"):
            getattr(make(), name)(*[None] * (4 if name == "forward_training" else 3))


def test_moving_averages_of_subclasses_written_for_detectron2():
    model = make()
    assert model._ema_update("loss_normalizer", 20, 100).item() == pytest.approx(92)
    assert model._ema_update("loss_normalizer", 20, 100).item() == pytest.approx(84.8)
    assert model.state_dict()["loss_normalizer"].item() == pytest.approx(84.8)
    assert model._ema_update("own_average", 4.0, 2.0, momentum=0.5) == 3
    assert model._ema_update("own_average", 5.0, 2.0, momentum=0.5) == 4


def test_overridden_moving_average_is_called():
    class Fixed(DenseDetector):
        def _ema_update(self, name, value, initial_value, momentum=0.9):
            return torch.tensor(7.0)

    model = Fixed(backbone=TwoStrides(), head=nn.Identity(), pixel_mean=[0.0], pixel_std=[1.0])
    assert model.update_normalizer(torch.tensor(3), 1, 100.0) == 7
