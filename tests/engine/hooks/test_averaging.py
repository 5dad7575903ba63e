import itertools

import pytest
import torch
from torch import nn

from detkit.engine import hooks
from detkit.utils.events import get_event_storage
from tests.engine.toy import IdleTrainer


class Logs(nn.Module):
    """A batch norm layer in a model that logs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, batch):
        get_event_storage().put_scalar("from_the_model", 1.0)
        return self.norm(batch)


def batches():
    return [
        torch.randn(50, 2, generator=torch.Generator().manual_seed(i)) * 3 + 5 for i in range(4)
    ]


def test_statistics_become_those_of_all_batches():
    model, trainer = Logs(), IdleTrainer()
    trainer.register_hooks([hooks.PreciseBN(0, model, batches(), 4)])
    trainer.train(0, 2)
    everything = torch.cat(batches())
    assert torch.allclose(model.norm.running_mean, everything.mean(0), atol=1e-4)
    assert torch.allclose(model.norm.running_var, everything.var(0), rtol=1e-2)
    assert model.norm.momentum == 0.1
    assert trainer.storage.latest() == {}


@pytest.mark.parametrize(("period", "want"), [(0, [4]), (2, [1, 3, 4]), (5, [4])])
def test_runs_every_period_and_after_the_last_iteration(period, want):
    seen, trainer = [], IdleTrainer()
    hook = hooks.PreciseBN(period, Logs(), itertools.cycle(batches()), 1)
    hook.update_stats = lambda: seen.append(trainer.iter)
    trainer.register_hooks([hook])
    trainer.train(0, 5)
    assert seen == want


def test_model_without_trained_batch_norm_is_left_alone_and_that_is_said(caplog):
    model = Logs().eval()
    before = model.norm.running_mean.clone()
    hooks.PreciseBN(0, model, [], 3).update_stats()
    assert torch.equal(model.norm.running_mean, before)
    assert (
        "TEST.PRECISE_BN.ENABLED has no effect: no batch norm layer of the model trains"
        in caplog.text
    )
