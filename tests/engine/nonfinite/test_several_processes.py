"""Two processes, one of which has the fault: both stop, or both skip the same step."""

import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessRaisedException

from detkit.engine import SimpleTrainer, create_ddp_model, launch
from detkit.layers import get_norm
from detkit.utils import comm

FAULTS = ["loss", "constant", "gradient", "raises"]
STEPS = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(2)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        (item,) = batch
        x, fault = item["x"], item["fault"]
        y = self.fc(self.norm(x * (math.nan if fault == "loss" else 1.0)))
        if fault == "raises":
            raise FloatingPointError("scores contain nan")
        if fault == "constant":  # the gradients are those of the step without the fault
            y = y + math.inf
            return {"loss": y.mean()}
        if fault == "gradient":
            y = y + (y * 0).abs().sqrt()
        return {"loss": y.pow(2).mean()}


def data_of(rank, fault):
    """The fault is in the second batch of process 1."""
    return [
        [
            {
                "x": torch.randn(6, 2, generator=torch.Generator().manual_seed(10 * i + rank)),
                "fault": fault if (rank, i) == (1, 1) else "",
                "file_name": f"{rank}_{i}.jpg",
            }
        ]
        for i in range(STEPS)
    ]


def train(folder, count):
    """Main function of a started process."""
    rank = comm.get_rank()
    for fault in FAULTS:
        model = create_ddp_model(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        trainer = SimpleTrainer(
            model,
            data_of(rank, fault),
            optimizer,
            2,
            max_skipped_steps=count,
            dump_dir=f"{folder}/{fault}",
        )
        message = ""
        try:
            trainer.train(0, STEPS)
        except FloatingPointError as error:
            message = str(error)
        losses = (
            [i for _, i in trainer.storage.history("total_loss").values()]
            if message == "" and rank == 0
            else []
        )
        result = (model.module.state_dict(), trainer.num_skipped, message, losses)
        torch.save(result, Path(folder) / f"{fault}_{rank}.pt")


class SyncNet(nn.Module):
    """Has a layer behind the error of process 1 in which process 0 waits for it."""

    def __init__(self):
        super().__init__()
        self.norm = get_norm("SyncBN", 2)

    def forward(self, batch):
        if batch == 1:
            raise FloatingPointError("scores contain nan")
        return {"loss": self.norm(torch.randn(2, 2, 3, 3)).pow(2).mean()}


def train_synchronised():
    """Main function of a started process."""
    model = create_ddp_model(SyncNet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    SimpleTrainer(model, [0, comm.get_rank()], optimizer, max_skipped_steps=9).train(0, 2)


@pytest.fixture
def run_two(tmp_path, monkeypatch):
    # Started processes import this file by its name; pytest's importlib mode has not put its folder on their path.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    import test_several_processes

    def run(count):
        launch(test_several_processes.train, 2, args=(str(tmp_path), count))
        return {
            fault: [
                torch.load(tmp_path / f"{fault}_{rank}.pt", weights_only=False) for rank in (0, 1)
            ]
            for fault in FAULTS
        }

    return run


@pytest.mark.slow
def test_both_skip_the_same_step(run_two):
    results = run_two(1)
    for fault, (
        (weights, skipped, message, losses),
        (others, skipped_there, message_there, _),
    ) in results.items():
        assert (skipped, skipped_there, message, message_there) == (1, 1, "", ""), fault
        assert losses == [0, 2, 3], fault
        for name in ("fc.weight", "fc.bias", "norm.weight"):
            assert torch.equal(weights[name], others[name]), (fault, name)
        # Process 0 has skipped too: its statistics are of three batches.
        assert weights["norm.num_batches_tracked"] == others["norm.num_batches_tracked"] == 3
        assert all(value.isfinite().all() for value in [*weights.values(), *others.values()]), fault
        # Whatever the fault, the same step is missing.
        torch.testing.assert_close(weights, results["loss"][0][0], rtol=0, atol=0)


@pytest.mark.slow
def test_both_stop_with_the_same_message_and_one_file(run_two, tmp_path):
    for fault, ((weights, _, message, _), (others, _, message_there, _)) in run_two(0).items():
        assert message == message_there
        assert "finite at iteration 1" in message, fault
        assert "of process 1" in message, fault
        assert "Images of the batch: 1_1.jpg." in message, fault
        assert torch.equal(weights["fc.weight"], others["fc.weight"])
        assert weights["fc.weight"].isfinite().all()
        (path,) = (tmp_path / fault).iterdir()
        first, second = json.loads(path.read_text())["processes"]
        assert [first["process"], second["process"]] == [0, 1]
        assert first["replay"] == {"first_output": None, "first_gradient": None, "error": ""}, fault
        assert second["replay"] != first["replay"], fault


@pytest.mark.slow
def test_error_between_layers_that_communicate_is_not_waited_for(run_two):
    import test_several_processes

    with pytest.raises(ProcessRaisedException, match="FloatingPointError: scores contain nan"):
        launch(test_several_processes.train_synchronised, 2, timeout=timedelta(seconds=20))
