import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detkit.engine import SimpleTrainer
from detkit.engine.nonfinite import guard
from detkit.engine.nonfinite.replay import BrokenGradient, BrokenOutput, replay
from detkit.structures import Boxes, Instances
from detkit.utils.events import EventStorage, get_event_storage


class Toy(nn.Module):
    """Two layers, with dropout and statistics in between; `broken` names what gives nan."""

    def __init__(self, broken="", bad=math.nan):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(2, 3)
        self.between = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.ReLU(inplace=True))
        self.last = nn.Linear(3, 1)
        self.broken, self.bad = broken, bad
        self.seen = []

    def forward(self, batch):
        x = self.between(self.first(batch))
        self.seen.append(x.detach().clone())
        if self.broken == "between modules":
            x = x * self.bad
        y = self.last(x)
        get_event_storage().put_scalar("from_a_layer", 1.0)
        if self.broken == "gradient":
            # Finite, with an infinite derivative that meets a zero.
            return {"loss": (y * 0).abs().sqrt().sum() + y.mean()}
        return {"loss": y.mean() * (self.bad if self.broken == "loss" else 1.0)}


def make_broken_step(monkeypatch, model, batches=None, **kwargs):
    """The step that a trainer wants explained."""
    steps = []
    monkeypatch.setattr(guard, "explain", lambda step, folder: steps.append(step) or "explained")
    batches = [torch.randn(4, 2)] if batches is None else batches
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)
    with EventStorage(), pytest.raises(FloatingPointError, match="explained"):
        trainer.run_step()
    return steps[0]


def test_inner_module_is_named_before_those_that_contain_it(monkeypatch):
    model = Toy()
    model.between[0].register_forward_hook(lambda module, args, output: output * math.nan)
    found = replay(make_broken_step(monkeypatch, model))
    expected = BrokenOutput(
        "between.0", "BatchNorm1d", "float32", has_finite_inputs=True, ran_first=False
    )
    assert (found.first_output, found.first_gradient, found.error) == (expected, None, "")


def test_input_that_is_not_finite_is_told_apart(monkeypatch):
    found = replay(make_broken_step(monkeypatch, Toy("between modules")))
    assert found.first_output == BrokenOutput(
        "last", "Linear", "float32", has_finite_inputs=False, ran_first=False
    )
    found = replay(make_broken_step(monkeypatch, Toy(), [torch.full((4, 2), torch.inf)]))
    assert found.first_output == BrokenOutput(
        "first", "Linear", "float32", has_finite_inputs=False, ran_first=True
    )


def test_loss_that_no_module_gave_is_the_models_own(monkeypatch):
    found = replay(make_broken_step(monkeypatch, Toy("loss")))
    assert found.first_output == BrokenOutput(
        "", "Toy", "float32", has_finite_inputs=True, ran_first=False
    )


def test_first_gradient_is_the_first_of_the_backward_pass(monkeypatch):
    found = replay(make_broken_step(monkeypatch, Toy("gradient")))
    assert found.first_output is None
    assert found.first_gradient == BrokenGradient("output", "last", "float32")


def test_gradient_of_a_parameter_may_be_the_first(monkeypatch):
    model = Toy()
    model.last.weight.register_hook(lambda gradient: gradient * math.nan)
    found = replay(make_broken_step(monkeypatch, model))
    assert found.first_gradient == BrokenGradient("parameter", "last.weight", "float32")


def test_same_random_numbers_are_drawn(monkeypatch):
    model = Toy("loss")
    step = make_broken_step(
        monkeypatch, model, [torch.randn(64, 2), torch.randn(64, 2)], accum_steps=2
    )
    torch.manual_seed(77)
    replay(step)
    assert (model.seen[0] == 0).any()
    assert [torch.equal(a, b) for a, b in zip(model.seen[:2], model.seen[2:], strict=True)] == [
        True,
        True,
    ]


def test_nothing_is_left_of_it(monkeypatch):
    model = Toy("gradient")
    step = make_broken_step(monkeypatch, model)
    step.snapshot.restore()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(77)
    random = torch.get_rng_state()
    with EventStorage() as storage:
        replay(step)
        assert storage.latest() == {}
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter._backward_hooks for parameter in model.parameters())


def test_statistics_are_those_that_the_step_began_with(monkeypatch):
    model = Toy("loss")
    step = make_broken_step(monkeypatch, model)
    seen = []
    model.register_forward_pre_hook(
        lambda module, args: seen.append(int(module.between[0].num_batches_tracked))
    )
    replay(step)
    assert seen == [0]


def test_step_that_does_not_repeat_itself_is_finite(monkeypatch):
    model = Toy("loss")
    step = make_broken_step(monkeypatch, model)
    model.broken = ""
    found = replay(step)
    assert (found.first_output, found.first_gradient, found.error) == (None, None, "")


def test_replay_that_fails_tells_what_it_saw(monkeypatch):
    model = Toy("between modules")
    step = make_broken_step(monkeypatch, model)

    def fail(module, args, output):
        raise RuntimeError("out of memory")

    model.last.register_forward_hook(fail, prepend=False)
    found = replay(step)
    assert found.error == "RuntimeError: out of memory"


def test_model_that_raises_is_watched_up_to_there(monkeypatch):
    class Raises(Toy):
        def forward(self, batch):
            loss = super().forward(batch)["loss"]
            if not loss.isfinite():
                raise FloatingPointError("scores contain nan. More.")
            return loss

    step = make_broken_step(monkeypatch, Raises("between modules"))
    assert step.passes[0].error == "scores contain nan. More."
    found = replay(step)
    assert found.first_output.module == "last"
    assert found.error == "FloatingPointError: scores contain nan. More."


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda x: {"a": [x]}, id="dict-of-lists"),
        pytest.param(lambda x: (None, "text", 3, x), id="tuple"),
        pytest.param(lambda x: [Instances((4, 4), scores=x[:, 0])], id="instances"),
        pytest.param(lambda x: Boxes(x.repeat(1, 4)), id="boxes"),
    ],
)
def test_tensors_within_outputs_are_seen(monkeypatch, wrap):
    class Wraps(nn.Module):
        def forward(self, x):
            return wrap(x * math.nan)

    class Outer(Toy):
        def __init__(self):
            super().__init__("loss")
            self.wraps = Wraps()

        def forward(self, batch):
            losses = super().forward(batch)
            self.wraps(losses["loss"].detach().nan_to_num().reshape(1, 1))
            return losses

    assert replay(make_broken_step(monkeypatch, Outer())).first_output.module == "wraps"


def test_other_processes_are_not_needed(monkeypatch, tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    exchanges = []

    def count(state, bucket):
        exchanges.append(bucket)
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    try:
        model = DistributedDataParallel(Toy("gradient"))
        model.register_comm_hook(None, count)
        step = make_broken_step(monkeypatch, model)
        assert len(exchanges) == 1
        assert replay(step).first_gradient.name == "last"
        assert len(exchanges) == 1
    finally:
        torch.distributed.destroy_process_group()
