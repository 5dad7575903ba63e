import warnings

import pytest
import torch
from torch import nn

from detkit.engine import TrainerBase, hooks


class Trainer(TrainerBase):
    def __init__(self, *rates_and_counts):
        super().__init__()
        groups = [
            {"params": [nn.Parameter(torch.zeros(1)) for _ in range(count)], "lr": rate}
            for rate, count in rates_and_counts
        ]
        self.optimizer = torch.optim.SGD(groups, lr=1.0)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: 1 / (i + 1))

    def run_step(self):
        self.optimizer.step()


def test_rate_of_the_step_is_logged_and_the_schedule_moves_on():
    trainer = Trainer((1.0, 1))
    trainer.register_hooks([hooks.LRScheduler()])
    trainer.train(0, 3)
    assert trainer.storage.history("lr").values() == [(1.0, 0), (0.5, 1), (pytest.approx(1 / 3), 2)]


def test_optimizer_and_scheduler_can_be_given():
    trainer = Trainer((1.0, 1))
    own = Trainer((8.0, 1))
    trainer.register_hooks([hooks.LRScheduler(own.optimizer, own.scheduler)])
    own.optimizer.step()
    trainer.train(0, 2)
    assert trainer.storage.latest()["lr"][0] == 4.0


def test_rate_that_most_parameters_have_is_the_one_logged():
    trainer = Trainer((9.0, 1), (1.0, 2), (5.0, 1), (1.0, 1))
    trainer.register_hooks([hooks.LRScheduler()])
    trainer.train(0, 1)
    assert trainer.storage.latest()["lr"][0] == 1.0


def test_groups_are_told_apart_when_all_rates_start_at_zero():
    trainer = Trainer((9.0, 1), (1.0, 2))
    trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda i: float(i))
    trainer.register_hooks([hooks.LRScheduler()])
    trainer.train(0, 2)
    assert trainer.storage.latest()["lr"][0] == 1.0


def test_state_is_that_of_the_scheduler():
    first, second = Trainer((1.0, 1)), Trainer((1.0, 1))
    for trainer in (first, second):
        trainer.register_hooks([hooks.LRScheduler()])
    first.train(0, 4)
    second.load_state_dict(first.state_dict())
    assert second.scheduler.last_epoch == 4


def test_first_steps_that_are_left_out_are_no_reason_to_warn():
    trainer = Trainer((1.0, 1))
    trainer.run_step = lambda: None
    trainer.register_hooks([hooks.LRScheduler()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(0, 3)
    assert trainer.storage.history("lr").values() == [(1.0, 0), (0.5, 1), (pytest.approx(1 / 3), 2)]


def test_subclass_for_detectron2_finds_its_names():
    class Own(hooks.LRScheduler):
        def after_step(self):
            rate = self._optimizer.param_groups[self._best_param_group_id]["lr"]
            self.trainer.storage.put_scalar("own", rate)
            self.scheduler.step()

    trainer = Trainer((9.0, 1), (1.0, 2))
    trainer.register_hooks([Own()])
    trainer.train(0, 2)
    assert [value for value, _ in trainer.storage.history("own").values()] == [1.0, 0.5]


def test_factor_of_the_progress_is_a_schedule():
    trainer = Trainer((2.0, 1))
    hook = hooks.LRScheduler(scheduler=lambda progress: 1 - progress)
    assert hook._scheduler is not None
    trainer.register_hooks([hook])
    state = trainer.state_dict()  # before the training has begun
    trainer.load_state_dict(state)
    trainer.train(0, 4)
    rates = [value for value, _ in trainer.storage.history("lr").values()]
    assert rates == [2.0, 1.5, 1.0, 0.5]
