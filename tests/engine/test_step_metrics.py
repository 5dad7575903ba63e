import pytest

from detkit.engine.step_metrics import StepMetrics, mean_by_name
from detkit.utils import comm
from detkit.utils.events import EventStorage


def test_metrics_of_all_processes_are_averaged_and_filed_under_their_own_iteration(monkeypatch):
    other = [
        (0, {"loss_a": 3.0, "loss_b": 0.0, "data_time": 9.0}),
        (1, {"loss_a": 5.0, "data_time": 9.0}),
    ]
    monkeypatch.setattr(comm, "gather", lambda mine: [mine, other])
    storage, metrics = EventStorage(0), StepMetrics()
    metrics.put(0, {"loss_a": 1.0, "loss_b": 2.0}, 0.1)
    metrics.put(1, {"loss_a": 1.0, "loss_b": 4.0}, 0.1)
    assert storage.latest() == {}
    metrics.gather(storage)
    assert storage.history("loss_a").values() == [(2.0, 0), (3.0, 1)]
    assert storage.history("loss_b").values() == [(1.0, 0), (4.0, 1)]
    assert storage.history("total_loss").values() == [(3.0, 0), (7.0, 1)]
    assert storage.latest()["data_time"] == (9.0, 1)
    assert metrics.state() == []


def test_process_that_gets_nothing_forgets_what_it_gave(monkeypatch):
    monkeypatch.setattr(comm, "gather", lambda mine: [])
    storage, metrics = EventStorage(0), StepMetrics()
    metrics.put(0, {"loss": 1.0}, 0.1)
    metrics.gather(storage)
    assert storage.latest() == {}
    assert metrics.state() == []


def test_single_loss_is_the_total():
    storage, metrics = EventStorage(0), StepMetrics()
    metrics.put(4, {"val_loss": 1.5}, 0.1)
    metrics.gather(storage, "val_")
    assert sorted(storage.latest()) == ["data_time", "val_total_loss"]
    assert storage.latest()["val_total_loss"] == (1.5, 4)


def test_what_was_not_gathered_goes_on():
    first, second, storage = StepMetrics(), StepMetrics(), EventStorage(0)
    first.put(2, {"loss": 3.0}, 0.1)
    second.load_state(first.state())
    second.gather(storage)
    assert storage.latest()["total_loss"] == (3.0, 2)


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([], {}),
        ([{"a": 1.0}], {"a": 1.0}),
        ([{"a": 1.0, "b": 2.0}, {"a": 3.0}], {"a": 2.0, "b": 2.0}),
    ],
)
def test_mean_is_over_those_that_have_the_value(values, mean):
    assert mean_by_name(values) == mean
