import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detkit.engine import AMPTrainer, SimpleTrainer, hooks
from detkit.engine.simple_trainer import sum_losses
from tests.engine.toy import TwoLosses, batches, toy_trainer, with_schedule


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
    class Single(TwoLosses):
        def forward(self, batch):
            return self.fc(batch).pow(2).mean()

    trainer = toy_trainer(Single())
    trainer.train(0, 2)
    assert sorted(trainer.storage.latest()) == ["data_time", "total_loss"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_before_the_weights_change(bad):
    class Breaks(TwoLosses):
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


def test_model_without_optimizer_is_an_error():
    with pytest.raises(TypeError, match="a trainer needs a model and an optimizer"):
        SimpleTrainer(TwoLosses(), batches())


def test_model_in_eval_mode_is_an_error():
    trainer = toy_trainer()
    trainer.model.eval()
    with pytest.raises(RuntimeError, match="TwoLosses is in eval mode"):
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
    trainer.reset_data_loader(lambda: [torch.zeros(1, 2)])  # as Detectron2 wants it
    trainer.train(2, 3)
    assert trainer.iter == 3


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
    class Idle(TwoLosses):
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
    model = TwoLosses()
    other = SimpleTrainer(model, batches(), torch.optim.AdamW(model.parameters()))
    with pytest.raises(
        ValueError, match=r"checkpoint's optimizer is not AdamW: .* betas.*SOLVER\.OPTIMIZER"
    ):
        other.load_state_dict(saved)


def test_own_write_metrics_gets_tensors_as_in_detectron2():
    class Own(SimpleTrainer):
        def _write_metrics(self, loss_dict, data_time, prefix=""):
            seen.append({name: loss.detach().cpu().item() for name, loss in loss_dict.items()})
            super()._write_metrics(loss_dict, data_time, prefix)

    seen = []
    model = TwoLosses()
    trainer = Own(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.train(0, 3)
    stored = [value for value, _ in trainer.storage.history("loss_a").values()]
    assert [losses["loss_a"] for losses in seen] == stored
