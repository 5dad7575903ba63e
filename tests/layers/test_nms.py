import sys

import pytest
import torch
from counts import Waits
from torch import Tensor

from detkit.layers import NMSMethod, batched_nms, batched_nms_rotated, nms_rotated, suppress
from tests.helpers import (
    DEVICES,
    iou_of_two_rotated_boxes,
    random_boxes,
    random_rotated_boxes,
    slow_batched_nms,
    slow_soft_nms,
)
from tests.structures.test_rotated_boxes import as_rotated

LINEAR, GAUSSIAN = NMSMethod("linear"), NMSMethod("gaussian", sigma=0.3)


def _scores(count: int) -> Tensor:
    """Return scores without ties, whose order would be anybody's choice."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(1)) / max(count, 1)


@pytest.mark.parametrize("count", [0, 1, 60])
@pytest.mark.parametrize("classes", [1, 5])
def test_equals_the_slow_reference(count, classes):
    boxes, scores = random_boxes(count), _scores(count)
    idxs = torch.arange(count) % classes
    kept = batched_nms(boxes, scores, idxs, 0.3)
    assert kept.dtype == torch.int64
    assert torch.equal(kept, slow_batched_nms(boxes, scores, idxs, 0.3))


@pytest.mark.parametrize("count", [300, 3000], ids=["few", "many"])
def test_many_classes_equal_each_class_alone(count):
    boxes, scores = random_boxes(count, size=300) - 100, _scores(count)
    idxs = torch.arange(count) % 40
    alone = [
        index[batched_nms(boxes[index], scores[index], torch.zeros_like(index), 0.5)]
        for index in (torch.nonzero(idxs == c).squeeze(1) for c in idxs.unique())
    ]
    kept = torch.cat(alone)
    expected = kept[scores[kept].argsort(descending=True)]
    assert torch.equal(batched_nms(boxes, scores, idxs, 0.5), expected)


def test_negative_coordinates_do_not_bring_classes_together():
    # Shifted by (largest coordinate + 1) for its class, the second box would lie on the first.
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [-11.0, -11.0, -1.0, -1.0]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [
        0,
        1,
    ]


def test_high_class_numbers_do_not_round_coordinates():
    # Class 1,202 of LVIS lies at 1.6 million pixels, where float32 has steps of an eighth: the first two would be equal.
    boxes = torch.tensor(
        [
            [100.0, 100.0, 110.0, 110.0],
            [100.04, 100.04, 110.04, 110.04],
            [1300.0, 1300.0, 1333.0, 1333.0],
        ]
    )
    scores, idxs = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1202, 1202, 0])
    assert batched_nms(boxes, scores, idxs, 0.99).tolist() == [0, 1, 2]


def test_order_of_the_boxes_does_not_matter():
    boxes, scores, idxs = random_boxes(50), _scores(50), torch.arange(50) % 3
    order = torch.randperm(50)
    kept = batched_nms(boxes[order], scores[order], idxs[order], 0.4)
    assert torch.equal(order[kept], batched_nms(boxes, scores, idxs, 0.4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_full(dtype):
    boxes = torch.tensor(
        [[1000.0, 1000.0, 1016.0, 1016.0], [1000.0, 1000.0, 1016.0, 1016.0]], dtype=dtype
    )
    kept = batched_nms(boxes, torch.tensor([0.5, 0.9], dtype=dtype), torch.tensor([70, 71]), 0.5)
    assert kept.tolist() == [1, 0]


def test_shapes_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match=r"got \(3, 4\), \(2,\) and \(3,\)"):
        batched_nms(random_boxes(3), torch.rand(2), torch.zeros(3), 0.5)


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


@pytest.mark.parametrize(
    ("size", "topk"),
    [
        pytest.param(2000.0, 20, id="the best hold enough"),
        pytest.param(30.0, 400, id="all are needed"),
        pytest.param(2000.0, 0, id="none"),
    ],
)
def test_best_of_many_are_the_first_of_all(size, topk):
    boxes, scores = random_boxes(6000, size=size), _scores(6000)
    scores[scores < 0.9] = 0.5  # equal scores at the place where the best are cut off
    classes = torch.arange(6000) % 3
    kept, _ = suppress(boxes, scores, classes, 0.5, NMSMethod(), topk=topk)
    assert torch.equal(kept, batched_nms(boxes, scores, classes, 0.5)[:topk])


@pytest.mark.parametrize("num_classes", [80, 5000])
def test_number_of_classes_does_not_multiply_the_work(num_classes):
    boxes, classes = random_boxes(20_000, size=1000.0), torch.arange(20_000) % num_classes
    with Waits() as operators:
        batched_nms(boxes, _scores(20_000), classes, 0.5)
    assert operators.kinds["nms"] <= 80
    assert operators.kinds["nonzero"] == 0  # no search of all boxes per class


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
        ValueError, match="method must be one of hard, linear, gaussian, got 'gausian'"
    ):
        NMSMethod("gausian")


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match=f"sigma must be positive, got {sigma}"):
        NMSMethod("gaussian", sigma)


def test_soft_score_at_the_minimum_is_dropped_and_at_the_threshold_is_lowered():
    # IoU of the first two is exactly 0.5, which a linear method counts; 0.5 of 0.5 is the minimum.
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])
    scores, classes = torch.tensor([1.0, 0.5]), torch.zeros(2).long()
    kept, kept_scores = suppress(boxes, scores, classes, 0.5, LINEAR, min_score=0.125)
    assert dict(zip(kept.tolist(), kept_scores.tolist(), strict=True)) == {0: 1.0, 1: 0.25}
    kept, _ = suppress(boxes, scores, classes, 0.5, LINEAR, min_score=0.25)
    assert kept.tolist() == [0]


def test_hard_suppression_keeps_a_box_at_the_threshold():
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])
    assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.zeros(2), 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 80])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("block", [7, 512])
def test_rotated_equals_the_slow_reference(count, classes, device, block, monkeypatch):
    # By its module: `detkit.layers.nms` is the function.
    monkeypatch.setattr(sys.modules[nms_rotated.__module__], "_NMS_BLOCK", block)
    boxes, scores = random_rotated_boxes(count), _scores(count)
    boxes[:, :2] -= 40
    idxs = torch.arange(count) % classes
    expected = slow_batched_nms(boxes, scores, idxs, 0.2, iou_of_two_rotated_boxes)
    on_device = [x.to(device) for x in (boxes, scores, idxs)]
    kept = batched_nms_rotated(*on_device, 0.2).cpu()
    assert kept.dtype == torch.int64
    assert torch.equal(kept, expected)
    if classes == 1:
        assert torch.equal(nms_rotated(*on_device[:2], 0.2).cpu(), expected)
        assert count < 2 or 1 < len(expected) < count
    for topk in (0, 3, 10):
        kept = batched_nms_rotated(*on_device, 0.2, topk).cpu()
        assert torch.equal(kept, expected[:topk])


def test_equal_scores_keep_their_order_however_many_boxes():
    boxes = torch.arange(1500.0)[:, None] * 10 + torch.tensor([0.0, 0, 5, 5])
    kept = batched_nms(boxes, torch.full((1500,), 0.5), torch.arange(1500) % 7, 0.5)
    assert torch.equal(kept, torch.arange(1500))


@pytest.mark.parametrize("count", [2, 3, 600], ids=["next", "few", "blocks"])
def test_copies_of_a_rotated_box_go(count):
    boxes = torch.tensor([[30.0, 30, 20, 10, 25]]).repeat(count, 1)
    assert nms_rotated(boxes, _scores(count), 0.5).tolist() == [int(_scores(count).argmax())]


def test_a_box_in_a_chain_is_suppressed_by_boxes_that_stay_alone():
    # Each overlaps the next one by 0.6, and the one after it by 0.33: every other one stays.
    boxes = torch.tensor([[2.5 * i, 0.0, 10, 4, 0] for i in range(30)])
    scores = torch.linspace(0.9, 0.1, 30)
    expected = list(range(0, 30, 2))
    assert nms_rotated(boxes, scores, 0.5).tolist() == expected
    assert batched_nms_rotated(boxes, scores, torch.zeros(30).long(), 0.5).tolist() == expected


def test_rotated_of_one_class_number_many_equals_alone():
    # Moved apart by class in float32, boxes of class 1,202 would be off by an eighth of a pixel.
    boxes = torch.tensor([[1300.0, 900, 2, 2, 10], [1300.05, 900, 2, 2, 10], [0, 0, 1, 1, 0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    for threshold in (0.94, 0.96):
        alone = nms_rotated(boxes, scores, threshold)
        same_class = batched_nms_rotated(boxes, scores, torch.full((3,), 1202), threshold)
        assert same_class.tolist() == alone.tolist()
    assert len(alone) == 3


@pytest.mark.parametrize("suppress_rotated", [nms_rotated, batched_nms_rotated])
def test_rotated_shapes_that_do_not_match_are_an_error(suppress_rotated):
    idxs = [torch.zeros(3).long()] if suppress_rotated is batched_nms_rotated else []
    with pytest.raises(ValueError, match=r"need boxes \(N, 5\)"):
        suppress_rotated(torch.zeros(3, 4), torch.zeros(3), *idxs, 0.5)


@pytest.mark.parametrize("nms", [NMSMethod(), LINEAR, GAUSSIAN], ids=["hard", "linear", "gaussian"])
def test_candidates_at_angle_0_are_suppressed_as_upright_ones(nms):
    boxes, scores, classes = candidates(60)
    expected, expected_scores = suppress(boxes, scores, classes, 0.3, nms, min_score=0.1)
    kept, kept_scores = suppress(as_rotated(boxes), scores, classes, 0.3, nms, min_score=0.1)
    assert torch.equal(kept, expected)
    torch.testing.assert_close(kept_scores, expected_scores, atol=1e-4, rtol=1e-4)


def test_rotated_boxes_of_equal_scores_are_kept_in_their_order_over_all_classes():
    boxes = torch.tensor([[10.0, 10, 4, 2, 30], [30, 10, 4, 2, 30], [50, 10, 4, 2, 30]])
    scores, classes = torch.tensor([0.5, 0.9, 0.5]), torch.tensor([1, 0, 0])
    assert batched_nms_rotated(boxes, scores, classes, 0.5).tolist() == [1, 0, 2]
    assert batched_nms_rotated(boxes, scores, classes, 0.5, topk=2).tolist() == [1, 0]
