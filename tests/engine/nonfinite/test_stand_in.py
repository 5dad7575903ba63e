import pytest
import torch
from torch import nn

from detkit.engine.nonfinite import giving_nan, has_stand_in
from detkit.layers.norm import SyncBatchNorm2d
from detkit.utils import comm


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1).requires_grad_(False))


def test_all_parameters_that_train_are_part_of_the_loss(model):
    with giving_nan(model):
        loss = model(["whatever"])
    assert loss.isnan()
    assert loss.shape == ()
    loss.backward()
    assert [p.grad is not None and bool(p.grad.isnan().all()) for p in model.parameters()] == [
        True
    ] * 4 + [False] * 2


def test_forward_is_its_own_again(model):
    with pytest.raises(KeyError), giving_nan(model):
        raise KeyError
    assert "forward" not in vars(model)
    assert model(torch.ones(1, 2)).isfinite().all()


def test_forward_that_a_user_has_put_there_comes_back(model):
    model.forward = lambda x: x + 1
    with giving_nan(model):
        assert model(0).isnan()
    assert model(0) == 1


@pytest.mark.parametrize("norm", [SyncBatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize(
    ("num_processes", "training", "expected"),
    [
        pytest.param(2, True, False, id="others-wait"),
        pytest.param(2, False, True, id="fixed-statistics"),
        pytest.param(1, True, True, id="no-others"),
    ],
)
def test_layers_that_wait_for_other_processes_have_no_stand_in(
    model, norm, num_processes, training, expected, monkeypatch
):
    monkeypatch.setattr(comm, "get_world_size", lambda: num_processes)
    assert has_stand_in(model)
    assert has_stand_in(nn.Sequential(model, norm(2)).train(training)) is expected
