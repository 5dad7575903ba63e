import logging
import time

import pytest

from detkit.engine import TrainerBase, hooks


class Sleeper(TrainerBase):
    def run_step(self):
        time.sleep(0.01)


def test_time_of_each_iteration_after_the_warmup_is_measured():
    trainer = Sleeper()
    trainer.register_hooks([hooks.IterationTimer(warmup_iter=2)])
    trainer.train(5, 10)
    times = trainer.storage.history("time").values()
    assert [i for _, i in times] == [7, 8, 9]
    assert all(0.01 <= seconds < 1 for seconds, _ in times)


def test_time_of_other_hooks_does_not_count():
    trainer = Sleeper()
    slow = hooks.CallbackHook(after_step=lambda t: time.sleep(0.2))
    trainer.register_hooks([hooks.IterationTimer(warmup_iter=0), slow])
    trainer.train(0, 1)
    assert trainer.storage.latest()["time"][0] < 0.2


def test_speed_of_the_run_is_logged(caplog):
    trainer = Sleeper()
    trainer.register_hooks([hooks.IterationTimer(warmup_iter=1)])
    with caplog.at_level(logging.INFO, logger="detkit"):
        trainer.train(0, 3)
    assert "trained 2 iterations in 0:00:00, 0.01" in caplog.text


@pytest.mark.parametrize("iterations", [0, 1])
def test_run_that_is_all_warmup_has_no_speed(iterations, caplog):
    trainer = Sleeper()
    trainer.register_hooks([hooks.IterationTimer()])
    with caplog.at_level(logging.INFO, logger="detkit"):
        trainer.train(0, iterations)
    assert "iterations in" not in caplog.text
