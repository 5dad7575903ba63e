import gc
import logging
import weakref

import pytest

from detkit.engine import HookBase, TrainerBase, hooks
from detkit.utils.events import EventStorage
from detkit.utils.logger import setup_logger


class Recorder(HookBase):
    def __init__(self, calls, name="", fail_in=()):
        self.calls, self.name, self.fail_in = calls, name, fail_in

    def _note(self, event):
        self.calls.append((self.name + event, self.trainer.iter))
        if event in self.fail_in:
            raise ValueError(f"{self.name}{event} failed")

    def before_train(self):
        self._note("before_train")

    def after_train(self):
        self._note("after_train")

    def before_step(self):
        self._note("before_step")

    def after_backward(self):
        self._note("after_backward")

    def after_step(self):
        self._note("after_step")


class Counting(TrainerBase):
    def run_step(self):
        self.after_backward()  # a step is to call this


def test_hooks_are_called_around_each_step_and_iter_tells_that_training_finished():
    calls, trainer = [], Counting()
    trainer.register_hooks([Recorder(calls), None])
    trainer.train(3, 5)
    step = ["before_step", "after_backward", "after_step"]
    assert calls == [
        ("before_train", 3),
        *((e, 3) for e in step),
        *((e, 4) for e in step),
        ("after_train", 5),
    ]


def test_storage_follows_the_iteration():
    seen, trainer = [], Counting()
    trainer.register_hooks([hooks.CallbackHook(after_step=lambda t: seen.append(t.storage.iter))])
    trainer.train(5, 8)
    assert seen == [5, 6, 7]
    assert trainer.storage.iter == 8


def test_failing_step_still_closes_all_hooks_and_counts_as_unfinished():
    calls, trainer = [], Counting()
    trainer.register_hooks(
        [Recorder(calls, "a.", ("after_step", "after_train")), Recorder(calls, "b.")]
    )
    with pytest.raises(ValueError, match=r"a\.after_train failed") as error:
        trainer.train(0, 1)
    assert "a.after_step failed" in str(error.value.__context__)
    assert calls[-2:] == [("a.after_train", 0), ("b.after_train", 0)]


def test_nothing_left_to_train_runs_no_step_but_finishes():
    calls, trainer = [], Counting()
    trainer.register_hooks([Recorder(calls)])
    trainer.train(7, 5)
    assert calls == [("before_train", 7), ("after_train", 7)]


class OwnLoop(Counting):
    """Trains as trainers did in Detectron2's first versions, and in what was written for them."""

    def train(self, start_iter, max_iter):
        self.start_iter, self.max_iter = start_iter, max_iter
        with EventStorage(start_iter) as self.storage:
            self.before_train()
            try:
                for self.iter in range(start_iter, max_iter):
                    self.before_step()
                    self.run_step()
                    self.after_step()
            finally:
                self.after_train()


def test_loop_of_a_subclass_has_finished_where_it_ends_without_an_error():
    calls = []
    trainer = OwnLoop()
    trainer.register_hooks([Recorder(calls)])
    trainer.train(0, 2)
    assert calls[-1] == ("after_train", 2)
    trainer = OwnLoop()
    trainer.register_hooks([Recorder(calls, fail_in=["after_step"])])
    with pytest.raises(ValueError, match="after_step failed"):
        trainer.train(0, 1)
    assert calls[-1] == ("after_train", 0)


def test_something_else_than_a_hook_is_an_error():
    with pytest.raises(TypeError, match="must derive from HookBase, got str"):
        Counting().register_hooks(["timer"])


def test_trainer_without_step_says_so():
    with pytest.raises(NotImplementedError, match=r"TrainerBase must define run_step"):
        TrainerBase().train(0, 1)


def test_trainer_and_hooks_are_freed_without_a_collection():
    trainer = Counting()
    trainer.register_hooks([hooks.IterationTimer()])
    trainer.train(0, 1)
    gone = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()


class Stateful(HookBase):
    def __init__(self, n=0):
        self.n = n

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]


def test_hooks_of_one_class_keep_their_states_apart():
    first, second = Counting(), Counting()
    first.register_hooks([Stateful(1), hooks.IterationTimer(), Stateful(2)])
    assert first.state_dict()["hooks"] == {"Stateful": {"n": 1}, "Stateful#2": {"n": 2}}
    restored = [Stateful(), Stateful()]
    second.register_hooks(restored)
    second.load_state_dict(first.state_dict())
    assert [hook.n for hook in restored] == [1, 2]


def test_state_of_a_hook_that_is_not_there_is_named(caplog):
    with caplog.at_level(logging.WARNING, logger="detkit"):
        Counting().load_state_dict({"iteration": 4, "hooks": {"EMAHook": {}}})
    assert "state of hook EMAHook, which this run does not use" in caplog.text


def test_functions_are_called_with_the_trainer():
    seen, trainer = [], Counting()
    events = ["before_train", "before_step", "after_backward", "after_step", "after_train"]
    trainer.register_hooks(
        [hooks.CallbackHook(**{e: lambda t, e=e: seen.append((e, t.iter)) for e in events})]
    )
    trainer.train(0, 1)
    assert seen == [(e, 1 if e == "after_train" else 0) for e in events]


def test_functions_are_optional():
    trainer = Counting()
    trainer.register_hooks([hooks.CallbackHook()])
    trainer.train(0, 2)
    assert trainer.iter == 2


class Periodic(hooks.PeriodicHook):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []

    def act(self):
        self.calls.append(self.trainer.iter)


@pytest.mark.parametrize(
    ("settings", "iterations", "calls"),
    [
        pytest.param({"period": 2}, 5, [1, 3, 5], id="and-after-training"),
        pytest.param({"period": 2}, 4, [1, 4], id="last-iteration-once"),
        pytest.param({"period": 0}, 4, [4], id="only-after-training"),
        pytest.param({"period": -1}, 4, [4], id="negative"),
        pytest.param({"period": 9}, 4, [4], id="longer-than-the-run"),
        pytest.param({"period": 2, "after_train": False}, 4, [1], id="never-at-the-end"),
        pytest.param(
            {"period": 3, "after_train": False, "after_last_step": True},
            5,
            [2, 4],
            id="with-the-last-step",
        ),
    ],
)
def test_periodic_hook_acts_when_it_is_due(settings, iterations, calls):
    hook, trainer = Periodic(**settings), Counting()
    trainer.register_hooks([hook])
    trainer.train(0, iterations)
    assert hook.calls == calls


def test_periodic_hook_does_not_act_at_the_end_of_a_run_that_failed():
    hook, trainer = Periodic(0), Counting()
    trainer.run_step = lambda: [][trainer.iter]
    trainer.register_hooks([hook])
    with pytest.raises(IndexError):
        trainer.train(0, 1)
    assert hook.calls == []


def test_traceback_of_an_error_is_in_the_file_and_left_to_python_on_the_console(tmp_path, capsys):
    class Failing(TrainerBase):
        def run_step(self):
            raise ValueError("no such thing")

    setup_logger(str(tmp_path))
    with pytest.raises(ValueError, match="no such thing"):
        Failing().train(0, 9)
    assert "Traceback" in (tmp_path / "log.txt").read_text()
    shown = capsys.readouterr().out
    assert "ERROR: training stopped at iteration 0" in shown
    assert "Traceback" not in shown
