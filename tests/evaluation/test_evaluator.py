import io
import logging
import sys

import pytest
import torch
from torch import nn

from detkit.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_context,
    inference_on_dataset,
)
from detkit.evaluation import evaluator as evaluator_module
from detkit.layers.cpu.prepared_weights import are_weights_kept


class Recorder(DatasetEvaluator):
    """Keeps what it is called with, and evaluates to the number of inputs."""

    def __init__(self, task="count"):
        self.task = task

    def reset(self):
        self.seen = []

    def process(self, inputs, outputs):
        self.seen += list(zip(inputs, outputs, strict=True))

    def evaluate(self):
        return {self.task: {"seen": len(self.seen)}}


class Doubler(nn.Module):
    """Twice the input; its batch norm is held in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.dropout = nn.Dropout(0.5)
        self.train()
        self.norm.eval()

    def forward(self, batch):
        self.modes = [module.training for module in self.modules()]
        self.grad_enabled = torch.is_grad_enabled()
        return [2 * item for item in batch]


def test_every_output_meets_its_input():
    recorder = Recorder()
    results = inference_on_dataset(Doubler(), [[1, 2], [3]], recorder)
    assert results == {"count": {"seen": 3}}
    assert recorder.seen == [(1, 2), (2, 4), (3, 6)]


def test_model_runs_in_eval_mode_without_gradients():
    model = Doubler()
    inference_on_dataset(model, [[1]], None)
    assert model.modes == [False, False, False]
    assert not model.grad_enabled


def test_tensors_that_the_model_keeps_can_be_trained_on():
    kept = []
    weight = torch.ones(1, requires_grad=True)
    inference_on_dataset(
        lambda batch: [kept.append(torch.ones(1)) or item for item in batch], [[1]], None
    )
    (kept[0] * weight).sum().backward()
    assert weight.grad == 1


def test_without_evaluator_the_result_is_empty():
    assert inference_on_dataset(Doubler(), [[1]], None) == {}


def test_empty_loader_is_evaluated():
    assert inference_on_dataset(Doubler(), [], Recorder()) == {"count": {"seen": 0}}


def test_loader_without_length_will_do():
    assert inference_on_dataset(Doubler(), ([i] for i in range(7)), Recorder()) == {
        "count": {"seen": 7}
    }


def test_several_evaluators_give_one_dict():
    results = inference_on_dataset(Doubler(), [[1, 2]], [Recorder("a"), Recorder("b")])
    assert results == {"a": {"seen": 2}, "b": {"seen": 2}}


def test_two_evaluators_of_one_task_are_an_error():
    with pytest.raises(
        ValueError, match="two evaluators give results for task 'a', the second is Recorder"
    ):
        inference_on_dataset(Doubler(), [], DatasetEvaluators([Recorder("a"), Recorder("a")]))


def test_evaluator_of_another_process_gives_an_empty_dict():
    class Silent(Recorder):
        def evaluate(self):
            return None

    assert inference_on_dataset(Doubler(), [[1]], Silent()) == {}
    assert inference_on_dataset(Doubler(), [[1]], [Silent()]) == {}


def test_progress_is_logged_with_the_time_that_remains(caplog, monkeypatch):
    monkeypatch.setattr(evaluator_module, "_LOG_INTERVAL_SECONDS", -1)
    with caplog.at_level(logging.INFO):
        inference_on_dataset(Doubler(), [[1]] * 8, None)
    (line,) = [m for m in caplog.messages if m.startswith("inference 7/8")]
    assert all(
        word in line for word in ("dataloading", "inference", "eval", "total", "eta 0:00:00")
    )
    assert caplog.messages[-1].startswith("inference done: 8 batches in 0:00:00")


@pytest.mark.parametrize(
    ("num_batches", "expected"),
    [
        # The first five batches take 10 s each, the sixth 3 s, the seventh 1 s.
        pytest.param(
            5, "inference 10.0000, eval 0.0000, total 10.0000 s/batch)", id="warm-up only"
        ),
        pytest.param(
            7,
            "inference 2.0000, eval 0.0000, total 2.0000 s/batch), without the first 5",
            id="more",
        ),
    ],
)
def test_first_five_batches_do_not_count_in_the_times(num_batches, expected, caplog, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(evaluator_module.time, "perf_counter", lambda: now[0])

    def model(batch):
        now[0] += [10, 10, 10, 10, 10, 3, 1][batch[0]]
        return batch

    with caplog.at_level(logging.INFO):
        inference_on_dataset(model, [[i] for i in range(num_batches)], None)
    assert caplog.messages[-1].endswith(expected)


def test_every_module_comes_back_in_its_own_mode():
    model = Doubler()
    with inference_context(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, False, True]


def test_modes_come_back_after_an_error():
    model = Doubler()
    with pytest.raises(RuntimeError, match="stop"), inference_context(model):
        raise RuntimeError("stop")
    assert model.training


def test_weights_are_kept_while_a_model_is_evaluated():
    seen = []
    inference_on_dataset(lambda inputs: seen.append(are_weights_kept()) or inputs, [[1], [2]], None)
    assert seen == [True, True]
    assert not are_weights_kept()


def test_evaluator_interface_is_abstract():
    for call in (lambda e: e.reset(), lambda e: e.process([], []), lambda e: e.evaluate()):
        with pytest.raises(NotImplementedError):
            call(DatasetEvaluator())


def test_terminal_has_a_bar_in_place_of_lines(caplog, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(evaluator_module, "_LOG_INTERVAL_SECONDS", -1.0)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with caplog.at_level(logging.INFO, logger="detkit"):
        inference_on_dataset(Doubler(), [[1], [2]], None)
    assert "evaluation:   0%" in sys.stdout.getvalue()
    lines = [r for r in caplog.records if r.getMessage().startswith("inference 1/2")]
    assert [line.console for line in lines] == [""]
