"""Hooks that save: every period, at the end, and when the run is asked to stop."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer
from detkit.engine import hooks
from tests.engine.toy import IdleTrainer


def test_periodic_hook_saves_every_period_and_at_the_end(tmp_path):
    trainer = IdleTrainer()
    trainer.register_hooks(
        [hooks.PeriodicCheckpointer(DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)), 2)]
    )
    trainer.train(0, 5)
    names = sorted(os.listdir(tmp_path))
    assert names == ["last_checkpoint", "model_0000001.pth", "model_0000003.pth", "model_final.pth"]
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 4


@pytest.fixture
def hook(tmp_path):
    hook = hooks.StopOnSignal(DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)))
    hook.trainer = SimpleNamespace(iter=3, max_iter=9)
    hook.before_train()
    yield hook
    hook.after_train()


def test_signal_is_answered_at_once_and_obeyed_after_the_iteration(hook, tmp_path, capfd):
    hook.after_step()
    os.kill(os.getpid(), signal.SIGUSR1)
    assert "SIGUSR1: stopping after this iteration" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="75"):
        hook.after_step()
    assert {path.name for path in tmp_path.iterdir()} == {"model_0000003.pth", "last_checkpoint"}


def test_signal_behind_the_last_iteration_stops_at_once(hook, tmp_path):
    hook.trainer.iter = 9
    with pytest.raises(SystemExit, match="75"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert not list(tmp_path.iterdir())


def test_handlers_are_afterwards_as_before(hook):
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    hook.after_train()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
