import json

import pytest
import torch

from detkit.engine import TrainerBase, hooks


class Trainer(TrainerBase):
    def run_step(self):
        torch.ones(3).cumsum(0)
        if self.iter == 3:
            raise RuntimeError("step failed")


def test_chosen_iterations_are_traced(tmp_path):
    trainer = Trainer()
    trainer.register_hooks([hooks.TorchProfiler(lambda t: t.iter == 1, str(tmp_path / "traces"))])
    trainer.train(0, 3)
    (path,) = (tmp_path / "traces").iterdir()
    assert path.name == "trace_0000001.json"
    assert any(e.get("name") == "aten::cumsum" for e in json.loads(path.read_text())["traceEvents"])


def test_step_that_fails_under_the_profiler_leaves_it_stopped(tmp_path):
    trainer = Trainer()
    trainer.register_hooks([hooks.TorchProfiler(lambda t: t.iter == 3, str(tmp_path))])
    with pytest.raises(RuntimeError, match="step failed"):
        trainer.train(3, 4)
    with torch.profiler.profile():  # would complain if another one were running
        pass
