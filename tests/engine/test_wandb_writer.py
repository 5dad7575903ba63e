import os
import struct
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from detkit.engine import DefaultTrainer
from detkit.engine.wandb_writer import WandbWriter
from detkit.utils.events import EventStorage

ENVIRONMENT = ("WANDB_PROJECT", "WANDB_NAME", "WANDB_MODE", "WANDB_RUN_ID")


class FakeRun:
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
def fake(request, monkeypatch):
    """The module, with all runs by id, and the latest run object."""
    module = ModuleType("wandb")
    module.rows, module.run, module.offline = {}, None, request.param

    def init(**settings):
        settings["id"] = settings["id"] or f"run{len(module.rows)}"
        module.run = FakeRun(module.rows.setdefault(settings["id"], []), settings, request.param)
        return module.run

    module.init = init
    module.__spec__ = ModuleSpec(
        "wandb", None, origin="here"
    )  # there is a package, as far as find_spec can see
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    return module


def write(writer, iterations):
    with EventStorage(0) as storage:
        for storage.iter in iterations:
            storage.put_scalars(a=0.5 * storage.iter, smoothing_hint=False)
            writer.write()


def test_scalars_come_by_iteration_with_the_settings(fake, tmp_path):
    writer = WandbWriter(str(tmp_path / "night"), {"SOLVER": {"BASE_LR": 0.1}})
    with EventStorage(0) as storage:
        storage.put_scalars(loss=1.0, cur_iter=4)
        storage.put_scalars(loss_cls=3.0, cur_iter=2)
        writer.write()
        writer.write()
    writer.close()
    assert fake.run.rows == [(2, {"loss_cls": 3.0}), (4, {"loss": 1.0})]
    assert fake.run.settings["config"] == {"SOLVER": {"BASE_LR": 0.1}}
    assert (fake.run.settings["project"], fake.run.settings["name"]) == ("detkit", "night")
    assert fake.run.exit_code == 0


def test_variables_of_wandb_say_where_a_run_goes(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "birds")
    monkeypatch.setenv("WANDB_NAME", "first")
    WandbWriter(str(tmp_path)).open()
    assert (fake.run.settings["project"], fake.run.settings["name"]) == ("birds", "first")


def test_resumed_run_is_the_same_one_and_leaves_out_what_was_logged_behind_the_checkpoint(
    fake, tmp_path
):
    first = WandbWriter(str(tmp_path))
    write(first, [0, 1])
    state = first.state_dict()
    write(first, [2, 3])  # then killed
    again = WandbWriter(str(tmp_path))
    again.load_state_dict(state)
    again.open()
    write(again, [2, 3, 4])
    assert fake.run.settings["resume"] == "allow"
    assert {run_id: [step for step, _ in rows] for run_id, rows in fake.rows.items()} == {
        "run0": [0, 1, 2, 3, 4]
    }


def test_run_without_checkpoint_begins_another_one(fake, tmp_path):
    write(WandbWriter(str(tmp_path)), [0, 1])
    write(WandbWriter(str(tmp_path)), [0, 1])
    assert [len(rows) for rows in fake.rows.values()] == [2, 2]


def test_run_that_fails_is_shown_as_failed(fake, tmp_path):
    writer = WandbWriter(str(tmp_path))
    writer.open()
    try:
        raise OSError("disk full")
    except OSError:
        writer.close()
    assert fake.run.exit_code == 1


def test_trainer_logs_to_it_and_resumes_without_duplicates(fake, tiny_cfg):
    tiny_cfg.DATASETS.TEST, tiny_cfg.WRITERS = (), ["wandb"]
    DefaultTrainer(tiny_cfg).train()
    whole = [step for step, _ in fake.rows["run0"]]
    (Path(tiny_cfg.OUTPUT_DIR) / "last_checkpoint").write_text("model_0000002.pth")
    again = DefaultTrainer(tiny_cfg)
    again.resume_or_load(resume=True)
    again.train()
    assert list(fake.rows) == ["run0"]
    assert [step for step, _ in fake.rows["run0"]] == whole
    assert fake.run.settings["config"]["SOLVER"]["MAX_ITER"] == tiny_cfg.SOLVER.MAX_ITER


@pytest.mark.slow
def test_offline_files_of_wandb_itself_hold_each_step_once(tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    code = """if True:
        import sys, torch
        from detkit.engine.wandb_writer import WandbWriter
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
