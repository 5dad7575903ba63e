"""Runs of Weights and Biases, and of MLflow: what they get, and how a resumed run goes on."""

import logging
import os
import re
import struct
import subprocess
import sys
from collections import namedtuple
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from detkit.engine import DefaultTrainer
from detkit.engine.writers import MlflowWriter, WandbWriter
from detkit.utils.events import EventStorage

ENVIRONMENT = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE", "WANDB_RUN_ID")


class WandbRun:
    """What the writer uses of wandb's run. Its rows are where wandb keeps them: on a server, or in a folder's files."""

    def __init__(self, rows, settings, offline):
        self.rows, self.settings, self.offline = rows, settings, offline
        self.id = settings["id"]
        self.step = 0 if offline else max([step + 1 for step, _ in rows], default=0)
        self.exit_code = None

    def log(self, scalars, step, commit):
        assert commit
        self.rows.append((step, scalars))

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture(params=[False, True], ids=["online", "offline"])
def wandb(request, monkeypatch):
    """The module, with all runs by id, and the latest run object."""
    module = ModuleType("wandb")
    module.rows, module.run, module.offline = {}, None, request.param

    def init(**settings):
        settings["id"] = settings["id"] or f"run{len(module.rows)}"
        module.run = WandbRun(module.rows.setdefault(settings["id"], []), settings, request.param)
        return module.run

    module.init = init
    module.__spec__ = ModuleSpec(
        "wandb", None, origin="here"
    )  # there is a package, as far as find_spec can see
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return module


def write_to_wandb(writer, iterations):
    with EventStorage(0) as storage:
        for storage.iter in iterations:
            storage.put_scalars(a=0.5 * storage.iter, smoothing_hint=False)
            writer.write()


def test_scalars_come_by_iteration_with_the_settings(wandb, tmp_path):
    writer = WandbWriter(str(tmp_path / "night"), {"SOLVER": {"BASE_LR": 0.1}})
    with EventStorage(0) as storage:
        storage.put_scalars(loss=1.0, cur_iter=4)
        storage.put_scalars(loss_cls=3.0, cur_iter=2)
        writer.write()
        writer.write()
    writer.close()
    assert wandb.run.rows == [(2, {"loss_cls": 3.0}), (4, {"loss": 1.0})]
    assert wandb.run.settings["config"] == {"SOLVER": {"BASE_LR": 0.1}}
    assert (wandb.run.settings["project"], wandb.run.settings["name"]) == ("detkit", "night")
    assert wandb.run.exit_code == 0


def test_variables_of_wandb_say_where_a_run_goes(wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    monkeypatch.setenv("WANDB_NAME", "first")
    WandbWriter(str(tmp_path)).open()
    assert (wandb.run.settings["project"], wandb.run.settings["name"]) == ("birds", "first")


def test_wandb_resumed_run_is_the_same_one_and_leaves_out_what_was_logged_behind_the_checkpoint(
    wandb, tmp_path
):
    first = WandbWriter(str(tmp_path))
    write_to_wandb(first, [0, 1])
    state = first.state_dict()
    write_to_wandb(first, [2, 3])  # then killed
    again = WandbWriter(str(tmp_path))
    again.load_state_dict(state)
    again.open()
    write_to_wandb(again, [2, 3, 4])
    assert wandb.run.settings["resume"] == "allow"
    assert {run_id: [step for step, _ in rows] for run_id, rows in wandb.rows.items()} == {
        "run0": [0, 1, 2, 3, 4]
    }


def test_wandb_run_without_checkpoint_begins_another_one(wandb, tmp_path):
    write_to_wandb(WandbWriter(str(tmp_path)), [0, 1])
    write_to_wandb(WandbWriter(str(tmp_path)), [0, 1])
    assert [len(rows) for rows in wandb.rows.values()] == [2, 2]


def test_wandb_run_that_fails_is_shown_as_failed(wandb, tmp_path):
    writer = WandbWriter(str(tmp_path))
    writer.open()
    try:
        raise OSError("disk full")
    except OSError:
        writer.close()
    assert wandb.run.exit_code == 1


def test_wandb_trainer_logs_to_it_and_resumes_without_duplicates(wandb, tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.WRITERS = (), ["wandb"]
    DefaultTrainer(tiny_cfg).train()
    whole = [step for step, _ in wandb.rows["run0"]]
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert list(wandb.rows) == ["run0"]
    assert [step for step, _ in wandb.rows["run0"]] == whole
    assert wandb.run.settings["config"]["SOLVER"]["MAX_ITER"] == tiny_cfg.SOLVER.MAX_ITER


@pytest.mark.slow
def test_offline_files_of_wandb_itself_hold_each_step_once(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = """if True:
        import sys, torch
        from detkit.engine.writers import WandbWriter
        from detkit.utils.events import EventStorage
        folder, first, last = sys.argv[1], *map(int, sys.argv[2:4])
        writer = WandbWriter(folder, {"A": {"B": (1, 2)}})
        if first:
            writer.load_state_dict(torch.load(folder + "/state.pth", weights_only=True))
        writer.open()
        with EventStorage(0) as storage:
            for storage.iter in range(first, last):
                storage.put_scalars(loss=storage.iter, ap=float("nan"))
                writer.write()
                if storage.iter == 2:
                    torch.save(writer.state_dict(), folder + "/state.pth")
        writer.close()
    """
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for words in (("0", "6"), ("3", "9")):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), *words], env=environment, check=True
        )
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1  # of one id
    assert [step for file in files for step in steps_in(file)] == list(range(9))


def steps_in(path):
    """The steps in a file of wandb's: a log of records in the format of LevelDB, each a protocol buffer."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, begun, steps = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        begun += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, begun = Record.FromString(begun), b""
            steps += [record.history.step.num] if record.HasField("history") else []
    return steps


Metric = namedtuple("Metric", "key value timestamp step")
Param = namedtuple("Param", "key value")


class FakeError(Exception):
    pass


class MlflowRun:
    def __init__(self, run_id, name):
        self.info = SimpleNamespace(run_id=run_id)
        self.name, self.params, self.metrics = name, {}, []

    @property
    def data(self):
        return SimpleNamespace(metrics={metric.key: metric.value for metric in self.metrics})


class MlflowClient:
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
def mlflow(monkeypatch):
    """The module with all runs by id; their store gives nothing back and takes everything."""
    module = ModuleType("mlflow")
    module.runs, module.ended = {}, []

    def start_run(run_id, run_name):
        run_id = run_id or f"run{len(module.runs)}"
        return module.runs.setdefault(run_id, MlflowRun(run_id, run_name))

    module.start_run, module.end_run = start_run, module.ended.append
    module.MlflowClient = MlflowClient(module.runs)
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


def write_to_mlflow(writer, iterations, names=("a",)):
    with EventStorage(0) as storage:
        for storage.iter in iterations:
            storage.put_scalars(**dict.fromkeys(names, 0.5 * storage.iter))
            writer.write()


def found(run):
    return [(metric.step, metric.key) for metric in run.metrics]


def test_scalars_and_settings_come_to_one_run(mlflow, tmp_path):
    writer = MlflowWriter(
        str(tmp_path / "night"), {"SOLVER": {"BASE_LR": 0.1, "STEPS": [1, 2]}, "SEED": -1}
    )
    write_to_mlflow(writer, [0, 2], ["loss", "bbox/AP"])
    writer.close()
    (run,) = mlflow.runs.values()
    assert run.name == "night"
    assert run.params == {"SOLVER.BASE_LR": "0.1", "SOLVER.STEPS": "[1, 2]", "SEED": "-1"}
    assert sorted(found(run)) == [(0, "bbox/AP"), (0, "loss"), (2, "bbox/AP"), (2, "loss")]
    assert mlflow.ended == ["FINISHED"]


def test_name_of_a_run_may_come_from_the_environment(mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_NAME", "first")
    MlflowWriter(str(tmp_path)).open()
    assert mlflow.runs["run0"].name == "first"


def test_many_scalars_and_settings_come_in_several_requests(mlflow, tmp_path):
    names = [f"AP-{k}" for k in range(250)]
    write_to_mlflow(MlflowWriter(str(tmp_path), dict.fromkeys(names, 1)), [0], names)
    assert len(mlflow.runs["run0"].metrics) == len(mlflow.runs["run0"].params) == 250


def test_class_names_of_any_characters_stay_apart(mlflow, tmp_path):
    write_to_mlflow(MlflowWriter(str(tmp_path)), [0], ["AP-a+b", "AP-a&b", "AP-人"])
    assert len({key for _, key in found(mlflow.runs["run0"])}) == 3


def test_mlflow_resumed_run_is_the_same_one_and_leaves_out_what_was_logged_behind_the_checkpoint(
    mlflow, tmp_path
):
    first = MlflowWriter(str(tmp_path), {"A": 1})
    write_to_mlflow(first, [0, 1])
    state = first.state_dict()
    write_to_mlflow(first, [2, 3])
    mlflow.runs["run0"].metrics.append(
        Metric("b", 0.0, 0, 2)
    )  # killed between the two scalars of a step
    again = MlflowWriter(str(tmp_path), {"A": 2})
    again.load_state_dict(state)
    again.open()
    write_to_mlflow(again, [2, 3, 4], ["a", "b"])
    assert list(mlflow.runs) == ["run0"]
    expected = [*((step, "a") for step in range(5)), *((step, "b") for step in (2, 3, 4))]
    assert sorted(found(mlflow.runs["run0"]), key=lambda m: (m[1], m[0])) == expected
    assert mlflow.runs["run0"].params == {"A": "1"}  # MLflow refuses another value


def test_mlflow_run_without_checkpoint_begins_another_one(mlflow, tmp_path):
    for _ in range(2):
        write_to_mlflow(MlflowWriter(str(tmp_path)), [0, 1])
    assert [len(run.metrics) for run in mlflow.runs.values()] == [2, 2]


def test_server_that_fails_does_not_end_the_training(mlflow, tmp_path, caplog):
    writer = MlflowWriter(str(tmp_path))
    writer.open()
    mlflow.MlflowClient.fails = True
    with caplog.at_level(logging.WARNING):
        write_to_mlflow(writer, [7])
    assert "MLflow did not take the metrics up to iteration 7: no connection" in caplog.text
    mlflow.MlflowClient.fails = False
    write_to_mlflow(writer, [8])
    assert found(mlflow.runs["run0"]) == [(8, "a")]


def test_server_that_fails_at_the_start_is_an_error(mlflow, tmp_path):
    mlflow.MlflowClient.fails = True
    with pytest.raises(FakeError, match="no connection"):
        MlflowWriter(str(tmp_path), {"A": 1}).open()


def test_mlflow_run_that_fails_is_shown_as_failed(mlflow, tmp_path):
    writer = MlflowWriter(str(tmp_path))
    writer.open()
    try:
        raise OSError("disk full")
    except OSError:
        writer.close()
    assert mlflow.ended == ["FAILED"]


def test_mlflow_trainer_logs_to_it_and_resumes_without_duplicates(mlflow, tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.WRITERS = (), ["mlflow"]
    DefaultTrainer(tiny_cfg).train()
    whole = found(mlflow.runs["run0"])
    assert mlflow.runs["run0"].params["SOLVER.MAX_ITER"] == str(tiny_cfg.SOLVER.MAX_ITER)
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert list(mlflow.runs) == ["run0"]
    assert found(mlflow.runs["run0"]) == whole


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite:///{}/runs.db", "file:{}/runs"])
def test_store_of_mlflow_itself_holds_each_step_once(tmp_path, monkeypatch, store):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(store.format(tmp_path))
    first = MlflowWriter(str(tmp_path), {"A": {"B": [1, 2]}})
    write_to_mlflow(first, [0, 1], ["a", "bbox/AP-x+y"])
    state = first.state_dict()
    write_to_mlflow(first, [2, 3], ["a", "bbox/AP-x+y"])
    mlflow.end_run("KILLED")
    again = MlflowWriter(str(tmp_path), {"A": {"B": [1, 3]}})
    again.load_state_dict(state)
    again.open()
    write_to_mlflow(again, [2, 3, 4], ["a", "bbox/AP-x+y"])
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
