import pytest
import torch
import torch.nn.functional as F

from detkit.layers.cpu.weighted_rows import weighted_row_sums


@pytest.mark.parametrize("counts", [[], [3], [2, 0, 5, 1, 0], [9] * 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_and_gradient_equal_those_of_embedding_bag(counts, dtype):
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(11, 6, dtype=dtype, generator=generator).requires_grad_()
    counts = torch.tensor(counts, dtype=torch.int64)
    rows = torch.randint(0, 11, (int(counts.sum()),), generator=generator)
    weights = torch.rand(len(rows), dtype=dtype, generator=generator) - 0.5
    starts = counts.cumsum(0) - counts
    expected = F.embedding_bag(rows, table, starts, mode="sum", per_sample_weights=weights)
    found = weighted_row_sums(table, rows, starts, weights)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    # Not contiguous, as the gradient of a transposed output.
    grad = torch.rand(6, len(counts), dtype=dtype, generator=generator).T
    (found_grad,) = torch.autograd.grad(found, table, grad)
    (expected_grad,) = torch.autograd.grad(expected, table, grad)
    torch.testing.assert_close(found_grad, expected_grad)


def test_rows_that_no_sum_takes_get_no_gradient():
    table = torch.rand(4, 2, requires_grad=True)
    rows, weights = torch.tensor([1, 1, 3]), torch.tensor([1.0, 2.0, 4.0])
    weighted_row_sums(table, rows, torch.tensor([0, 2]), weights).sum().backward()
    assert table.grad is not None
    assert table.grad.tolist() == [[0, 0], [3, 3], [0, 0], [4, 4]]
