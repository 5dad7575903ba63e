import os

import pytest
import torch
from torch import nn

from detkit.checkpoint import DetectionCheckpointer, PeriodicCheckpointer


def run(tmp_path, iterations, **kwargs):
    periodic = PeriodicCheckpointer(DetectionCheckpointer(nn.Linear(1, 1), str(tmp_path)), **kwargs)
    for i in iterations:
        periodic.step(i)
    return sorted(name for name in os.listdir(tmp_path) if name.endswith(".pth"))


def test_saves_every_period_and_at_the_end(tmp_path):
    assert run(tmp_path, range(10), period=4, max_iter=10) == [
        "model_0000003.pth",
        "model_0000007.pth",
        "model_final.pth",
    ]


def test_file_holds_its_iteration(tmp_path):
    run(tmp_path, range(4), period=4)
    assert torch.load(tmp_path / "model_0000003.pth")["iteration"] == 3


def test_only_the_newest_are_kept(tmp_path):
    assert run(tmp_path, range(6), period=1, max_iter=6, max_to_keep=2) == [
        "model_0000004.pth",
        "model_0000005.pth",
        "model_final.pth",
    ]


def test_resumed_run_counts_the_files_from_before(tmp_path):
    run(tmp_path, range(3), period=1, max_to_keep=2)
    assert run(tmp_path, range(3, 5), period=1, max_to_keep=2) == [
        "model_0000003.pth",
        "model_0000004.pth",
    ]


def test_files_of_a_longer_run_before_are_left_alone(tmp_path):
    run(tmp_path, range(8, 9), period=1)
    assert run(tmp_path, range(2), period=1, max_to_keep=1) == [
        "model_0000001.pth",
        "model_0000008.pth",
    ]


def test_other_prefixes_are_left_alone(tmp_path):
    run(tmp_path, range(2), period=1, file_prefix="mine")
    assert "mine_0000000.pth" in run(tmp_path, range(3), period=1, max_to_keep=1)


def test_last_checkpoint_is_the_final_one(tmp_path):
    run(tmp_path, range(4), period=2, max_iter=4)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param(
            {"period": 0}, r"period \(SOLVER\.CHECKPOINT_PERIOD\) must be at least 1", id="period"
        ),
        pytest.param(
            {"period": 1, "max_to_keep": 0},
            r"max_to_keep \(CHECKPOINT_KEEP\) must be at least 1",
            id="keep",
        ),
    ],
)
def test_bad_settings_are_errors(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, [], **kwargs)
