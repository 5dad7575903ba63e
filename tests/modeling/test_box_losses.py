"""Tests of detkit.modeling.box_losses."""

import pytest
import torch

from detkit.modeling.box_losses import BOX_LOSS_TYPES, box_regression_loss, check_box_loss_type
from detkit.modeling.box_regression import Box2BoxTransform

TRANSFORM = Box2BoxTransform((10, 10, 5, 5))
SOURCE = torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 40]])
TRUTH = torch.tensor([[2.0, 0, 12, 14], [25, 22, 55, 44]])


def loss(deltas, source=SOURCE, truth=TRUTH, loss_type="smooth_l1", beta=0.0):
    return box_regression_loss(
        deltas, source, truth, transform=TRANSFORM, loss_type=loss_type, smooth_l1_beta=beta
    )


@pytest.mark.parametrize("loss_type", BOX_LOSS_TYPES)
def test_perfect_deltas_cost_nothing(loss_type):
    perfect = TRANSFORM.get_deltas(SOURCE, TRUTH)
    torch.testing.assert_close(
        loss(perfect, loss_type=loss_type), torch.tensor(0.0), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("loss_type", BOX_LOSS_TYPES)
def test_loss_is_a_sum_over_boxes(loss_type):
    deltas = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    parts = [
        loss(deltas[i : i + 1], SOURCE[i : i + 1], TRUTH[i : i + 1], loss_type) for i in range(2)
    ]
    torch.testing.assert_close(loss(deltas, loss_type=loss_type), sum(parts))


@pytest.mark.parametrize("loss_type", BOX_LOSS_TYPES)
def test_no_boxes_give_a_zero_with_a_gradient(loss_type):
    weight = torch.ones(4, requires_grad=True)
    nothing = loss(torch.zeros(0, 4) * weight, torch.zeros(0, 4), torch.zeros(0, 4), loss_type)
    nothing.backward()
    assert nothing.item() == 0
    torch.testing.assert_close(weight.grad, torch.zeros(4))


def test_l1_by_hand():
    target = TRANSFORM.get_deltas(SOURCE, TRUTH)
    torch.testing.assert_close(loss(target + 0.5), torch.tensor(4.0))


def test_smooth_l1_is_square_below_beta():
    target = TRANSFORM.get_deltas(SOURCE, TRUTH)
    torch.testing.assert_close(loss(target + 0.5, beta=1.0), torch.tensor(8 * 0.125))


def test_giou_by_hand():
    source = torch.tensor([[0.0, 0, 10, 10]])
    truth = torch.tensor([[10.0, 0, 20, 10]])
    # No overlap, and the hull is exactly covered: GIoU 0.
    torch.testing.assert_close(loss(torch.zeros(1, 4), source, truth, "giou"), torch.tensor(1.0))


def test_half_precision_deltas_give_a_float32_loss():
    assert loss(torch.zeros(2, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_unknown_type_names_the_legal_ones():
    with pytest.raises(
        ValueError, match="BBOX_REG_LOSS_TYPE must be one of smooth_l1, giou.*Did you mean 'giou'"
    ):
        check_box_loss_type("gIoU")
