import logging
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detkit.engine import AMPTrainer, SimpleTrainer, hooks
from detkit.engine.simple_trainer import sum_losses


class Toy(nn.Module):
    """Gives two losses of a batch of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        y = self.fc(batch)
        return {"loss_a": y.pow(2).mean(), "loss_b": 0.5 * y.abs().mean()}


def batches(start=0):
    """Endless; batch i depends on i alone."""
    i = start
    while True:
        yield torch.randn(4, 2, generator=torch.Generator().manual_seed(i))
        i += 1


def toy_trainer(model=None, data=None, trainer_class=SimpleTrainer, lr=0.1, **kwargs):
    model = model or Toy()
    return trainer_class(
        model, data or batches(), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **kwargs
    )


def test_losses_fall_and_each_is_in_the_storage():
    trainer = toy_trainer()
    trainer.train(0, 30)
    total = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert len(total) == 30
    assert total[-1] < total[0] / 2
    latest = trainer.storage.latest()
    assert latest["total_loss"][0] == pytest.approx(latest["loss_a"][0] + latest["loss_b"][0])
    assert latest["data_time"][0] >= 0


def test_model_may_give_a_single_loss():
    class Single(Toy):
        def forward(self, batch):
            return self.fc(batch).pow(2).mean()

    trainer = toy_trainer(Single())
    trainer.train(0, 2)
    assert sorted(trainer.storage.latest()) == ["data_time", "total_loss"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_the_weights_change(bad):
    class Breaks(Toy):
        def forward(self, batch):
            loss = super().forward(batch[0]["x"])
            return {**loss, "loss_b": loss["loss_b"] * (bad if batch[0]["i"] == 2 else 1.0)}

    seen = []
    data = ([{"x": x, "i": i, "file_name": f"{i}.jpg"}] for i, x in enumerate(batches()))
    trainer = toy_trainer(Breaks(), data)
    weights = hooks.CallbackHook(
        before_step=lambda t: seen.append(t.model.fc.weight.detach().clone())
    )
    trainer.register_hooks([weights])
    with pytest.raises(
        FloatingPointError,
        match=r"not finite at iteration 2: loss_a=\d.*, loss_b=(nan|inf).*2\.jpg",
    ) as e:
        trainer.train(0, 5)
    assert (
        "the outputs of all modules within are finite, a loss that the model (Breaks) makes of them"
        in str(e.value)
    )
    assert torch.equal(trainer.model.fc.weight, seen[-1])


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
    with pytest.raises(
        ValueError, match=r"SOLVER\.SKIP_NONFINITE_STEPS must be at least 0, got -1"
    ):
        toy_trainer(max_skipped_steps=-1)


def test_model_in_eval_mode_is_an_error():
    trainer = toy_trainer()
    trainer.model.eval()
    with pytest.raises(RuntimeError, match="Toy is in eval mode"):
        trainer.train(0, 1)


def test_data_that_end_are_an_error():
    with pytest.raises(
        RuntimeError, match="training data ended at iteration 1; a training loader must be endless"
    ):
        toy_trainer(data=[torch.ones(1, 2)]).train(0, 3)


def test_data_loader_can_be_replaced():
    trainer = toy_trainer(data=[torch.ones(1, 2)])
    trainer.train(0, 1)
    trainer.reset_data_loader([torch.zeros(1, 2)])
    trainer.train(1, 2)  # the first loader has nothing left
    assert trainer.iter == 2


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        pytest.param({}, "no losses", id="none"),
        pytest.param(
            {"loss_a": torch.ones(2)},
            r"loss 'loss_a' must be a scalar tensor, got shape \(2,\)",
            id="vector",
        ),
        pytest.param({"loss_a": 1.0}, "must be a scalar tensor, got a float", id="number"),
    ],
)
def test_losses_that_cannot_be_summed_are_errors(losses, message):
    with pytest.raises(ValueError, match=message):
        sum_losses(losses)


def with_schedule(trainer):
    trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
    trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, trainer.scheduler)])
    return trainer


@pytest.mark.parametrize("trainer_class", [SimpleTrainer, AMPTrainer])
def test_resumed_run_equals_the_undisturbed_one(trainer_class):
    whole = with_schedule(toy_trainer(trainer_class=trainer_class))
    whole.train(0, 20)

    first = with_schedule(toy_trainer(trainer_class=trainer_class))
    first.train(0, 10)
    first.iter = 9  # as at the moment when a checkpoint is written
    second = with_schedule(toy_trainer(trainer_class=trainer_class, data=batches(10)))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.iter + 1 == 10
    second.train(10, 20)

    assert torch.equal(whole.model.fc.weight, second.model.fc.weight)
    losses = [t.storage.history("total_loss").values() for t in (whole, second)]
    assert losses[0] == losses[1]
    assert whole.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"]


def test_last_iteration_is_gathered_whatever_the_period():
    trainer = toy_trainer(gather_metric_period=20)
    trainer.train(0, 3)
    assert len(trainer.storage.history("total_loss").values()) == 3


def test_period_below_one_is_an_error():
    with pytest.raises(ValueError, match="gather_metric_period must be at least 1"):
        toy_trainer(gather_metric_period=0)


@pytest.fixture
def single_process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("single_process_group")
def test_parameters_outside_the_graph_are_named_with_several_processes():
    class Idle(Toy):
        def __init__(self):
            super().__init__()
            self.mask_head = nn.Linear(2, 2)

    model = DistributedDataParallel(Idle())
    with pytest.raises(
        RuntimeError,
        match=r"2 parameters took no part in the losses: mask_head\.weight, mask_head\.bias",
    ):
        toy_trainer(model).train(0, 3)
    toy_trainer(DistributedDataParallel(Idle(), find_unused_parameters=True)).train(0, 3)


def test_state_of_another_optimizer_is_refused():
    saved = toy_trainer().state_dict()
    model = Toy()
    other = SimpleTrainer(model, batches(), torch.optim.AdamW(model.parameters()))
    with pytest.raises(
        ValueError, match=r"checkpoint's optimizer is not AdamW: .* betas.*SOLVER\.OPTIMIZER"
    ):
        other.load_state_dict(saved)
