import datetime
import functools
import os
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore

from detkit.engine import SimpleTrainer, create_ddp_model, launch
from detkit.engine.launch import _fresh_part, _resolve_url
from detkit.utils import comm
from tests.processes import end_of, fork, free_port, torchrun_agent


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(comm, "_LOCAL", {})


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_one_process_is_this_one(num_gpus):
    assert launch(lambda a, b: (a + b, os.getpid()), num_gpus, args=(1, 2)) == (3, os.getpid())
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param(
            {"num_gpus_per_machine": 0, "num_machines": 2},
            "--num-gpus and --num-machines must be at least 1, got 0 and 2",
            id="no-gpu-on-two-machines",
        ),
        pytest.param(
            {"num_gpus_per_machine": -1},
            "--num-gpus and --num-machines must be at least 1, got -1 and 1",
            id="negative",
        ),
        pytest.param(
            {"num_gpus_per_machine": 1, "num_machines": 2, "machine_rank": 2},
            r"--machine-rank must lie in \[0, 2\)",
            id="rank",
        ),
        pytest.param(
            {"num_gpus_per_machine": 1, "num_machines": 2},
            "give the address of machine 0",
            id="auto-for-two",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_errors(kwargs, message):
    with pytest.raises(ValueError, match=message):
        launch(print, **kwargs)


def test_more_processes_than_gpus_are_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--num-gpus is 4, but torch sees 2 CUDA devices"):
        launch(print, 4)


def test_free_port_is_picked():
    url = _resolve_url("auto", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(url.rsplit(":", 1)[1])))  # raises where the port is taken
        assert probe.getsockname()[1] > 0


def test_given_address_is_kept():
    assert _resolve_url("tcp://10.0.0.1:29500", 2) == "tcp://10.0.0.1:29500"


def set_torchrun(monkeypatch, **values):
    base = {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    for name, value in {**base, **values}.items():
        monkeypatch.setenv(name, str(value))


def where_am_i():
    return (
        dist.get_backend(),
        comm.get_rank(),
        comm.get_world_size(),
        comm.get_local_rank(),
        comm.get_local_size(),
    )


def test_run_of_torchrun_is_joined_and_its_numbers_win(monkeypatch):
    set_torchrun(monkeypatch)
    assert launch(where_am_i, 8) == ("gloo", 0, 1, 0, 1)
    assert not dist.is_initialized()


def test_run_that_cannot_be_joined_is_named(monkeypatch):
    set_torchrun(monkeypatch, RANK=1, WORLD_SIZE=2, MASTER_PORT=free_port())
    with pytest.raises(RuntimeError, match="process 1 of 2 could not join the run at env://"):
        launch(where_am_i, 1, timeout=datetime.timedelta(milliseconds=100))


def test_model_of_one_process_is_not_wrapped():
    model = nn.Linear(1, 1)
    assert create_ddp_model(model) is model


@pytest.mark.parametrize(
    ("kwargs", "gradient"),
    [
        pytest.param({}, 1.0001, id="none"),
        pytest.param({"compression": "bf16"}, 1.0, id="bf16"),
        pytest.param({"compression": "fp16"}, 1.0, id="fp16"),
        pytest.param({"fp16_compression": True}, 1.0, id="old-name"),
    ],
)
def test_gradients_are_sent_with_the_digits_of_the_compression(kwargs, gradient, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = create_ddp_model(nn.Linear(1, 1), **kwargs)
        model(torch.tensor([[1.0001]])).sum().backward()
        assert model.module.weight.grad.item() == pytest.approx(gradient, abs=1e-6)
    finally:
        dist.destroy_process_group()


def test_unknown_compression_is_an_error():
    with pytest.raises(ValueError, match="must be fp16, bf16 or empty, got 'int8'"):
        create_ddp_model(nn.Linear(1, 1), compression="int8")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(2, 1)

    def forward(self, batch):
        return {"loss_a": self.fc(batch).pow(2).mean(), "loss_b": self.fc(batch).abs().mean()}


def data_of(rank, count=4):
    return [
        torch.randn(3, 2, generator=torch.Generator().manual_seed(10 * i + rank))
        for i in range(count)
    ]


def train(data):
    model = create_ddp_model(Net())
    trainer = SimpleTrainer(
        model, data, torch.optim.SGD(model.parameters(), lr=0.1), gather_metric_period=2
    )
    trainer.train(0, len(data))
    weights = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return weights, trainer.storage.histories()


def train_and_write(folder):
    """Main function of a started process."""
    weights, histories = train(data_of(comm.get_rank()))
    losses = {name: history.values() for name, history in histories.items()}
    torch.save((weights, losses, where_am_i()), Path(folder) / f"{comm.get_rank()}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one_with_both_batches(tmp_path, monkeypatch):
    # Started processes import this file by its name; pytest's importlib mode has not put its folder on their path.
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    import test_launch

    launch(test_launch.train_and_write, 2, args=(str(tmp_path),))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [result[2] for result in results] == [("gloo", 0, 2, 0, 2), ("gloo", 1, 2, 1, 2)]

    both = [torch.cat(pair) for pair in zip(data_of(0), data_of(1), strict=True)]
    weights, histories = train(both)
    for name, weight in weights.items():
        assert torch.allclose(weight, results[0][0][name], atol=1e-6)
        assert torch.equal(results[0][0][name], results[1][0][name])
    losses = results[0][1]
    for name in ("total_loss", "loss_a", "loss_b"):
        assert [i for _, i in losses[name]] == [0, 1, 2, 3]
        assert [v for v, _ in losses[name]] == pytest.approx(
            [v for v, _ in histories[name].values()], rel=1e-5
        )
    assert results[1][1] == {}


def fail_in_process_one():
    if comm.get_rank() == 1:
        raise FloatingPointError("loss is not finite at iteration 7")
    comm.synchronize()


@pytest.mark.slow
def test_error_of_one_process_ends_the_run_and_is_shown(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    import test_launch

    with pytest.raises(
        torch.multiprocessing.ProcessRaisedException, match="not finite at iteration 7"
    ):
        launch(test_launch.fail_in_process_one, 2)


SECOND = datetime.timedelta(seconds=1)


def meet(store, world_size, timeout=5 * SECOND):
    """What each of the processes of one start gets."""
    with ThreadPoolExecutor(world_size) as threads:
        ranks = [
            threads.submit(_fresh_part, store, rank=rank, world_size=world_size, timeout=timeout)
            for rank in reversed(range(world_size))
        ]
        return [future.result() for future in reversed(ranks)]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_processes_of_a_start_share_what_those_before_have_not(world_size):
    store = HashStore()
    for start in range(3):
        parts, counts = zip(*meet(store, world_size), strict=True)
        assert set(counts) == {start}
        assert not parts[-1].check(["address"])
        parts[0].set("address", str(start))
        assert {part.get("address") for part in parts} == {str(start).encode()}


def test_process_that_is_gone_takes_nobody_in():
    store = HashStore()
    with ThreadPoolExecutor(2) as threads:
        # Killed before process 0 of its start had come: its question stands in the store.
        with pytest.raises(RuntimeError):
            _fresh_part(store, rank=1, world_size=2, timeout=datetime.timedelta(milliseconds=50))
        main = threads.submit(_fresh_part, store, rank=0, world_size=2, timeout=5 * SECOND)
        time.sleep(0.1)
        assert not main.done()
        other, _ = _fresh_part(store, rank=1, world_size=2, timeout=5 * SECOND)
        main.result()[0].set("address", "here")
        assert other.get("address") == b"here"


def test_processes_that_do_not_come_are_named():
    with pytest.raises(TimeoutError, match=r"2 processes did not come within 0:00:00\.05.*: 1, 2"):
        _fresh_part(HashStore(), rank=0, world_size=3, timeout=datetime.timedelta(milliseconds=50))


def restarted_worker(record):
    start = record.stat().st_size if record.exists() else 0
    if start and os.environ["RANK"] == "0":
        time.sleep(
            0.5
        )  # so that the other comes first, and would find what the last process 0 has left
    launch(fail_at_first, 1, args=(record, start))
    launch(is_no_restart_of_the_first, 1, args=(record, start))


def fail_at_first(record, start):
    assert comm.get_num_restarts() == start
    assert comm.all_gather(start) == [start, start]
    comm.synchronize()
    if start == 0 and comm.get_rank() == 1:
        record.write_bytes(b"x")
        os.kill(os.getpid(), signal.SIGKILL)
    comm.synchronize()


def is_no_restart_of_the_first(record, start):
    assert comm.get_num_restarts() == start
    if comm.is_main_process():
        record.with_name("done").touch()


@pytest.mark.parametrize("num_machines", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_restart_by_torchrun_meets_at_the_first_attempt(tmp_path, num_machines):
    machine = functools.partial(
        torchrun_agent,
        restarted_worker,
        tmp_path / "record",
        port=free_port(),
        num_processes=2 // num_machines,
        num_machines=num_machines,
        max_restarts=1,
    )
    agents = [fork(machine, output=tmp_path / "output.txt") for _ in range(num_machines)]
    assert [end_of(process) for process in agents] == [0] * num_machines, (
        tmp_path / "output.txt"
    ).read_text()
    assert (tmp_path / "done").exists()
