"""Tests of detkit.layers.suppression."""

import pytest
import torch

from detkit.layers import NMSMethod, batched_nms, suppress
from tests.helpers import random_boxes, slow_soft_nms

LINEAR, GAUSSIAN = NMSMethod("linear"), NMSMethod("gaussian", sigma=0.3)


def candidates(count, num_classes=4):
    generator = torch.Generator().manual_seed(1)
    scores = 0.1 + 0.9 * torch.rand(count, generator=generator)
    return random_boxes(count), scores, torch.arange(count) % num_classes


@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize("class_agnostic", [False, True], ids=["per-class", "over-classes"])
@pytest.mark.parametrize("nms", [LINEAR, GAUSSIAN], ids=["linear", "gaussian"])
@pytest.mark.parametrize("topk", [-1, 5], ids=["all", "few"])
def test_soft_is_the_slow_reference(count, class_agnostic, nms, topk):
    boxes, scores, classes = candidates(count)
    method = NMSMethod(nms.method, nms.sigma, class_agnostic)
    kept, kept_scores = suppress(boxes, scores, classes, 0.3, method, min_score=0.1, topk=topk)
    groups = torch.zeros_like(classes) if class_agnostic else classes
    expected = slow_soft_nms(boxes, scores, groups, 0.3, nms.method, nms.sigma, min_score=0.1)
    expected = expected[:topk] if topk >= 0 else expected
    assert kept.tolist() == [index for index, _ in expected]
    assert kept_scores.tolist() == pytest.approx([score for _, score in expected], rel=1e-4)


@pytest.mark.parametrize("topk", [-1, 5])
def test_hard_is_batched_nms(topk):
    boxes, scores, classes = candidates(60)
    kept, kept_scores = suppress(boxes, scores, classes, 0.3, NMSMethod(), topk=topk)
    expected = batched_nms(boxes, scores, classes, 0.3)
    assert torch.equal(kept, expected if topk < 0 else expected[:topk])
    assert torch.equal(kept_scores, scores[kept])


def test_hard_over_classes_takes_them_for_one():
    boxes, scores, classes = candidates(60)
    kept, _ = suppress(boxes, scores, classes, 0.3, NMSMethod(class_agnostic=True))
    assert torch.equal(kept, batched_nms(boxes, scores, torch.zeros_like(classes), 0.3))


@pytest.mark.parametrize("nms", [NMSMethod(), LINEAR, GAUSSIAN], ids=["hard", "linear", "gaussian"])
def test_order_of_the_candidates_does_not_matter(nms):
    boxes, scores, classes = candidates(40)
    order = torch.randperm(40)
    kept, kept_scores = suppress(boxes, scores, classes, 0.3, nms)
    permuted, permuted_scores = suppress(boxes[order], scores[order], classes[order], 0.3, nms)
    assert torch.equal(order[permuted], kept)
    torch.testing.assert_close(permuted_scores, kept_scores)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_copies_of_a_box_lose_what_the_method_takes(method):
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3 + [[50.0, 50, 60, 60]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    kept, kept_scores = suppress(boxes, scores, torch.zeros(4).long(), 0.5, NMSMethod(method))
    factor = 0.0 if method == "linear" else torch.tensor(-1 / 0.5).exp().item()
    expected = (
        {0: 0.9, 3: 0.6} if factor == 0 else {0: 0.9, 3: 0.6, 1: 0.8 * factor, 2: 0.7 * factor**2}
    )
    assert dict(zip(kept.tolist(), kept_scores.tolist(), strict=True)) == pytest.approx(expected)


def test_empty_boxes_suppress_nothing():
    boxes, scores = torch.zeros(2, 4), torch.tensor([0.9, 0.8])
    kept, kept_scores = suppress(boxes, scores, torch.zeros(2).long(), 0.5, LINEAR)
    assert kept.tolist() == [0, 1]
    assert torch.equal(kept_scores, scores)


def test_unknown_method_names_the_near_one():
    with pytest.raises(
        ValueError, match="TEST.NMS.METHOD must be one of hard, linear, gaussian, got 'gausian'"
    ):
        NMSMethod("gausian")


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match=f"TEST.NMS.SIGMA must be positive, got {sigma}"):
        NMSMethod("gaussian", sigma)
