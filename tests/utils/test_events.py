import gc
import io
import itertools
import json
import shutil
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detkit.utils.events import (
    CommonMetricPrinter,
    EventStorage,
    JSONWriter,
    ProgressBar,
    TensorboardXWriter,
    get_event_storage,
    has_event_storage,
    peak_memory_mb,
    progress_bar,
)
from detkit.utils.logger import setup_logger


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_long_run_keeps_the_last_values_and_the_mean_of_all():
    with EventStorage() as storage:
        for iteration in range(10_050):
            storage.put_scalar("loss", float(iteration < 100), cur_iter=iteration)
        history = storage.history("loss")
        assert len(history.values()) == 10_000
        assert history.values()[0] == (1.0, 50)
        assert history.global_avg() == pytest.approx(100 / 10_050)


def test_no_storage_outside_a_block():
    assert not has_event_storage()
    with pytest.raises(RuntimeError, match="needs an active EventStorage"):
        get_event_storage()


def test_innermost_storage_is_active():
    with EventStorage() as outer:
        with EventStorage() as inner:
            assert get_event_storage() is inner
        assert get_event_storage() is outer


def test_scalars_keep_their_iteration():
    with EventStorage(5) as storage:
        storage.put_scalar("a", 1.0)
        storage.step()
        storage.put_scalars(a=3.0, b=torch.tensor([2.0]))
        assert storage.latest() == {"a": (3.0, 6), "b": (2.0, 6)}
        assert storage.history("a").values() == [(1.0, 5), (3.0, 6)]


def test_tensor_is_read_as_it_was_when_put():
    with EventStorage() as storage:
        value = torch.tensor(1.0)
        storage.put_scalar("a", value)
        value += 5
        assert storage.latest()["a"] == (1.0, 0)


def test_tensor_of_several_elements_is_refused():
    with (
        EventStorage() as storage,
        pytest.raises(ValueError, match=r"scalar 'a' must have one element, got shape \(2,\)"),
    ):
        storage.put_scalar("a", torch.zeros(2))


def test_median_is_that_of_the_last_iterations(tmp_path):
    with EventStorage() as storage:
        writer = JSONWriter(str(tmp_path / "metrics.json"), window_size=10)
        for iteration in range(20):
            for period in (1, 2, 5):
                if (iteration + 1) % period == 0:
                    storage.put_scalar(f"every_{period}", iteration)
            if (iteration + 1) % 10 == 0:
                writer.write()
            storage.step()
        writer.close()
        assert [storage.count_samples(f"every_{period}", 10) for period in (1, 2, 5)] == [10, 5, 2]
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [[row[f"every_{period}"] for period in (1, 2, 5)] for row in rows] == [
        [4.5, 5.0, 6.5],
        [14.5, 15.0, 16.5],
    ]


def test_smoothing_hint_chooses_median_or_last():
    with EventStorage() as storage:
        for value in (1.0, 2.0, 30.0):
            storage.put_scalar("loss", value)
            storage.put_scalar("lr", value, smoothing_hint=False)
        shown = storage.latest_with_smoothing_hint(3)
        assert (shown["loss"][0], shown["lr"][0]) == (2.0, 30.0)
        with pytest.raises(ValueError, match="was put with smoothing_hint=False before"):
            storage.put_scalar("lr", 1.0)


def test_name_scope_is_a_prefix():
    with EventStorage() as storage:
        with storage.name_scope("rpn"):
            storage.put_scalar("pos", 1)
        storage.put_scalar("pos", 2)
        assert set(storage.latest()) == {"rpn/pos", "pos"}


def test_unknown_history_is_refused():
    with EventStorage() as storage, pytest.raises(KeyError, match="no scalar 'x' was put"):
        storage.history("x")


def test_json_lines_hold_each_iteration_once(tmp_path):
    path = tmp_path / "deep" / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage() as storage:
        storage.put_scalar("a", 1.0)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("a", 2.0, smoothing_hint=True)
        storage.put_scalar("late", 7.0, cur_iter=3)
        writer.write()
    writer.close()
    assert lines(path) == [
        {"iteration": 0, "a": 1.0},
        {"iteration": 1, "a": 1.5},
        {"iteration": 3, "late": 7.0},
    ]


def test_json_is_strict(tmp_path):
    path = tmp_path / "metrics.json"
    with EventStorage() as storage:
        storage.put_scalars(a=float("nan"), b=float("inf"), c=1.0)
        JSONWriter(str(path)).write()
    assert lines(path) == [{"iteration": 0, "a": None, "b": None, "c": 1.0}]


def test_console_line_has_losses_rate_time_and_memory(caplog):
    with EventStorage(9) as storage, caplog.at_level("INFO", logger="detkit.utils.events"):
        storage.put_scalars(total_loss=1.5, loss_cls=1.0, time=0.5, data_time=0.1)
        storage.put_scalar("fast_rcnn/loss_like", 3.0)
        storage.put_scalar("lr", 0.01, smoothing_hint=False)
        CommonMetricPrinter(max_iter=20).write()
    line = caplog.messages[-1]
    for part in (
        "iter: 10/20",
        "eta: 0:00:05",
        "total_loss: 1.5",
        "loss_cls: 1",
        "time: 0.5000s",
        "lr: 0.01",
        "max_mem: ",
    ):
        assert part in line
    assert "fast_rcnn" not in line


def test_console_is_silent_after_the_last_iteration(caplog):
    with EventStorage(20), caplog.at_level("INFO", logger="detkit.utils.events"):
        CommonMetricPrinter(max_iter=20).write()
    assert caplog.messages == []


def test_console_measures_time_itself_without_a_timing_hook(caplog):
    printer = CommonMetricPrinter(max_iter=100)
    with EventStorage() as storage, caplog.at_level("INFO", logger="detkit.utils.events"):
        printer.write()
        storage.step()
        printer.write()
        assert "eta" not in caplog.messages[0]
        assert "eta" in caplog.messages[1]
        assert storage.latest()["eta_seconds"][0] > 0
    assert printer._last_write[0] == 1  # which printers written for Detectron2 read


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = TensorboardXWriter(str(tmp_path), filename_suffix=".own")
    with EventStorage() as storage:
        storage.put_scalar("a", 4.0)
        storage.put_scalar("AP-\x1b[2J\n\ud800", 0.5)  # a class of a hostile file
        storage.put_image("p", torch.zeros(3, 8, 8, dtype=torch.uint8))
        writer.write()
        assert storage.images() == []
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Scalars("a")[0].value == 4.0
    assert events.Scalars("AP-\\x1b[2J\\n\\ud800")[0].value == 0.5
    assert events.Tags()["images"] == ["p"]
    assert list(tmp_path.glob("*.own"))


def test_tensorboard_begins_anew_where_its_folder_was_deleted(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    writer = TensorboardXWriter(str(folder))
    with EventStorage(0) as storage:
        for storage.iter in range(3):
            storage.put_scalar("a", 1.0)
            writer.write()
            if storage.iter == 0:
                writer._writer.flush()  # its thread writes, too
                shutil.rmtree(folder)
    writer.close()
    assert [e.step for e in EventAccumulator(str(folder)).Reload().Scalars("a")] == [1, 2]
    assert caplog.text.count("were deleted") == 1


def test_progress_bar_is_silent_when_output_is_no_terminal(capsys):
    with EventStorage(3):
        bar = ProgressBar(10)
        bar.open()
        bar.write()
        bar.close()
    assert capsys.readouterr() == ("", "")


def test_peak_memory_is_plausible():
    assert 10 < peak_memory_mb() < 1e6


def write_rows(path, iterations, writer=None):
    writer = writer or JSONWriter(str(path))
    with EventStorage() as storage:
        for storage.iter in iterations:
            storage.put_scalar("a", float(storage.iter), smoothing_hint=False)
            writer.write()
    return writer


def test_rows_behind_a_position_are_taken_back(tmp_path):
    path = tmp_path / "m.json"
    state = write_rows(path, range(3)).state_dict()
    write_rows(path, range(3, 5)).close()
    with path.open("a") as file:
        file.write('{"iteration": 5, "a"')  # what a kill leaves
    resumed = JSONWriter(str(path))
    resumed.load_state_dict(state)
    assert [row["iteration"] for row in lines(path)] == [0, 1, 2]
    write_rows(path, range(3, 6), resumed).close()
    assert [row["iteration"] for row in lines(path)] == list(range(6))


def test_position_of_rows_that_somebody_deleted_is_no_error(tmp_path):
    resumed = JSONWriter(str(tmp_path / "m.json"))
    resumed.load_state_dict({"last_write": 7})
    assert not (tmp_path / "m.json").exists()


def test_storage_goes_on_with_the_values_of_its_medians():
    with EventStorage() as first:
        for first.iter in range(30):
            first.put_scalar("loss", float(first.iter % 7))
            first.put_scalar("lr", 0.5, smoothing_hint=False)
        state = first.state_dict()
        expected = first.latest_with_smoothing_hint()
    with EventStorage(30) as second:
        second.load_state_dict(state)
        assert second.latest_with_smoothing_hint() == expected
        assert [i for _, i in second.history("loss").values()] == list(range(10, 30))
        with pytest.raises(ValueError, match="was put with smoothing_hint=False before"):
            second.put_scalar("lr", 1.0)


def test_tensorboard_of_a_resumed_run_shows_each_step_once(tmp_path, monkeypatch):
    # TensorBoard reads the files in the order of the seconds in their names.
    seconds = itertools.count(1000)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def write(writer, iterations, factor):
        with EventStorage(0) as storage:
            for storage.iter in iterations:
                storage.put_scalar("a", factor * storage.iter, smoothing_hint=False)
                writer.write()
        writer.close()

    first = TensorboardXWriter(str(tmp_path))
    write(first, [0, 1], 1.0)
    write(TensorboardXWriter(str(tmp_path)), [2, 3], 5.0)  # after the checkpoint, before the kill
    again = TensorboardXWriter(str(tmp_path))
    again.load_state_dict(first.state_dict())
    write(again, [2, 3, 4], 1.0)
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("a")
    assert [(event.step, event.value) for event in shown] == [(i, float(i)) for i in range(5)]


def test_pictures_that_nobody_writes_do_not_pile_up():
    with EventStorage(0) as storage:
        for storage.iter in range(1000):
            storage.put_image("p", None)
        assert [iteration for _, _, iteration in storage.images()] == list(range(968, 1000))


def test_tensors_that_nobody_asks_for_do_not_pile_up():
    def num_tensors():
        return sum(type(item) is torch.Tensor for item in gc.get_objects())

    gc.collect()
    storage, before = EventStorage(0), num_tensors()
    for storage.iter in range(15_000):
        storage.put_scalar(f"loss_{storage.iter % 2}", torch.ones(()))
    assert num_tensors() - before <= 10_000
    assert [len(history.values()) for history in storage.histories().values()] == [7_500, 7_500]


def test_console_shows_the_epoch_and_what_fits(capsys):
    setup_logger()
    losses = {f"loss_cls_stage{i}": 0.123456 for i in range(9)}
    with EventStorage(19) as storage:
        storage.put_scalars(total_loss=1.5, time=0.5, **losses)
        storage.put_scalar("lr", 0.01, smoothing_hint=False)
        CommonMetricPrinter(max_iter=90000, iterations_per_epoch=80).write()
    line = capsys.readouterr().out.rstrip("\n")
    assert "iter: 20/90000  epoch: 0.25  eta: 12:29:50  total_loss: 1.5  cls_stage0: 0.12" in line
    assert len(line) <= 120


DAMAGES = [
    pytest.param(b"\xff\xfe\x00\n", id="not UTF-8"),
    pytest.param(b"\0" * 100, id="zeros"),
    pytest.param(b'{"iteration": "3"}\n', id="text"),
    pytest.param(b'{"iteration": null}\n', id="null"),
    pytest.param(b'{"iteration": true}\n', id="boolean"),
    pytest.param(b'{"iteration": NaN}\n', id="nan"),
    pytest.param(b"[1]\n3\n", id="no object"),
    pytest.param(b"[" * 100000 + b"\n", id="deep"),
    pytest.param(b'{"iteration": 1, "a', id="cut off"),
]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("place", ["before", "behind"])
def test_damaged_lines_are_dropped_when_a_run_goes_on(tmp_path, damage, place):
    path = tmp_path / "metrics.json"
    damage = damage.rstrip(b"\n") + b"\n"
    good = '{"a": "größe \u2028", "iteration": 1}\n'.encode()
    path.write_bytes(damage + good if place == "before" else good + damage)
    JSONWriter(str(path)).load_state_dict({"last_write": 5})
    assert path.read_bytes() == good


def test_deleted_file_begins_anew(tmp_path, caplog):
    path = tmp_path / "run" / "metrics.json"
    writer = JSONWriter(str(path))
    with EventStorage(0) as storage:
        for storage.iter in range(3):
            storage.put_scalar("a", 1.0)
            writer.write()
            if storage.iter == 1:
                shutil.rmtree(tmp_path / "run")
    writer.close()
    assert json.loads(path.read_text()) == {"iteration": 2, "a": 1.0}
    assert "metrics.json was deleted" in caplog.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_is_shown_on_a_terminal_only(is_terminal, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal() if is_terminal else io.StringIO())
    assert list(progress_bar([1, 2], desc="images")) == [1, 2]
    assert ("images: 100%" in sys.stdout.getvalue()) == is_terminal


def test_histograms_are_kept_until_they_are_written(tmp_path):
    with EventStorage(3) as storage:
        with storage.name_scope("net"):
            storage.put_histogram("weights", torch.arange(50.0, requires_grad=True), bins=8)
        (kept,) = storage.histograms()
        assert (kept["tag"], kept["num"], kept["global_step"]) == ("net/weights", 50, 3)
        assert (kept["min"], kept["max"], kept["sum"], kept["sum_squares"]) == (0, 49, 1225, 40425)
        assert (len(kept["bucket_counts"]), sum(kept["bucket_counts"])) == (8, 50)
        assert kept["bucket_limits"][-1] == 49
        writer = TensorboardXWriter(str(tmp_path))
        writer.write()
        writer.close()
        assert storage.histograms() == []
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert events.Tags()["histograms"] == ["net/weights"]
    assert sum(events.Histograms("net/weights")[0].histogram_value.bucket) == 50


def test_writers_of_subclasses_find_what_detectron2s_have(tmp_path):
    class Lines(JSONWriter):
        def write(self):
            self._file_handle.write('{"step": 7}\n')
            self._file_handle.flush()

    class Board(TensorboardXWriter):
        def write(self):
            for name, image, iteration in get_event_storage()._vis_data:
                self._writer.add_image(name, image, iteration)
            for histogram in get_event_storage()._histograms:
                self._writer.add_histogram_raw(**histogram)

    writers = [Lines(str(tmp_path / "m.json")), Board(str(tmp_path))]
    with EventStorage(4) as storage:
        storage.put_image("picture", torch.rand(3, 4, 4))
        storage.put_histogram("values", torch.rand(9))
        for writer in writers:
            writer.write()
            writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload().Tags()
    assert (events["images"], events["histograms"]) == (["picture"], ["values"])
    again = Lines(str(tmp_path / "m.json"))
    again.load_state_dict({"last_write": 3})
    assert (tmp_path / "m.json").read_text() == '{"step": 7}\n'


def test_scalars_marked_as_metrics_are_printed(caplog):
    with EventStorage() as storage, caplog.at_level("INFO", logger="detkit.utils.events"):
        storage.put_scalars(**{"[metric]stat": 1.5, "other": 2.5})
        CommonMetricPrinter(10).write()
        storage.put_scalar("rate", 0.1, smoothing_hint=False)
        assert storage.smoothing_hints()["rate"] is False
        assert storage.smoothing_hints()["other"] is True
    assert "[metric]stat: 1.5" in caplog.text
    assert "other" not in caplog.text


def test_overridden_remaining_time_is_shown(caplog):
    class Fixed(CommonMetricPrinter):
        def _get_eta(self, storage):
            return f"after {super()._get_eta(storage)}"

    with EventStorage(1) as storage, caplog.at_level("INFO"):
        storage.put_scalar("time", 2.0)
        Fixed(5).write()
        assert storage.latest()["eta_seconds"][0] == 6.0
    assert "eta: after 0:00:06" in caplog.text


def test_writer_of_tensorboard_is_there_when_it_is_asked_for(tmp_path):
    writer = TensorboardXWriter(str(tmp_path))
    writer.close()
    assert list(tmp_path.iterdir()) == []
    writer._writer.add_scalar("a", 2.0, 1)
    writer.close()
    assert EventAccumulator(str(tmp_path)).Reload().Scalars("a")[0].value == 2.0
