import json
import os
import signal

import pytest
import torch
from torch import nn

from detkit.checkpoint import CheckpointError, DetectionCheckpointer
from detkit.checkpoint.run_folder import (
    FolderInUseError,
    lock_folder,
    new_identity,
    recorded_run,
    training_in,
)
from tests.processes import end_of, fork


def test_identities_differ():
    assert new_identity() != new_identity()


def test_folder_remembers_its_run(tmp_path):
    assert recorded_run(str(tmp_path)) is None
    with training_in(str(tmp_path), "a", is_new=True):
        assert recorded_run(str(tmp_path)) == "a"
    with training_in(str(tmp_path), "a", is_new=False):
        pass
    os.close(lock_folder(str(tmp_path)))  # by a run that has not begun yet
    assert recorded_run(str(tmp_path)) == "a"


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0", b"[1]", b'{"pid": 1}', b"{", b"\xff", b'{"run": 5}']
)
def test_damaged_record_is_none(tmp_path, content):
    (tmp_path / "detkit_run.json").write_bytes(content)
    assert recorded_run(str(tmp_path)) is None
    with training_in(str(tmp_path), "a", is_new=True):
        assert recorded_run(str(tmp_path)) == "a"


def test_second_process_is_refused_until_the_first_one_ends_even_by_a_kill(tmp_path):
    ready, wait = os.pipe()

    def first():
        lock_folder(str(tmp_path))
        # What a worker process holds must not keep the folder.
        worker = fork(lambda: signal.pause())
        os.write(wait, f"{worker}\n".encode())
        signal.pause()

    child = fork(first)
    worker = int(os.read(ready, 20))
    with pytest.raises(FolderInUseError, match=rf"another run is training in .*process {child} on"):
        lock_folder(str(tmp_path))
    assert json.loads((tmp_path / "detkit_run.json").read_text())["pid"] == child
    os.kill(child, signal.SIGKILL)
    end_of(child)
    os.close(lock_folder(str(tmp_path)))
    os.kill(worker, signal.SIGKILL)


def test_new_run_sets_the_metrics_and_the_last_checkpoint_of_another_one_aside(tmp_path, caplog):
    files = ("metrics.json", "metrics.csv", "events.out.tfevents.1.host")
    with training_in(str(tmp_path), "a", is_new=True):
        for name in (*files, "last_checkpoint", "model_final.pth"):
            (tmp_path / name).write_text(name)
    with training_in(str(tmp_path), "b", is_new=True):
        for name in files:
            assert not (tmp_path / name).exists()
            assert (tmp_path / "run_a" / name).read_text() == name
    assert not (tmp_path / "last_checkpoint").exists()
    assert (tmp_path / "model_final.pth").exists()
    assert "write 'last_checkpoint' into" in caplog.text


def test_metrics_of_a_run_without_identity_are_set_aside_too(tmp_path):
    (tmp_path / "metrics.json").write_text("old")
    with training_in(str(tmp_path), "b", is_new=True):
        assert (tmp_path / "run_before_b" / "metrics.json").read_text() == "old"


@pytest.mark.parametrize("run", ["", "a"])
def test_resumed_run_finds_everything_as_it_was(tmp_path, run):
    (tmp_path / "metrics.json").write_text("mine")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    with training_in(str(tmp_path), run, is_new=False):
        assert (tmp_path / "metrics.json").read_text() == "mine"
        assert (tmp_path / "last_checkpoint").exists()


class Trainer:
    """State of a trainer, as checkpoints hold it."""

    def __init__(self, run):
        self.run = run

    def state_dict(self):
        return {} if self.run is None else {"run": self.run}

    def load_state_dict(self, state_dict):
        self.run = state_dict.get("run")


def save(folder, run, *iterations):
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), str(folder), trainer=Trainer(run))
    for iteration in iterations:
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)


def resumed(folder):
    checkpointer = DetectionCheckpointer(nn.Linear(1, 1), str(folder), trainer=Trainer(None))
    return checkpointer.resume_or_load("", resume=True)["iteration"]


def test_damaged_checkpoint_is_not_replaced_by_that_of_another_run(tmp_path):
    save(tmp_path, "a", 1, 3)
    save(tmp_path, "b", 2, 4)
    with training_in(str(tmp_path), "b", is_new=False):
        pass
    (tmp_path / "model_0000004.pth").write_bytes(b"")
    assert resumed(tmp_path) == 2
    (tmp_path / "model_0000002.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 4 checkpoints are damaged: .*another run"):
        resumed(tmp_path)


@pytest.mark.parametrize("recorded", [True, False])
def test_checkpoints_without_identity_still_stand_in(tmp_path, recorded):
    save(tmp_path, None, 1, 3)
    if recorded:  # such a run was resumed
        with training_in(str(tmp_path), "", is_new=False):
            pass
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    assert resumed(tmp_path) == 1


@pytest.mark.parametrize(
    "content", [b"", b"\0\0\0\0", b" \n", b"\xff\xfe\x00", b"x" * 5000, b"model_\x1b[2J.pth"]
)
def test_damaged_last_checkpoint_is_told_and_the_newest_one_taken(tmp_path, content, caplog):
    save(tmp_path, "a", 1, 3)
    (tmp_path / "last_checkpoint").write_bytes(content)
    assert resumed(tmp_path) == 3
    assert "last_checkpoint names no file" in caplog.text


def test_damaged_last_checkpoint_without_a_numbered_one_says_what_to_do(tmp_path):
    torch.save({"model": {}}, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"write the name .* such as model_final\.pth"):
        resumed(tmp_path)


@pytest.mark.parametrize("content", ["model_0000001.pth\r\n", "\ufeffmodel_0000001.pth"])
def test_last_checkpoint_written_by_hand_is_read(tmp_path, content):
    save(tmp_path, "a", 1, 3)
    (tmp_path / "last_checkpoint").write_bytes(content.encode())
    assert resumed(tmp_path) == 1
