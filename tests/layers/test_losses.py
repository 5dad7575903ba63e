import pytest
import torch

from detkit.layers import (
    ciou_loss,
    cross_entropy,
    diou_loss,
    giou_loss,
    sigmoid_focal_loss,
    smooth_l1_loss,
)
from detkit.layers.losses import empty_input_loss_func_wrapper
from tests.helpers import iou_of_two_boxes, random_boxes, slow_focal_loss

BOX_LOSSES = [giou_loss, diou_loss, ciou_loss]


@pytest.mark.parametrize(
    ("beta", "expected"),
    [
        pytest.param(0.0, [0, 0.5, 1, 3], id="L1"),
        pytest.param(1.0, [0, 0.125, 0.5, 2.5], id="beta 1"),
        pytest.param(2.0, [0, 0.0625, 0.25, 2], id="beta 2"),
    ],
)
def test_smooth_l1_by_hand(beta, expected):
    x = torch.tensor([0.0, -0.5, 1.0, -3.0])
    assert smooth_l1_loss(x, torch.zeros(4), beta).tolist() == pytest.approx(expected)
    assert smooth_l1_loss(x, torch.zeros(4), beta, "sum").item() == pytest.approx(sum(expected))
    assert smooth_l1_loss(x, torch.zeros(4), beta, "mean").item() == pytest.approx(
        sum(expected) / 4
    )


@pytest.mark.parametrize("beta", [0.0, 1e-6, 0.5])
def test_smooth_l1_has_a_finite_gradient_where_nothing_differs(beta):
    x = torch.zeros(3, requires_grad=True)
    smooth_l1_loss(x, torch.zeros(3), beta, "sum").backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0, 0]


def test_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match="reduction must be 'none', 'mean' or 'sum': got 'avg'"):
        smooth_l1_loss(torch.zeros(1), torch.zeros(1), 0.0, "avg")


@pytest.mark.parametrize("loss", BOX_LOSSES)
def test_equal_boxes_have_no_loss(loss):
    boxes = random_boxes(5)
    torch.testing.assert_close(loss(boxes, boxes), torch.zeros(5), atol=1e-4, rtol=0)


def test_giou_and_diou_by_hand():
    a, b = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 4.0, 2.0]])
    iou = iou_of_two_boxes(a[0].tolist(), b[0].tolist())
    # Hull 4 x 2 is exactly the union; centers (1, 1) and (2.5, 1); squared diagonal 20.
    assert giou_loss(a, b).item() == pytest.approx(1 - iou)
    assert diou_loss(a, b).item() == pytest.approx(1 - iou + 1.5**2 / 20)
    assert ciou_loss(a, b).item() > diou_loss(a, b).item()


def test_giou_of_boxes_apart_falls_with_the_distance():
    a, b = (
        torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2),
        torch.tensor([[2.0, 0.0, 3.0, 1.0], [9.0, 0.0, 10.0, 1.0]]),
    )
    assert giou_loss(a, b).tolist() == pytest.approx([1 + 1 / 3, 1 + 8 / 10])


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(lambda x: smooth_l1_loss(x, x.detach(), 0.0, "mean"), id="L1"),
        pytest.param(lambda x: smooth_l1_loss(x, x.detach(), 1.0, "mean"), id="smooth L1"),
        pytest.param(lambda x: giou_loss(x, x.detach(), "mean"), id="GIoU"),
        pytest.param(lambda x: diou_loss(x, x.detach(), "mean"), id="DIoU"),
        pytest.param(lambda x: ciou_loss(x, x.detach(), "mean"), id="CIoU"),
        pytest.param(
            lambda x: cross_entropy(x, torch.zeros(0, dtype=torch.int64)), id="cross entropy"
        ),
    ],
)
def test_mean_over_nothing_is_zero_and_stays_in_the_graph(loss):
    x = torch.zeros(0, 4, requires_grad=True)
    value = loss(x)
    assert value.item() == 0
    value.backward()
    assert x.grad is not None


def test_cross_entropy_is_that_of_torch():
    logits, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    for reduction in ("mean", "sum", "none"):
        want = torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        assert torch.equal(cross_entropy(logits, target, reduction=reduction), want)
    none = torch.zeros(0, dtype=torch.int64)
    assert cross_entropy(logits[:0], none, reduction="sum").item() == 0


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1.0, 2.0), (0.5, 0.0), (0.0, 1.5)])
def test_focal_loss_is_its_formula(alpha, gamma):
    logits = torch.tensor([[-6.0, -0.5, 0.0, 3.0]] * 2)
    targets = torch.tensor([[1.0] * 4, [0.0] * 4])
    expected = [
        [slow_focal_loss(x, t == 1, alpha, gamma) for x, t in zip(*rows, strict=True)]
        for rows in zip(logits.tolist(), targets.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, alpha, gamma), torch.tensor(expected)
    )
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets.bool(), alpha, gamma), torch.tensor(expected)
    )


def test_focal_loss_without_focus_is_cross_entropy():
    logits, targets = torch.randn(5, 3), torch.randint(0, 2, (5, 3)).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction="mean"
    )
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, gamma=0.0, reduction="mean"), expected
    )


def test_focal_loss_and_its_gradient_are_finite_for_extreme_logits():
    logits = torch.tensor([-200.0, 200.0, -200.0, 200.0], requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.tensor([1.0, 1.0, 0.0, 0.0]), alpha=0.25)
    assert loss.tolist() == pytest.approx([50.0, 0.0, 0.0, 150.0])
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_wrapped_loss_of_nothing_is_zero_and_part_of_the_graph():
    loss = empty_input_loss_func_wrapper(torch.nn.functional.cross_entropy)
    scores = torch.randn(3, 4, requires_grad=True)
    target = torch.tensor([0, 1, 2])
    expected = torch.nn.functional.cross_entropy(scores, target)
    torch.testing.assert_close(loss(scores, target, reduction="mean"), expected)
    nothing = loss(scores[:0], target[:0], reduction="mean")
    nothing.backward()
    assert nothing.item() == 0
