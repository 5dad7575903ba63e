"""Tests of detkit.modeling.roi_heads.fast_rcnn_inference."""

import pytest
import torch

from detkit.layers import NMSMethod
from detkit.modeling.roi_heads.fast_rcnn_inference import fast_rcnn_inference
from detkit.structures import Boxes
from tests.helpers import random_boxes, slow_batched_nms

SIZE = (90, 80)


def infer(boxes, scores, score_thresh=0.05, nms_thresh=0.5, topk=100, **kwargs):
    instances, regions = fast_rcnn_inference(
        [boxes], [scores], [SIZE], score_thresh, nms_thresh, topk, **kwargs
    )
    return instances[0], regions[0]


def random_predictions(num, num_classes, shared=False):
    boxes = random_boxes(num if shared else num * num_classes)
    scores = torch.rand(num, num_classes + 1, generator=torch.Generator().manual_seed(3))
    return boxes.reshape(num, -1), scores


@pytest.mark.parametrize("shared", [False, True], ids=["per-class", "shared"])
def test_detections_are_those_of_the_slow_reference(shared):
    boxes, scores = random_predictions(20, 3, shared)
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
    boxes, scores = random_predictions(20, 3)
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
    boxes, scores = random_predictions(20, 3)
    together, _ = fast_rcnn_inference(
        [boxes, boxes[:5]], [scores, scores[:5]], [SIZE, SIZE], 0.3, 0.5, 10
    )
    alone, _ = infer(boxes[:5], scores[:5], 0.3, 0.5, 10)
    torch.testing.assert_close(together[1].pred_boxes.tensor, alone.pred_boxes.tensor)
