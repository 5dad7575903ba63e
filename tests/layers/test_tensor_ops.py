import pytest
import torch

from detkit.layers.tensor_ops import (
    NewEmptyTensor,
    cat,
    interpolate,
    move_device_like,
    nonzero_tuple,
    shapes_to_tensor,
    split_nonzero,
)


def test_cat_of_one_is_itself_and_of_more_is_joined():
    a, b = torch.rand(2, 3), torch.rand(2, 1)
    assert cat([a]) is a
    assert torch.equal(cat((a, b), dim=1), torch.cat([a, b], dim=1))


def test_cat_of_a_tensor_is_an_error():
    with pytest.raises(TypeError, match="list or tuple of tensors: got Tensor"):
        cat(torch.rand(2, 2))  # type: ignore[arg-type]


def test_nonzero_tuple_indexes_the_nonzero_elements():
    x = torch.tensor([[0, 3], [5, 0]])
    rows, columns = nonzero_tuple(x)
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [1, 0])
    assert [index.tolist() for index in nonzero_tuple(torch.tensor(7))] == [[0]]
    assert [index.tolist() for index in nonzero_tuple(torch.tensor(0))] == [[]]


def test_interpolate_takes_empty_batches():
    assert interpolate(torch.zeros(0, 3, 4, 5), scale_factor=2).shape == (0, 3, 8, 10)
    x = torch.randn(1, 2, 4, 4)
    expected = torch.nn.functional.interpolate(x, size=(6, 7), mode="bilinear", align_corners=False)
    found = interpolate(x, size=(6, 7), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected)


def test_sizes_become_a_tensor_and_tensors_move():
    assert shapes_to_tensor([3, 4]).tolist() == [3, 4]
    assert shapes_to_tensor([torch.tensor(3), 4]).tolist() == [3, 4]
    assert move_device_like(torch.ones(2), torch.ones(1)).device.type == "cpu"


def test_split_nonzero_finds_what_nonzero_finds_in_each_mask():
    masks = [torch.rand(size) > 0.7 for size in (0, 1, 50, 7)] + [torch.zeros(5).bool()]
    found = split_nonzero(masks, [int(mask.sum()) for mask in masks])
    for indices, mask in zip(found, masks, strict=True):
        assert torch.equal(indices, mask.nonzero()[:, 0])
    assert split_nonzero([], []) == []


def test_empty_tensors_of_another_shape_are_differentiable():
    x = torch.zeros(0, 3, 8, 8, requires_grad=True)
    y = NewEmptyTensor.apply(x, (0, 5, 4, 4))
    assert y.shape == (0, 5, 4, 4)
    y.sum().backward()
    assert x.grad.shape == x.shape
