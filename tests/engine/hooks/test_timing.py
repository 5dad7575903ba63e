"""Times of iterations and traces."""

import json
import logging
import re
import time

import pytest
import torch

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


def test_memory_is_logged_every_period_up_to_a_number_of_lines(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 3 << 20)
        monkeypatch.setattr(torch.cuda, f"max_{name}", lambda: 5 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    trainer = Sleeper()
    trainer.register_hooks([hooks.TorchMemoryStats(period=3, max_runs=2)])
    with caplog.at_level(logging.INFO, logger="detkit.engine.hooks.timing"):
        trainer.train(0, 9)
    assert [text for text in caplog.messages if "memory" in text] == [
        f"memory of the GPU at iteration {i}: allocated 3 MB, largest allocated 5 MB, reserved 3 MB,"
        " largest reserved 5 MB"
        for i in (2, 5)
    ]


def test_speed_of_the_run_is_logged(caplog):
    trainer = Sleeper()
    trainer.register_hooks([hooks.IterationTimer(warmup_iter=1)])
    with caplog.at_level(logging.INFO, logger="detkit"):
        trainer.train(0, 3)
    speed = re.search(r"trained 2 iterations in 0:00:00, (\d\.\d+) s each", caplog.text)
    assert 0.01 <= float(speed[1]) < 1


@pytest.mark.parametrize("iterations", [0, 1])
def test_run_that_is_all_warmup_has_no_speed(iterations, caplog):
    trainer = Sleeper()
    trainer.register_hooks([hooks.IterationTimer()])
    with caplog.at_level(logging.INFO, logger="detkit"):
        trainer.train(0, iterations)
    assert "iterations in" not in caplog.text


class Traced(TrainerBase):
    def run_step(self):
        torch.ones(3).cumsum(0)
        if self.iter == 3:
            raise RuntimeError("step failed")


def test_chosen_iterations_are_traced(tmp_path):
    trainer = Traced()
    trainer.register_hooks([hooks.TorchProfiler(lambda t: t.iter == 1, str(tmp_path / "traces"))])
    trainer.train(0, 3)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "trace_0000001.json"
    assert any(e.get("name") == "aten::cumsum" for e in json.loads(path.read_text())["traceEvents"])


def test_step_that_fails_under_the_profiler_leaves_it_stopped(tmp_path):
    trainer = Traced()
    trainer.register_hooks([hooks.TorchProfiler(lambda t: t.iter == 3, str(tmp_path))])
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(3, 4)
    with torch.profiler.profile():  # would complain if another one were running
        pass
