import pytest
import torch
from torch import nn

from detkit.config import get_cfg
from detkit.solver import maybe_add_gradient_clipping


def step_with(clip_type, clip_value, norm_type=2.0, enabled=True):
    """The gradients (3, -4) and (0, 12) as a step sees them: parameters from zero, one SGD step of rate 1."""
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = enabled
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = clip_value
    cfg.SOLVER.CLIP_GRADIENTS.NORM_TYPE = norm_type
    a, b, unused = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, -4.0]), torch.tensor([0.0, 12.0])
    optimizer = torch.optim.SGD([a, b, unused], lr=1.0)
    assert maybe_add_gradient_clipping(cfg, optimizer) is optimizer
    optimizer.step()
    return (-a).tolist(), (-b).tolist()


@pytest.mark.parametrize(
    ("clip_type", "value", "norm_type", "a", "b"),
    [
        pytest.param("value", 3.5, 2.0, [3.0, -3.5], [0.0, 3.5], id="value"),
        pytest.param("norm", 10.0, 2.0, [3.0, -4.0], [0.0, 10.0], id="norm-each-by-itself"),
        pytest.param("norm", 2.0, float("inf"), [1.5, -2.0], [0.0, 2.0], id="largest-element"),
        pytest.param("full_model", 6.5, 2.0, [1.5, -2.0], [0.0, 6.0], id="full-model-norm-13"),
    ],
)
def test_gradients_are_clipped_before_the_step(clip_type, value, norm_type, a, b):
    got_a, got_b = step_with(clip_type, value, norm_type)
    assert got_a == pytest.approx(a, rel=1e-5)
    assert got_b == pytest.approx(b, rel=1e-5)


def test_disabled_leaves_gradients_alone():
    assert step_with("value", 1.0, enabled=False) == ([3.0, -4.0], [0.0, 12.0])


def test_unknown_type_names_the_key_and_near_misses():
    with pytest.raises(
        ValueError,
        match=r"SOLVER.CLIP_GRADIENTS.CLIP_TYPE must be one of .* got 'values'.* 'value'",
    ):
        step_with("values", 1.0)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_value_must_be_positive(value):
    with pytest.raises(ValueError, match=r"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0"):
        step_with("norm", value)
