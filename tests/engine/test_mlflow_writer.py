import logging
import re
import sys
from collections import namedtuple
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from detkit.engine import DefaultTrainer
from detkit.engine.mlflow_writer import MlflowWriter
from detkit.utils.events import EventStorage

Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")


class FakeError(Exception):
    pass


class FakeRun:
    def __init__(self, run_id, name):
        self.info = SimpleNamespace(run_id=run_id)
        self.name, self.params, self.metrics = name, {}, []

    @property
    def data(self):
        return SimpleNamespace(metrics={metric.key: metric.value for metric in self.metrics})


class FakeClient:
    def __init__(self, runs):
        self.runs = runs
        self.fails = False

    def __call__(self):
        return self

    def log_batch(self, run_id, metrics=(), params=()):
        assert len(metrics) + len(params) <= 100
        if self.fails:
            raise FakeError("no connection")
        assert all(re.fullmatch(r"[/\w.\- ]+", entry.key) for entry in (*metrics, *params))
        self.runs[run_id].metrics += metrics
        self.runs[run_id].params.update(params)

    def get_metric_history(self, run_id, key):
        return [metric for metric in self.runs[run_id].metrics if metric.key == key]


@pytest.fixture
def fake(monkeypatch):
    """The module with all runs by id; their store gives nothing back and takes everything."""
    module = ModuleType("mlflow")
    module.runs, module.ended = {}, []

    def start_run(run_id, run_name):
        run_id = run_id or f"run{len(module.runs)}"
        return module.runs.setdefault(run_id, FakeRun(run_id, run_name))

    module.start_run, module.end_run = start_run, module.ended.append
    module.MlflowClient = FakeClient(module.runs)
    module.entities, module.exceptions = (
        ModuleType("mlflow.entities"),
        ModuleType("mlflow.exceptions"),
    )
    module.entities.Metric, module.entities.Param, module.exceptions.MlflowException = (
        Metric,
        Param,
        FakeError,
    )
    module.__spec__ = ModuleSpec(
        "mlflow", None, origin="here"
    )  # there is a package, as far as find_spec can see
    for part in (module, module.entities, module.exceptions):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.delenv("MLFLOW_RUN_NAME", raising=False)
    return module


def write(writer, iterations, names=("a",)):
    with EventStorage(0) as storage:
        for storage.iter in iterations:
            storage.put_scalars(**dict.fromkeys(names, 0.5 * storage.iter))
            writer.write()


def found(run):
    return [(metric.step, metric.key) for metric in run.metrics]


def test_scalars_and_settings_come_to_one_run(fake, tmp_path):
    writer = MlflowWriter(
        str(tmp_path / "night"), {"SOLVER": {"BASE_LR": 0.1, "STEPS": [1, 2]}, "SEED": -1}
    )
    write(writer, [0, 2], ["loss", "bbox/AP"])
    writer.close()
    (run,) = fake.runs.values()
    assert run.name == "night"
    assert run.params == {"SOLVER.BASE_LR": "0.1", "SOLVER.STEPS": "[1, 2]", "SEED": "-1"}
    assert sorted(found(run)) == [(0, "bbox/AP"), (0, "loss"), (2, "bbox/AP"), (2, "loss")]
    assert fake.ended == ["FINISHED"]


def test_name_of_a_run_may_come_from_the_environment(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_NAME", "first")
    MlflowWriter(str(tmp_path)).open()
    assert fake.runs["run0"].name == "first"


def test_many_scalars_and_settings_come_in_several_requests(fake, tmp_path):
    names = [f"AP-{k}" for k in range(250)]
    write(MlflowWriter(str(tmp_path), dict.fromkeys(names, 1)), [0], names)
    assert len(fake.runs["run0"].metrics) == len(fake.runs["run0"].params) == 250


def test_class_names_of_any_characters_stay_apart(fake, tmp_path):
    write(MlflowWriter(str(tmp_path)), [0], ["AP-a+b", "AP-a&b", "AP-人"])
    assert len({key for _, key in found(fake.runs["run0"])}) == 3


def test_resumed_run_is_the_same_one_and_leaves_out_what_was_logged_behind_the_checkpoint(
    fake, tmp_path
):
    first = MlflowWriter(str(tmp_path), {"A": 1})
    write(first, [0, 1])
    state = first.state_dict()
    write(first, [2, 3])
    fake.runs["run0"].metrics.append(
        Metric("b", 0.0, 0, 2)
    )  # killed between the two scalars of a step
    again = MlflowWriter(str(tmp_path), {"A": 2})
    again.load_state_dict(state)
    again.open()
    write(again, [2, 3, 4], ["a", "b"])
    assert list(fake.runs) == ["run0"]
    expected = [*((step, "a") for step in range(5)), *((step, "b") for step in (2, 3, 4))]
    assert sorted(found(fake.runs["run0"]), key=lambda m: (m[1], m[0])) == expected
    assert fake.runs["run0"].params == {"A": "1"}  # MLflow refuses another value


def test_run_without_checkpoint_begins_another_one(fake, tmp_path):
    for _ in range(2):
        write(MlflowWriter(str(tmp_path)), [0, 1])
    assert [len(run.metrics) for run in fake.runs.values()] == [2, 2]


def test_server_that_fails_does_not_end_the_training(fake, tmp_path, caplog):
    writer = MlflowWriter(str(tmp_path))
    writer.open()
    fake.MlflowClient.fails = True
    with caplog.at_level(logging.WARNING):
        write(writer, [7])
    assert "MLflow did not take the metrics up to iteration 7: no connection" in caplog.text
    fake.MlflowClient.fails = False
    write(writer, [8])
    assert found(fake.runs["run0"]) == [(8, "a")]


def test_server_that_fails_at_the_start_is_an_error(fake, tmp_path):
    fake.MlflowClient.fails = True
    with pytest.raises(FakeError, match="no connection"):
        MlflowWriter(str(tmp_path), {"A": 1}).open()


def test_run_that_fails_is_shown_as_failed(fake, tmp_path):
    writer = MlflowWriter(str(tmp_path))
    writer.open()
    try:
        raise OSError("disk full")
    except OSError:
        writer.close()
    assert fake.ended == ["FAILED"]


def test_trainer_logs_to_it_and_resumes_without_duplicates(fake, tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.WRITERS = (), ["mlflow"]
    DefaultTrainer(tiny_cfg).train()
    whole = found(fake.runs["run0"])
    assert fake.runs["run0"].params["SOLVER.MAX_ITER"] == str(tiny_cfg.SOLVER.MAX_ITER)
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert list(fake.runs) == ["run0"]
    assert found(fake.runs["run0"]) == whole


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite:///{}/runs.db", "file:{}/runs"])
def test_store_of_mlflow_itself_holds_each_step_once(tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(store.format(tmp_path))
    first = MlflowWriter(str(tmp_path), {"A": {"B": [1, 2]}})
    write(first, [0, 1], ["a", "bbox/AP-x+y"])
    state = first.state_dict()
    write(first, [2, 3], ["a", "bbox/AP-x+y"])
    mlflow.end_run("KILLED")
    again = MlflowWriter(str(tmp_path), {"A": {"B": [1, 3]}})
    again.load_state_dict(state)
    again.open()
    write(again, [2, 3, 4], ["a", "bbox/AP-x+y"])
    again.close()
    client = mlflow.MlflowClient()
    run = client.get_run(state["run_id"])
    assert (run.info.status, run.data.params) == ("FINISHED", {"A.B": "[1, 2]"})
    assert len(run.data.metrics) == 2
    for name in run.data.metrics:
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == [
            0,
            1,
            2,
            3,
            4,
        ]
