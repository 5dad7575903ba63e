import pytest
import torch
from torch import Tensor

from detkit.layers import batched_nms
from tests.helpers import random_boxes, slow_batched_nms


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
