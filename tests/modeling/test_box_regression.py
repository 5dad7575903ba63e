"""Tests of detkit.modeling.box_regression."""

import math

import pytest
import torch

from detkit.modeling.box_regression import Box2BoxTransform


def random_boxes(num, seed):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(num, 2, generator=generator) * 100
    return torch.cat([corner, corner + 5 + torch.rand(num, 2, generator=generator) * 50], dim=1)


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (10, 10, 5, 5)], ids=["rpn", "box-head"])
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
    with pytest.raises(ValueError, match="BBOX_REG_WEIGHTS must be four positive numbers"):
        Box2BoxTransform(weights)


@pytest.mark.parametrize(
    ("deltas", "boxes"), [((2, 5), (2, 4)), ((2, 8), (3, 4))], ids=["columns", "rows"]
)
def test_shapes_that_do_not_fit_are_an_error(deltas, boxes):
    with pytest.raises(ValueError, match=r"need deltas \(N, 4 K\) and boxes \(N, 4\)"):
        Box2BoxTransform((1, 1, 1, 1)).apply_deltas(torch.zeros(deltas), torch.zeros(boxes))
