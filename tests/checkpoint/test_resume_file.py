import os
import re
import subprocess

import pytest
import torch
from torch import nn

from detkit.checkpoint import CheckpointError, DetectionCheckpointer
from detkit.checkpoint.resume_file import checkpoints_before, damage_of


def save_three(folder):
    """Checkpoints of iterations 1, 3 and 5, whose weight is the iteration."""
    model = nn.Linear(1000, 1)
    checkpointer = DetectionCheckpointer(model, str(folder))
    for iteration in (1, 3, 5):
        nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    checkpointer.save("model_best", tag_last=False, iteration=1)


def resume(folder):
    return DetectionCheckpointer(nn.Linear(1000, 1), str(folder)).resume_or_load("", resume=True)[
        "iteration"
    ]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def zero_in_the_middle(path):
    """What a file system may leave of a file whose length it wrote before its content."""
    content = bytearray(path.read_bytes())
    where = content.index(torch.full((100,), 5.0).numpy().tobytes())
    content[where : where + 200] = bytes(200)
    path.write_bytes(content)


def overwrite(path):
    path.write_bytes(b"\0" * 5000)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged|is truncated"),
        (empty, "is empty"),
        (zero_in_the_middle, "the checksum of .* is wrong"),
        (overwrite, "is not a checkpoint"),
        (remove, "does not exist"),
    ],
)
def test_damaged_newest_is_named_and_the_one_before_is_used(tmp_path, caplog, damage, message):
    save_three(tmp_path)
    assert resume(tmp_path) == 5
    caplog.clear()
    damage(tmp_path / "model_0000005.pth")
    assert resume(tmp_path) == 3
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert str(tmp_path / "model_0000005.pth") in errors[0]
    assert re.search(message, errors[0])
    assert "resuming from" in caplog.text


def test_several_may_be_damaged(tmp_path):
    save_three(tmp_path)
    empty(tmp_path / "model_0000005.pth")
    truncate(tmp_path / "model_0000003.pth")
    assert resume(tmp_path) == 1


def test_run_without_a_whole_checkpoint_does_not_start_anew(tmp_path):
    save_three(tmp_path)
    for iteration in (1, 3, 5):
        empty(tmp_path / f"model_{iteration:07d}.pth")
    with pytest.raises(CheckpointError, match="all 3 checkpoints are damaged: .*model_0000005.pth"):
        resume(tmp_path)


def test_only_one_and_that_is_damaged(tmp_path):
    DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)).save("model_0000001")
    zero = tmp_path / "model_0000001.pth"
    empty(zero)
    with pytest.raises(CheckpointError, match=r"model_0000001.pth is empty"):
        resume(tmp_path)


def test_checkpoints_of_a_longer_run_and_the_best_one_are_not_before():
    names = [
        "a/model_0000001.pth",
        "a/model_0000009.pth",
        "a/model_0000003.pth",
        "a/model_best.pth",
        "a/x.pth",
    ]
    assert checkpoints_before("a/model_0000005.pth", names) == [
        "a/model_0000003.pth",
        "a/model_0000001.pth",
    ]
    assert checkpoints_before("a/model_final.pth", names) == [names[1], names[2], names[0]]
    assert checkpoints_before("a/model_0000001.pth", names) == []


def test_legacy_format_is_checked_by_reading_it(tmp_path):
    torch.save(
        {"model": {"w": torch.ones(3)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=False
    )
    assert damage_of(str(tmp_path / "a.pth")) == ""


def test_what_killed_processes_left_half_written_is_removed_when_a_run_goes_on(tmp_path):
    save_three(tmp_path)
    process = subprocess.Popen(["true"])
    process.wait()
    (tmp_path / f".model_0000007.pth.{process.pid}.tmp").write_bytes(b"half")
    running = tmp_path / f".model_0000007.pth.{os.getpid()}.tmp"
    running.write_bytes(b"half")
    resume(tmp_path)
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == [running.name]
