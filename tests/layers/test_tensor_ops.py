import pytest
import torch

from detkit.layers import cat, nonzero_tuple


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
