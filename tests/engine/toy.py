"""The smallest models that a trainer takes, and a trainer of them."""

import torch
from torch import nn

from detkit.engine import SimpleTrainer, hooks


class Toy(nn.Module):
    """Gives a loss of a batch of numbers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        return {"loss": self.fc(batch).pow(2).mean()}


class TwoLosses(Toy):
    """Gives two losses of a batch of numbers."""

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
    model = model or TwoLosses()
    return trainer_class(
        model, data or batches(), torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9), **kwargs
    )


def with_schedule(trainer):
    trainer.scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.9)
    trainer.register_hooks([hooks.LRScheduler(trainer.optimizer, trainer.scheduler)])
    return trainer
