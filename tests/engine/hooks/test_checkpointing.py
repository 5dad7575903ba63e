import os

import pytest
import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer
from detkit.engine import TrainerBase, hooks


class Scored(TrainerBase):
    """Puts a given score into the storage after each iteration."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def run_step(self):
        if self.scores[self.iter] is not None:
            self.storage.put_scalar("bbox/AP", self.scores[self.iter], smoothing_hint=False)


def run_best(tmp_path, scores, *, period=1, mode="max", state=None, metric="bbox/AP"):
    model = nn.Linear(1, 1)
    hook = hooks.BestCheckpointer(period, DetectionCheckpointer(model, str(tmp_path)), metric, mode)
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


def test_periodic_hook_saves_every_period_and_at_the_end(tmp_path):
    trainer = Scored([None] * 5)
    trainer.register_hooks(
        [hooks.PeriodicCheckpointer(DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)), 2)]
    )
    trainer.train(0, 5)
    names = sorted(os.listdir(tmp_path))
    assert names == ["last_checkpoint", "model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 4
