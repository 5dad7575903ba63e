import json

import pytest

from detkit.engine import TrainerBase, hooks
from detkit.utils.events import EventWriter, JSONWriter, get_event_storage


class Trainer(TrainerBase):
    def run_step(self):
        self.storage.put_scalar("loss", float(self.iter))


class Recorder(EventWriter):
    def __init__(self, fail=False):
        self.calls, self.fail = [], fail

    def write(self):
        self.calls.append(get_event_storage().iter)
        if self.fail:
            raise OSError("disk full")

    def close(self):
        self.calls.append("closed")


def train(iterations, *hook_list):
    trainer = Trainer()
    trainer.register_hooks(hook_list)
    trainer.train(0, iterations)


def test_writes_every_period_after_the_last_iteration_and_when_all_is_done():
    writer = Recorder()
    train(5, hooks.PeriodicWriter([writer], period=2))
    assert writer.calls == [1, 3, 4, 5, "closed"]


def test_results_put_after_training_are_written(tmp_path):
    late = hooks.CallbackHook(after_train=lambda t: t.storage.put_scalar("bbox/AP", 50.0))
    train(3, late, hooks.PeriodicWriter([JSONWriter(str(tmp_path / "m.json"))], period=2))
    lines = [json.loads(line) for line in (tmp_path / "m.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert lines[-1] == {"iteration": 3, "bbox/AP": 50.0}


def test_writer_that_fails_does_not_keep_others_open():
    bad, good = Recorder(fail=True), Recorder()
    with pytest.raises(OSError, match="disk full"):
        train(0, hooks.PeriodicWriter([bad, good]))
    assert bad.calls == good.calls == [0, "closed"]


def test_something_else_than_a_writer_is_an_error():
    with pytest.raises(TypeError, match="must derive from EventWriter, got str"):
        hooks.PeriodicWriter(["metrics.json"])


def test_period_below_one_is_an_error():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        hooks.PeriodicWriter([], period=0)


def test_states_find_their_writers_among_others():
    class Counter(Recorder):
        def state_dict(self):
            return {"calls": len(self.calls)}

        def load_state_dict(self, state_dict):
            self.loaded = state_dict["calls"]

    first, second = Counter(), Counter()
    train(
        3,
        hooks.PeriodicWriter([first], period=1),
        before := hooks.PeriodicWriter([second, Recorder()], period=2),
    )
    after = Counter()
    hooks.PeriodicWriter([Recorder(), after, Recorder()]).load_state_dict(before.state_dict())
    assert after.loaded == len(second.calls)


def test_writers_open_before_the_first_step():
    class Refuses(Recorder):
        def open(self):
            raise OSError("no key")

    steps = []
    with pytest.raises(OSError, match="no key"):
        train(
            3,
            hooks.CallbackHook(after_step=lambda t: steps.append(t.iter)),
            hooks.PeriodicWriter([Refuses()]),
        )
    assert steps == []
