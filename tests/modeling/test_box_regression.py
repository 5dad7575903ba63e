"""Tests of detkit.modeling.box_regression."""

import math

import pytest
import torch

from detkit.modeling.box_regression import (
    BOX_LOSS_TYPES,
    Box2BoxTransform,
    Box2BoxTransformLinear,
    Box2BoxTransformRotated,
    box_regression_loss,
    check_box_loss_type,
    dense_box_regression_loss,
)
from detkit.structures import matched_pairwise_iou_rotated
from tests.helpers import random_rotated_boxes


def random_boxes(num, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 100
    return torch.cat([corner, corner + 5 + torch.rand(num, 2, generator=generator) * 50], dim=1)


@pytest.mark.parametrize(
    "weights",
    [(1, 1, 1, 1), (10, 10, 5, 5), (2, 3, 4, 5)],
    ids=["rpn", "box-head", "all-different"],
)
def test_apply_inverts_get(weights):
    transform = Box2BoxTransform(weights)
    source, target = random_boxes(20, 0), random_boxes(20, 1)
    torch.testing.assert_close(
        transform.apply_deltas(transform.get_deltas(source, target), source), target
    )


def test_get_inverts_apply():
    transform = Box2BoxTransform((10, 10, 5, 5))
    source, deltas = random_boxes(20, 0), torch.randn(20, 4)
    torch.testing.assert_close(
        transform.get_deltas(source, transform.apply_deltas(deltas, source)),
        deltas,
        rtol=1e-4,
        atol=1e-4,
    )


def test_deltas_do_not_change_with_shift_and_scale():
    transform = Box2BoxTransform((1, 2, 3, 4))
    source, target = random_boxes(20, 0), random_boxes(20, 1)
    moved = transform.get_deltas(source * 3 + 7, target * 3 + 7)
    torch.testing.assert_close(moved, transform.get_deltas(source, target), rtol=1e-4, atol=1e-4)


def test_deltas_by_hand():
    deltas = Box2BoxTransform((10, 10, 5, 5)).get_deltas(
        torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[1.0, 4, 21, 24]])
    )
    torch.testing.assert_close(deltas, torch.tensor([[6.0, 2.0, 5 * math.log(2), 0.0]]))


def test_distances_by_hand():
    cell = torch.tensor([[10.0, 10, 18, 26]])  # centre (14, 18), 8 wide and 16 high
    target = torch.tensor([[10.0, 2, 30, 34]])
    distances = Box2BoxTransformLinear().get_deltas(cell, target)
    assert distances.tolist() == [[0.5, 1.0, 2.0, 1.0]]
    assert Box2BoxTransformLinear().apply_deltas(distances, cell).tolist() == target.tolist()


def test_negative_distances_count_as_zero():
    cell = torch.tensor([[10.0, 10, 18, 26]])
    box = Box2BoxTransformLinear().apply_deltas(torch.tensor([[-1.0, 1, 1, -9]]), cell)
    assert box.tolist() == [[14.0, 2.0, 22.0, 18.0]]


def test_every_delta_has_a_weight_of_its_own():
    source, target = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 10, 25, 90]])
    plain = Box2BoxTransform((1, 1, 1, 1)).get_deltas(source, target)
    weighted = Box2BoxTransform((2, 3, 4, 5)).get_deltas(source, target)
    torch.testing.assert_close(weighted, plain * torch.tensor([2.0, 3.0, 4.0, 5.0]))
    # Moved by 10 of 10 and 40 of 20 pixels, grown twofold and fourfold.
    torch.testing.assert_close(plain, torch.tensor([[1.0, 2.0, math.log(2), math.log(4)]]))


def test_classes_are_decoded_as_one_by_one():
    transform = Box2BoxTransform((10, 10, 5, 5))
    source, deltas = random_boxes(6, 0), torch.randn(6, 12)
    together = transform.apply_deltas(deltas, source)
    for k in range(3):
        columns = slice(4 * k, 4 * k + 4)
        torch.testing.assert_close(
            together[:, columns], transform.apply_deltas(deltas[:, columns], source)
        )


def test_growth_is_clamped_and_shrinking_is_not():
    transform = Box2BoxTransform((1, 1, 1, 1))
    box = torch.tensor([[0.0, 0, 16, 16]])
    grown = transform.apply_deltas(torch.tensor([[0.0, 0, 100, 100]]), box)
    torch.testing.assert_close(grown, torch.tensor([[-492.0, -492, 508, 508]]))
    shrunk = transform.apply_deltas(torch.tensor([[0.0, 0, -100, -100]]), box)
    torch.testing.assert_close(shrunk, torch.full((1, 4), 8.0))


@pytest.mark.parametrize("columns", [4, 12], ids=["shared", "per-class"])
def test_no_boxes_give_no_boxes(columns):
    assert Box2BoxTransform((1, 1, 1, 1)).apply_deltas(
        torch.zeros(0, columns), torch.zeros(0, 4)
    ).shape == (0, columns)
    assert Box2BoxTransform((1, 1, 1, 1)).get_deltas(
        torch.zeros(0, 4), torch.zeros(0, 4)
    ).shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_deltas_are_decoded_in_float32(dtype):
    transform = Box2BoxTransform((1, 1, 1, 1))
    box = torch.tensor([[1000.25, 1000.25, 1010.25, 1010.25]])
    decoded = transform.apply_deltas(torch.zeros(1, 4, dtype=dtype), box)
    assert decoded.dtype == torch.float32
    torch.testing.assert_close(decoded, box)


@pytest.mark.parametrize("weights", [(1, 1, 1), (1, 1, 1, 0)], ids=["three", "zero"])
def test_bad_weights_are_an_error(weights):
    with pytest.raises(ValueError, match="weights must be four positive numbers"):
        Box2BoxTransform(weights)


@pytest.mark.parametrize(
    ("deltas", "boxes"), [((2, 5), (2, 4)), ((2, 8), (3, 4))], ids=["columns", "rows"]
)
def test_shapes_that_do_not_fit_are_an_error(deltas, boxes):
    with pytest.raises(ValueError, match=r"need deltas \(N, 4 K\) and boxes \(N, 4\)"):
        Box2BoxTransform((1, 1, 1, 1)).apply_deltas(torch.zeros(deltas), torch.zeros(boxes))


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
        ValueError, match="box_reg_loss_type must be one of smooth_l1, giou.*Did you mean 'giou'"
    ):
        check_box_loss_type("gIoU")


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("along_sides", [False, True])
def test_rotated_apply_inverts_get(num_classes, along_sides):
    transform = Box2BoxTransformRotated((5, 5, 10, 10, 2), along_sides=along_sides)
    source, target = random_rotated_boxes(20), random_rotated_boxes(20, seed=1)
    deltas = transform.get_deltas(source, target)
    assert (deltas[:, 4].abs() <= 2 * math.pi + 1e-5).all()
    found = transform.apply_deltas(deltas.repeat(1, num_classes), source)
    expected = target.repeat(1, num_classes)
    # Angles are the same up to whole turns.
    turns = (found - expected)[:, 4::5] / 360
    torch.testing.assert_close(turns, turns.round(), atol=1e-5, rtol=0)
    assert ((found[:, 4::5] >= -180) & (found[:, 4::5] < 180)).all()
    found[:, 4::5] = expected[:, 4::5]
    torch.testing.assert_close(found, expected)


def test_rotated_deltas_of_upright_boxes_are_those_of_boxes():
    source, target = random_boxes(20, 0), random_boxes(20, 1)
    as_rotated = [
        torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2], torch.zeros(20, 1)], dim=1)
        for b in (source, target)
    ]
    deltas = Box2BoxTransformRotated((10, 10, 5, 5, 1)).get_deltas(*as_rotated)
    expected = Box2BoxTransform((10, 10, 5, 5)).get_deltas(source, target)
    torch.testing.assert_close(deltas[:, :4], expected)
    assert not deltas[:, 4].any()


def test_rotated_wild_sizes_are_limited():
    transform = Box2BoxTransformRotated((1, 1, 1, 1, 1))
    found = transform.apply_deltas(
        torch.tensor([[0.0, 0, 1e4, 1e4, 0]]), torch.tensor([[5.0, 5, 16, 16, 30]])
    )
    torch.testing.assert_close(found, torch.tensor([[5.0, 5, 1000, 1000, 30]]))


def test_rotated_weights_and_shapes_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match=r"weights must be five positive numbers for \(dx, dy, dw"):
        Box2BoxTransformRotated((1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"deltas \(N, 5 K\) and boxes \(N, 5\): got \(2, 4\)"):
        Box2BoxTransformRotated((1,) * 5).apply_deltas(torch.zeros(2, 4), torch.zeros(2, 5))


def test_losses_of_upright_boxes_are_refused_for_rotated_ones():
    transform = Box2BoxTransformRotated((1,) * 5)
    assert check_box_loss_type("smooth_l1", transform) == "smooth_l1"
    with pytest.raises(ValueError, match="rotated boxes must be smooth_l1: giou compares upright"):
        check_box_loss_type("giou", transform)


@pytest.mark.parametrize("normalize", [True, False])
def test_distances_to_the_sides_lead_back(normalize):
    transform = Box2BoxTransformLinear(normalize_by_size=normalize)
    source = torch.tensor([[10.0, 10, 30, 50]])
    target = torch.tensor([[0.0, 5, 60, 70]])
    deltas = transform.get_deltas(source, target)
    torch.testing.assert_close(transform.apply_deltas(deltas, source), target)
    if not normalize:
        assert deltas.tolist() == [[20, 25, 40, 40]]


def test_dense_loss_is_that_of_the_foreground():
    transform = Box2BoxTransform(weights=(1.0, 1, 1, 1))
    anchors = [torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 20]]), torch.tensor([[0.0, 0, 40, 40]])]
    deltas = [torch.randn(1, 2, 4), torch.randn(1, 1, 4)]
    truth = [torch.tensor([[1.0, 1, 9, 9], [0, 0, 1, 1], [2, 2, 30, 35]])]
    mask = torch.tensor([[True, False, True]])
    found = dense_box_regression_loss(anchors, transform, deltas, truth, mask)
    target = transform.get_deltas(torch.cat(anchors)[mask[0]], truth[0][mask[0]])
    expected = (torch.cat(deltas, dim=1)[mask] - target).abs().sum()
    torch.testing.assert_close(found, expected)


def test_half_a_turn_is_no_turn_with_a_period_of_180_degrees():
    transform = Box2BoxTransformRotated((1, 1, 1, 1, 1), angle_period=180)
    source, target = random_rotated_boxes(20), random_rotated_boxes(20, seed=1)
    deltas = transform.get_deltas(source, target)
    assert (deltas[:, 4].abs() <= math.pi / 2 + 1e-5).all()
    found = transform.apply_deltas(deltas, source)
    torch.testing.assert_close(
        matched_pairwise_iou_rotated(found, target), torch.ones(20), atol=1e-4, rtol=0
    )
    with pytest.raises(ValueError, match="angle_period must be 180 or 360 degrees, got 90"):
        Box2BoxTransformRotated((1, 1, 1, 1, 1), angle_period=90)


def test_center_moves_along_the_sides():
    transform = Box2BoxTransformRotated((1, 1, 1, 1, 1), along_sides=True)
    # Turned by 90 degrees counter-clockwise, the width runs upwards and the height to the right.
    source = torch.tensor([[50.0, 50, 20, 10, 90]])
    target = torch.tensor([[55.0, 46, 20, 10, 90]])
    torch.testing.assert_close(
        transform.get_deltas(source, target), torch.tensor([[0.2, 0.5, 0, 0, 0]])
    )
