"""What writers are called for, and what is told of skipped images."""

import json
import logging
from pathlib import Path

import pytest

from detkit.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detkit.utils.errors import DataError
from detkit.utils.events import CommonMetricPrinter, EventWriter, JSONWriter, get_event_storage


class Trainer(TrainerBase):
    def run_step(self):
        self.storage.put_scalar("loss", float(self.iter))


class LossTrainer(TrainerBase):
    def run_step(self):
        self.storage.put_scalar("total_loss", float(self.iter))


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


@pytest.mark.parametrize(("start", "shown"), [(0, [1, 20, 25]), (20, [21, 25]), (24, [25])])
def test_console_has_the_first_iteration_at_once_and_files_do_not(start, shown, tmp_path, caplog):
    trainer, file = LossTrainer(), tmp_path / "metrics.json"
    writers = [CommonMetricPrinter(25), JSONWriter(str(file))]
    trainer.register_hooks([hooks.PeriodicWriter(writers)])
    with caplog.at_level(logging.INFO, logger="detkit.utils.events"):
        trainer.train(start, 25)
    lines = [m for m in caplog.messages if m.startswith("iter: ")]
    assert [int(line[6:].split("/")[0]) for line in lines] == shown
    written = [json.loads(line)["iteration"] + 1 for line in file.read_text().splitlines()]
    assert written == [i for i in shown if i != start + 1 or i == 25]


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


def test_loading_an_earlier_checkpoint_at_the_end_keeps_the_lines(tmp_path):
    class BackToTheBest(HookBase):
        def after_train(self):
            writer.load_state_dict({"JSONWriter#1": {"last_write": 0}})

    file = tmp_path / "metrics.json"
    writer = hooks.PeriodicWriter([JSONWriter(str(file))], period=1)
    measures = hooks.CallbackHook(after_step=lambda t: t.storage.put_scalar("loss", 1.0))
    train(3, measures, BackToTheBest(), writer)
    assert len(file.read_text().splitlines()) == 3


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


class FailingTrainer(TrainerBase):
    def run_step(self):
        if self.iter == 3:
            raise OSError("disk full")


class Loader:
    def __init__(self, skipped):
        self.skipped = skipped


def messages_of(loader, caplog, iterations=2):
    trainer = FailingTrainer()
    trainer.register_hooks([hooks.SkippedImages(loader)])
    with caplog.at_level(logging.INFO):
        trainer.train(0, iterations)
    return [record.message for record in caplog.records if "skipped" in record.message]


def test_summary_names_each_image_and_counts(caplog):
    (message,) = messages_of(Loader({"b.jpg is empty": 1, "a.jpg does not exist": 3}), caplog)
    assert "2 images were skipped in training, 4 times in all" in message
    assert message.splitlines()[1:] == ["3 times: a.jpg does not exist", "1 times: b.jpg is empty"]


def test_long_list_is_cut_with_its_length(caplog):
    (message,) = messages_of(Loader({f"{k}.jpg is empty": 1 for k in range(130)}), caplog)
    assert len(message.splitlines()) == 102
    assert message.endswith("... and 30 others, which were named when they first came")


@pytest.mark.parametrize("loader", [Loader({}), object()], ids=["none", "own loader"])
def test_nothing_skipped_is_said_too(caplog, loader):
    assert messages_of(loader, caplog) == ["no image was skipped (DATALOADER.ON_BAD_IMAGE)"]


def test_run_that_fails_has_no_summary(caplog):
    with pytest.raises(OSError):
        messages_of(Loader({"a": 1}), caplog, iterations=5)
    assert not [record for record in caplog.records if "skipped" in record.message]


def test_trainer_counts_over_a_resume(tiny_cfg, tmp_path, caplog):
    tiny_cfg.DATASETS.TEST, tiny_cfg.DATALOADER.ON_BAD_IMAGE = (), "skip"
    bad = tmp_path / "data" / "images" / "0.png"
    bad.write_bytes(b"")
    DefaultTrainer(tiny_cfg).train()
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    summaries = [
        record.message for record in caplog.records if "skipped in training" in record.message
    ]
    assert len(summaries) == 2
    assert summaries[0] == summaries[1]
    assert f"{bad} is empty" in summaries[0]


def test_evaluation_skips_nothing(tiny_cfg, tmp_path):
    tiny_cfg.DATALOADER.ON_BAD_IMAGE = "skip"
    (tmp_path / "data" / "images" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 6 images .*tiny_val.*0\.png is empty"):
        DefaultTrainer(tiny_cfg)


def test_step_that_fails_has_no_line_of_metrics(caplog):
    def fail(trainer):
        raise ValueError("no such thing")

    trainer = LossTrainer()
    writing = hooks.PeriodicWriter([CommonMetricPrinter(9)], period=2)
    trainer.register_hooks([hooks.CallbackHook(before_step=fail), writing])
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match="no such thing"):
        trainer.train(0, 9)
    assert not any(message.startswith("iter: ") for message in caplog.messages)
