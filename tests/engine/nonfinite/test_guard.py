"""What the guard finds, which forward pass takes the place of one that raised, and what it skips."""

import logging
import math

import pytest
import torch
from torch import nn

from detkit.engine import hooks
from detkit.engine.nonfinite import NonFiniteError
from detkit.engine.nonfinite.guard import check_step, nan_forward, other_processes_wait_in_layers
from detkit.layers.norm import SyncBatchNorm2d
from detkit.utils import comm
from detkit.utils.errors import UserError
from tests.engine.toy import batches, toy_trainer, with_schedule

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
    check = check_step(
        [scalars(0.5), scalars(*losses)], [torch.zeros(2, 2), torch.tensor(gradient)]
    )
    assert check.is_loss_broken == is_loss_broken
    assert check.is_gradient_broken == is_gradient_broken


def test_losses_are_given_by_pass_and_name():
    first, second = scalars(1.0, 2.0), {"loss_b": torch.tensor(3.0, dtype=torch.bfloat16)}
    assert check_step([first, second], [torch.ones(1)]).losses == [
        {"loss_0": 1.0, "loss_1": 2.0},
        {"loss_b": 3.0},
    ]


def test_step_without_gradients_has_none_that_are_broken():
    assert not check_step([scalars(1.0)], []).is_gradient_broken


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gradients_of_other_types(dtype):
    gradients = [torch.ones(2), torch.tensor([1.0, 2.0], dtype=dtype)]
    assert not check_step([scalars(1.0)], gradients).is_gradient_broken
    gradients[1][0] = INF
    assert check_step([scalars(1.0)], gradients).is_gradient_broken


def test_sparse_gradients():
    for value, is_broken in ((NAN, True), (2.0, False)):
        gradient = torch.sparse_coo_tensor([[1]], [[value, 1.0]], (3, 2), check_invariants=True)
        assert check_step([scalars(1.0)], [gradient]).is_gradient_broken == is_broken


def test_loss_of_another_process_counts(monkeypatch):
    monkeypatch.setattr(
        comm, "all_reduce_max", lambda flags: torch.maximum(flags, torch.tensor([1.0, 0.0]))
    )
    check = check_step([scalars(1.0)], [torch.ones(1)])
    assert check.is_loss_broken
    assert check.losses == [{"loss_0": 1.0}]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1), nn.Linear(1, 1).requires_grad_(False))


def test_all_parameters_that_train_are_part_of_the_loss(model):
    with nan_forward(model):
        loss = model(["whatever"])
    assert loss.isnan()
    assert loss.shape == ()
    loss.backward()
    assert [p.grad is not None and bool(p.grad.isnan().all()) for p in model.parameters()] == [
        True
    ] * 4 + [False] * 2


def test_forward_is_its_own_again(model):
    with pytest.raises(KeyError), nan_forward(model):
        raise KeyError
    assert "forward" not in vars(model)
    assert model(torch.ones(1, 2)).isfinite().all()


def test_forward_that_a_user_has_put_there_comes_back(model):
    model.forward = lambda x: x + 1
    with nan_forward(model):
        assert model(0).isnan()
    assert model(0) == 1


@pytest.mark.parametrize("norm", [SyncBatchNorm2d, nn.SyncBatchNorm])
@pytest.mark.parametrize(
    ("num_processes", "training", "expected"),
    [
        pytest.param(2, True, True, id="others-wait"),
        pytest.param(2, False, False, id="fixed-statistics"),
        pytest.param(1, True, False, id="no-others"),
    ],
)
def test_other_processes_wait_in_synchronized_norms_that_train(
    model, norm, num_processes, training, expected, monkeypatch
):
    monkeypatch.setattr(comm, "get_world_size", lambda: num_processes)
    assert not other_processes_wait_in_layers(model)
    with_norm = nn.Sequential(model, norm(2)).train(training)
    assert other_processes_wait_in_layers(with_norm) is expected


class Sometimes(nn.Module):
    """Its losses, or gradients, are not finite where the data say so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(2)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        x, fault = batch
        x = self.norm(x * (math.nan if fault == "loss" else 1.0))
        y = self.fc(x)
        if fault == "raises":
            raise FloatingPointError("scores contain nan")
        if fault == "constant":
            y = y + math.inf
        if fault == "gradient":
            y = y + (y * 0).abs().sqrt()
        return {"loss_a": y.pow(2).mean(), "loss_b": y.abs().mean()}


FAULTS = ["loss", "constant", "gradient", "raises"]


def faulty_data(faults):
    return list(zip(batches(), faults, strict=False))


def skipping_trainer(faults, count, **kwargs):
    trainer = toy_trainer(Sometimes(), faulty_data(faults), max_skipped_steps=count, **kwargs)
    return with_schedule(trainer)


@pytest.mark.parametrize("fault", FAULTS)
def test_skipped_step_changes_nothing_but_iteration_and_schedule(fault, caplog):
    trainer = skipping_trainer(["", "", fault, "", ""], 1)
    with caplog.at_level(logging.WARNING, logger="detkit"):
        trainer.train(0, 5)
    data = faulty_data([""] * 5)
    expected = with_schedule(toy_trainer(Sometimes(), [*data[:2], *data[3:]]))
    expected.train(0, 2)
    expected.scheduler.step()  # as it is moved on behind the skipped step
    expected.train(3, 5)

    torch.testing.assert_close(
        trainer.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0
    )
    assert torch.equal(
        trainer.optimizer.state[trainer.model.fc.weight]["momentum_buffer"],
        expected.optimizer.state[expected.model.fc.weight]["momentum_buffer"],
    )
    assert trainer.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]
    assert trainer.storage.history("skipped_steps").values() == [(1.0, 2)]
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 3, 4]
    what = {"gradient": "gradients", "raises": "scores contain nan"}.get(fault, "loss_a=")
    assert (
        f"iteration 2 is skipped (1 of SOLVER.SKIP_NONFINITE_STEPS=1): not finite are {what}"
        in caplog.text
    )


def test_skipped_step_says_so_until_the_next():
    seen = []
    trainer = skipping_trainer(["", "loss", ""], 1)
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: seen.append(t.was_skipped))])
    trainer.train(0, 3)
    assert seen == [False, True, False]


def test_one_step_more_than_may_be_skipped_stops(tmp_path):
    trainer = skipping_trainer(["", "loss", "gradient", "", "constant"], 2, dump_dir=str(tmp_path))
    with pytest.raises(
        FloatingPointError,
        match=r"iteration 4.* 2 steps were skipped before \(SOLVER\.SKIP_NONFINITE",
    ):
        trainer.train(0, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["nonfinite_iter_0000004.json"]


def test_resumed_run_goes_on_counting():
    first = skipping_trainer(["", "loss"], 2)
    first.train(0, 2)
    first.iter = 1
    second = skipping_trainer(["gradient", "", "loss"], 2)
    second.load_state_dict(first.state_dict())
    with pytest.raises(FloatingPointError, match=r"iteration 4"):
        second.train(2, 5)
    assert second.storage.history("skipped_steps").values() == [(1.0, 1), (2.0, 2)]


def test_checkpoint_from_before_steps_were_counted_has_skipped_none():
    state = toy_trainer().state_dict()
    del state["skipped_steps"]
    trainer = toy_trainer()
    trainer.load_state_dict(state)
    assert trainer.num_skipped == 0


def test_metrics_are_gathered_when_the_step_at_which_they_are_due_is_skipped():
    trainer = skipping_trainer(["", "", "", "loss"], 1, gather_metric_period=2)
    trainer.train(0, 4)
    assert [i for _, i in trainer.storage.history("total_loss").values()] == [0, 1, 2]


def test_gradient_of_one_pass_stops_the_iteration():
    with pytest.raises(FloatingPointError, match="the gradient is not finite at iteration 1"):
        skipping_trainer(["", "", "", "gradient"], 0, accum_steps=2).train(0, 2)


def test_weights_survive_a_gradient_that_is_not_finite():
    trainer = skipping_trainer(["gradient"], 0)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with pytest.raises(FloatingPointError):
        trainer.train(0, 1)
    torch.testing.assert_close(dict(trainer.model.named_parameters()), before, rtol=0, atol=0)


def test_negative_number_of_steps_to_skip_is_an_error():
    with pytest.raises(ValueError, match="max_skipped must be at least 0, got -1"):
        toy_trainer(max_skipped_steps=-1)


def test_stop_is_an_error_that_users_can_act_on():
    assert issubclass(NonFiniteError, UserError)
    assert issubclass(NonFiniteError, FloatingPointError)
