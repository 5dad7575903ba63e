import math

import pytest
import torch

from detkit.engine.nonfinite import judge
from detkit.utils import comm

NAN, INF = math.nan, math.inf


def scalars(*values):
    return {f"loss_{i}": torch.tensor(value) for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("losses", "gradient", "is_loss_broken", "is_gradient_broken"),
    [
        pytest.param([1.0, 2.0], [1.0, -1.0], False, False, id="finite"),
        pytest.param([1.0, NAN], [1.0], True, False, id="loss-nan"),
        pytest.param([-INF], [1.0], True, False, id="loss-inf"),
        pytest.param([1.0], [0.0, NAN], False, True, id="gradient-nan"),
        pytest.param([1.0], [-INF, INF], False, True, id="gradient-inf"),
        pytest.param([INF], [INF], True, True, id="both"),
        pytest.param([1.0], [1e30, 1e30], False, False, id="only-the-norm-overflows"),
        pytest.param([1.0], [], False, False, id="empty-gradient"),
    ],
)
def test_numbers_that_are_not_finite_are_found(
    losses, gradient, is_loss_broken, is_gradient_broken
):
    verdict = judge([scalars(0.5), scalars(*losses)], [torch.zeros(2, 2), torch.tensor(gradient)])
    assert verdict.is_loss_broken == is_loss_broken
    assert verdict.is_gradient_broken == is_gradient_broken


def test_losses_are_given_by_pass_and_name():
    first, second = scalars(1.0, 2.0), {"loss_b": torch.tensor(3.0, dtype=torch.bfloat16)}
    assert judge([first, second], [torch.ones(1)]).losses == [
        {"loss_0": 1.0, "loss_1": 2.0},
        {"loss_b": 3.0},
    ]


def test_step_without_gradients_has_none_that_are_broken():
    assert not judge([scalars(1.0)], []).is_gradient_broken


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_other_types(dtype):
    gradients = [torch.ones(2), torch.tensor([1.0, 2.0], dtype=dtype)]
    assert not judge([scalars(1.0)], gradients).is_gradient_broken
    gradients[1][0] = INF
    assert judge([scalars(1.0)], gradients).is_gradient_broken


def test_sparse_gradients():
    for value, is_broken in ((NAN, True), (2.0, False)):
        gradient = torch.sparse_coo_tensor([[1]], [[value, 1.0]], (3, 2), check_invariants=True)
        assert judge([scalars(1.0)], [gradient]).is_gradient_broken == is_broken


def test_loss_of_another_process_counts(monkeypatch):
    monkeypatch.setattr(
        comm, "largest_of_each", lambda flags: torch.maximum(flags, torch.tensor([1.0, 0.0]))
    )
    verdict = judge([scalars(1.0)], [torch.ones(1)])
    assert verdict.is_loss_broken
    assert verdict.losses == [{"loss_0": 1.0}]
