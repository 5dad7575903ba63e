import logging
from pathlib import Path

import pytest

from detkit.checkpoint import load_checkpoint_file
from detkit.engine import DefaultTrainer, TrainerBase, hooks


class Trainer(TrainerBase):
    def run_step(self):
        pass


class Saved:
    """Stands for a checkpointer."""

    def __init__(self):
        self.calls = []

    def save(self, name, *, iteration):
        self.calls.append((name, iteration))


def run(scores, patience, max_iter=20, period=2, hook=None, start=0, **kwargs):
    """Train with the scores of the evaluations in turn; give the trainer, what was saved, and the hook."""
    saved, trainer, scores = Saved(), Trainer(), iter(scores)
    hook = hook or hooks.EarlyStop(patience, period, "task/score", saved, **kwargs)
    trainer.register_hooks(
        [hooks.EvalHook(period, lambda: {"task": {"score": next(scores)}}), hook]
    )
    trainer.train(start, max_iter)
    return trainer, saved.calls, hook


def test_run_ends_after_as_many_evaluations_without_a_better_score():
    trainer, saved, _ = run([1.0, 3.0, 2.0, 3.0, 0.0], patience=2)
    assert trainer.iter == trainer.max_iter == 8
    assert saved == [("model_final", 7)]
    assert trainer.storage.latest()["task/score"] == (0.0, 8)  # the final evaluation


def test_score_that_keeps_rising_trains_to_the_end():
    trainer, saved, _ = run(range(100), patience=1)
    assert (trainer.iter, saved) == (20, [])


def test_smallest_may_be_the_best():
    assert run([3.0, 2.0, 1.0, 2.0, 0.0], patience=1, mode="min")[0].iter == 8


def test_score_that_is_no_number_is_no_better():
    assert run([float("nan")] * 5, patience=3)[0].iter == 6


def test_resumed_run_that_had_ended_stays_ended_unless_patience_is_raised():
    hook = run([1.0, 0.0, 0.0], patience=1)[2]
    for patience, last in ((1, 4), (2, 6)):
        again = hooks.EarlyStop(patience, 2, "task/score", Saved())
        again.load_state_dict(hook.state_dict())
        assert run([0.0, 0.0, 0.0], patience, hook=again, start=4)[0].iter == last


def test_missing_score_is_named_with_near_misses_and_does_not_stop(caplog):
    with caplog.at_level(logging.WARNING, logger="detkit"):
        trainer = run([1.0] * 20, 1, hook=hooks.EarlyStop(1, 2, "task/scor", Saved()))[0]
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


def test_unknown_mode_is_an_error():
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
