"""Tests of detkit.modeling.roi_heads.federated_loss."""

import pytest
import torch

from detkit.modeling.roi_heads.federated_loss import sample_federated_classes

K = 6
WEIGHTS = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0, 6.0])


def draw(gt_classes, num_sampled, weights=WEIGHTS):
    return sample_federated_classes(
        torch.tensor(gt_classes, dtype=torch.int64), num_sampled, weights
    )


@pytest.mark.parametrize(
    ("gt_classes", "num_sampled", "expected"),
    [
        pytest.param([1, 1, 4], 4, 4, id="filled-up"),
        pytest.param([1, 4, K], 4, 3, id="background-counts"),
        pytest.param([0, 1, 2, 3], 2, 4, id="more-appear"),
        pytest.param([], 3, 3, id="nothing-appears"),
        pytest.param([4], 50, 6, id="all"),
        pytest.param([1], 50, 5, id="all-but-those-of-weight-0"),
    ],
)
def test_number_of_classes(gt_classes, num_sampled, expected):
    drawn = draw(gt_classes, num_sampled)
    assert drawn.shape == (K,)
    assert drawn.sum() == expected
    assert all(drawn[k] for k in gt_classes if k < K)


def test_classes_are_drawn_by_their_weights():
    torch.manual_seed(0)
    counts = torch.stack([draw([], 1) for _ in range(4000)]).sum(dim=0)
    torch.testing.assert_close(counts / 4000, WEIGHTS / WEIGHTS.sum(), atol=0.03, rtol=0)


def test_several_are_drawn_as_one_after_the_other_without_replacement():
    torch.manual_seed(0)
    drawn = torch.stack([draw([], 2) for _ in range(4000)]).float().mean(dim=0)
    torch.manual_seed(0)
    expected = torch.zeros(4000, K)
    for row in expected:
        row[torch.multinomial(WEIGHTS, 2)] = 1
    torch.testing.assert_close(drawn, expected.mean(dim=0), atol=0.04, rtol=0)
