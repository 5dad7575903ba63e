"""Evaluations, the best model by a score, and the end of a run whose score no longer rises."""

import logging
import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer, load_checkpoint_file
from detkit.engine import DefaultTrainer, TrainerBase, hooks
from tests.engine.toy import IdleTrainer


class FailingTrainer(TrainerBase):
    def __init__(self, fail_at=None):
        super().__init__()
        self.fail_at = fail_at

    def run_step(self):
        if self.iter == self.fail_at:
            raise RuntimeError("step failed")


def run_evaluations(period, iterations, function=None, fail_at=None, **kwargs):
    """Iterations at which the function was called, and the trainer."""
    calls, trainer = [], FailingTrainer(fail_at)

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
    assert run_evaluations(period, iterations)[0] == want


def test_evaluation_at_the_end_can_be_left_out():
    assert run_evaluations(2, 5, eval_after_train=False)[0] == [1, 3]


@pytest.mark.parametrize("fail_at", [0, 4])
def test_run_that_failed_is_not_evaluated(fail_at):
    calls = []
    with pytest.raises(RuntimeError, match="step failed"):
        run_evaluations(0, 5, lambda: calls.append(1), fail_at=fail_at)
    assert calls == []


def test_results_go_to_the_storage_under_flat_names():
    _, trainer = run_evaluations(2, 3, lambda: {"bbox": {"AP": 40, "AP50": math.nan}, "loss": 1.5})
    latest = trainer.storage.latest()
    assert (latest["bbox/AP"], latest["loss"]) == ((40.0, 3), (1.5, 3))
    assert math.isnan(latest["bbox/AP50"][0])
    assert [i for _, i in trainer.storage.history("bbox/AP").values()] == [1, 3]


@pytest.mark.parametrize("empty", [None, {}])
def test_processes_without_results_put_nothing(empty):
    assert run_evaluations(0, 1, lambda: empty)[1].storage.latest() == {}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        pytest.param([1.0], "must give a dict of results, got a list", id="list"),
        pytest.param({"bbox": {"AP": "high"}}, "must be numbers, got bbox/AP='high'", id="text"),
    ],
)
def test_results_that_are_no_numbers_are_errors(results, message):
    with pytest.raises(TypeError, match=message):
        run_evaluations(0, 1, lambda: results)


class Scored(TrainerBase):
    """Puts a given score into the storage after each iteration."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def run_step(self):
        if self.scores[self.iter] is not None:
            self.storage.put_scalar("bbox/AP", self.scores[self.iter], smoothing_hint=False)


def run_best(
    tmp_path,
    scores,
    *,
    period=1,
    mode="max",
    state=None,
    metric="bbox/AP",
    kind=hooks.BestCheckpointer,
):
    model = nn.Linear(1, 1)
    hook = kind(period, DetectionCheckpointer(model, str(tmp_path)), metric, mode)
    if state:
        hook.load_state_dict(state)
    trainer = Scored(scores)
    # The weight tells which iteration a file is from.
    mark = hooks.CallbackHook(before_step=lambda t: nn.init.constant_(model.weight, t.iter))
    trainer.register_hooks([mark, hook])
    trainer.train(0, len(scores))
    return hook


def saved_iteration(tmp_path):
    return int(torch.load(tmp_path / "model_best.pth")["model"]["weight"].item())


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 1)])
def test_best_model_is_kept(tmp_path, mode, best):
    hook = run_best(tmp_path, [3.0, 1.0, 5.0, 4.0, 2.0], mode=mode)
    assert saved_iteration(tmp_path) == best
    assert (hook.best_iter, hook.best_metric) == (best, [3.0, 1.0, 5.0][best])


def test_overridden_steps_of_the_best_checkpointer_are_called(tmp_path):
    class Early(hooks.BestCheckpointer):
        checks = 0

        def _best_checking(self):
            self.checks += 1
            super()._best_checking()

        def _update_best(self, val, iteration):
            return iteration < 2 and super()._update_best(val, iteration)

    hook = run_best(tmp_path, [1.0, 2.0, 3.0], kind=Early)
    assert (hook.checks, hook.best_metric, hook.best_iter) == (3, 2.0, 1)
    assert saved_iteration(tmp_path) == 1
    assert hook._compare(2, 1)
    assert not hook._update_best(float("nan"), 0)
    assert hook.best_metric == 2.0


def test_score_after_the_last_iteration_counts(tmp_path):
    run_best(tmp_path, [1.0, 2.0])
    assert saved_iteration(tmp_path) == 1


def test_only_iterations_with_an_evaluation_count(tmp_path):
    run_best(tmp_path, [9.0, 1.0, 9.0, 2.0, 0.0], period=2)
    assert saved_iteration(tmp_path) == 3


def test_best_so_far_survives_a_resume(tmp_path):
    hook = run_best(tmp_path, [1.0, 2.0], state={"best_metric": 7.0, "best_iter": 40})
    assert os.listdir(tmp_path) == []
    assert hook.state_dict() == {"best_metric": 7.0, "best_iter": 40}


def test_nan_is_never_the_best(tmp_path, caplog):
    run_best(tmp_path, [float("nan"), 1.0, float("nan")])
    assert saved_iteration(tmp_path) == 1
    assert "not compared" in caplog.text


def test_missing_score_is_named(tmp_path, caplog):
    run_best(tmp_path, [1.0, 2.0], metric="bbox/ap")
    assert "no score 'bbox/ap' to choose the best model by; scores: bbox/AP" in caplog.text
    assert os.listdir(tmp_path) == []


def test_best_model_is_not_the_one_to_resume_from(tmp_path):
    run_best(tmp_path, [1.0])
    assert os.listdir(tmp_path) == ["model_best.pth"]


def test_unknown_mode_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="mode must be max or min, got 'best'"):
        run_best(tmp_path, [], mode="best")


class Saved:
    """Stands for a checkpointer."""

    def __init__(self):
        self.calls = []

    def save(self, name, *, iteration):
        self.calls.append((name, iteration))


def run_early_stop(scores, patience, max_iter=20, period=2, hook=None, start=0, **kwargs):
    """Train with the scores of the evaluations in turn; give the trainer, what was saved, and the hook."""
    saved, trainer, scores = Saved(), IdleTrainer(), iter(scores)
    hook = hook or hooks.EarlyStop(patience, period, "task/score", saved, **kwargs)
    trainer.register_hooks(
        [hooks.EvalHook(period, lambda: {"task": {"score": next(scores)}}), hook]
    )
    trainer.train(start, max_iter)
    return trainer, saved.calls, hook


def test_run_ends_after_as_many_evaluations_without_a_better_score():
    trainer, saved, _ = run_early_stop([1.0, 3.0, 2.0, 3.0, 0.0], patience=2)
    assert trainer.iter == trainer.max_iter == 8
    assert saved == [("model_final", 7)]
    assert trainer.storage.latest()["task/score"] == (0.0, 8)  # the final evaluation


def test_score_that_keeps_rising_trains_to_the_end():
    trainer, saved, _ = run_early_stop(range(100), patience=1)
    assert (trainer.iter, saved) == (20, [])


def test_smallest_may_be_the_best():
    assert run_early_stop([3.0, 2.0, 1.0, 2.0, 0.0], patience=1, mode="min")[0].iter == 8


def test_score_that_is_no_number_is_no_better():
    assert run_early_stop([float("nan")] * 5, patience=3)[0].iter == 6


def test_resumed_run_that_had_ended_stays_ended_unless_patience_is_raised():
    hook = run_early_stop([1.0, 0.0, 0.0], patience=1)[2]
    for patience, last in ((1, 4), (2, 6)):
        again = hooks.EarlyStop(patience, 2, "task/score", Saved())
        again.load_state_dict(hook.state_dict())
        assert run_early_stop([0.0, 0.0, 0.0], patience, hook=again, start=4)[0].iter == last


def test_missing_score_is_named_with_near_misses_and_does_not_stop(caplog):
    with caplog.at_level(logging.WARNING, logger="detkit"):
        trainer = run_early_stop([1.0] * 20, 1, hook=hooks.EarlyStop(1, 2, "task/scor", Saved()))[0]
    assert trainer.iter == 20
    assert (
        "no score 'task/scor' to choose the best model by; scores: task/score. Did you mean"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 2, "a", None), r"EARLY_STOP\.PATIENCE must be at least 1"),
        ((1, 0, "a", None), r"set TEST\.EVAL_PERIOD above 0"),
    ],
)
def test_bad_numbers_are_errors(args, message):
    with pytest.raises(ValueError, match=message):
        hooks.EarlyStop(*args)


def test_unknown_mode_of_an_early_stop_is_an_error():
    with pytest.raises(ValueError, match="mode must be max or min, got 'best'"):
        hooks.EarlyStop(1, 1, "a", Saved(), mode="best")


def scored(scores):
    class Scored(DefaultTrainer):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": scores.pop(0)}}

    return Scored


@pytest.fixture
def watched_cfg(tiny_cfg):
    tiny_cfg.TEST.EVAL_PERIOD, tiny_cfg.SOLVER.MAX_ITER, tiny_cfg.BEST_METRIC = 1, 6, "bbox/AP"
    return tiny_cfg


def test_keys_save_the_best_and_end_the_run(watched_cfg):
    watched_cfg.EARLY_STOP.PATIENCE = 2
    trainer = scored([1.0, 5.0, 4.0, 3.0, 2.0])(watched_cfg)
    assert trainer.train() == {"bbox": {"AP": 2.0}}
    assert trainer.iter == 4
    folder = Path(watched_cfg.OUTPUT_DIR)
    assert load_checkpoint_file(str(folder / "model_best.pth"))["iteration"] == 1
    assert load_checkpoint_file(str(folder / "model_final.pth"))["iteration"] == 3
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    assert '"iteration": 3' in (folder / "metrics.json").read_text()

    again = scored([9.0])(watched_cfg)
    again.resume_or_load(resume=True)
    assert again.train() == {"bbox": {"AP": 9.0}}
    assert again.iter == 4


def test_best_score_survives_a_resume(watched_cfg):
    scored([1.0, 5.0, 4.0, 3.0, 2.0, 1.0])(watched_cfg).train()
    again = scored([4.5])(watched_cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert load_checkpoint_file(f"{watched_cfg.OUTPUT_DIR}/model_best.pth")["iteration"] == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["BEST_METRIC", ""], r"EARLY_STOP\.PATIENCE needs BEST_METRIC"),
        (["TEST.EVAL_PERIOD", 0], r"set TEST\.EVAL_PERIOD above 0"),
        (["DATASETS.TEST", ()], r"BEST_METRIC bbox/AP needs data sets .*DATASETS\.TEST is empty"),
    ],
)
def test_keys_that_do_not_fit_are_errors(watched_cfg, settings, message):
    watched_cfg.merge_from_list(["EARLY_STOP.PATIENCE", 2, *settings])
    with pytest.raises(ValueError, match=message):
        DefaultTrainer(watched_cfg)
