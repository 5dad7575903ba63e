import math

import pytest

from detkit.engine import TrainerBase, hooks


class Trainer(TrainerBase):
    def __init__(self, fail_at=None):
        super().__init__()
        self.fail_at = fail_at

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("step failed")


def run(period, iterations, function=None, fail_at=None, **kwargs):
    """Iterations at which the function was called, and the trainer."""
    calls, trainer = [], Trainer(fail_at)

    def evaluate():
        calls.append(trainer.iter)
        return function() if function else {}

    trainer.register_hooks([hooks.EvalHook(period, evaluate, **kwargs)])
    trainer.train(0, iterations)
    return calls, trainer


@pytest.mark.parametrize(
    ("period", "iterations", "want"),
    [
        pytest.param(0, 5, [5], id="at-the-end-only"),
        pytest.param(2, 5, [1, 3, 5], id="every-two"),
        pytest.param(2, 4, [1, 4], id="last-one-once"),
        pytest.param(10, 3, [3], id="longer-than-training"),
    ],
)
def test_evaluates_every_period_and_at_the_end(period, iterations, want):
    assert run(period, iterations)[0] == want


def test_evaluation_at_the_end_can_be_left_out():
    assert run(2, 5, eval_after_train=False)[0] == [1, 3]


@pytest.mark.parametrize("fail_at", [0, 4])
def test_run_that_failed_is_not_evaluated(fail_at):
    calls = []
    with pytest.raises(RuntimeError, match="step failed"):
        run(0, 5, lambda: calls.append(1), fail_at=fail_at)
    assert calls == []


def test_results_go_to_the_storage_under_flat_names():
    _, trainer = run(2, 3, lambda: {"bbox": {"AP": 40, "AP50": math.nan}, "loss": 1.5})
    latest = trainer.storage.latest()
    assert (latest["bbox/AP"], latest["loss"]) == ((40.0, 3), (1.5, 3))
    assert math.isnan(latest["bbox/AP50"][0])
    assert [i for _, i in trainer.storage.history("bbox/AP").values()] == [1, 3]


@pytest.mark.parametrize("empty", [None, {}])
def test_processes_without_results_put_nothing(empty):
    assert run(0, 1, lambda: empty)[1].storage.latest() == {}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        pytest.param([1.0], "must give a dict of results, got a list", id="list"),
        pytest.param({"bbox": {"AP": "high"}}, "must be numbers, got bbox/AP='high'", id="text"),
    ],
)
def test_results_that_are_no_numbers_are_errors(results, message):
    with pytest.raises(TypeError, match=message):
        run(0, 1, lambda: results)


def test_negative_period_is_an_error():
    with pytest.raises(ValueError, match=r"TEST\.EVAL_PERIOD must be at least 0, got -1"):
        hooks.EvalHook(-1, dict)
