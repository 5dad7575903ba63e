"""Processes forked from that of the tests: they begin with everything imported, and take no seconds to start."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

# Autograd starts its threads at the first backward pass, one per device that torch knows by then, and a process that
# has such threads cannot fork one that trains. When the tests are collected there is only the CPU, which needs none;
# later, a test may have registered more.
torch.zeros(1, requires_grad=True).sum().backward()

_TIMEOUT = 60.0
_LIFETIME = 300


def fork(function, *args, output=None):
    """Run a function in a process of its own, and give its id; what the function returns is its exit status.

    It lives for five minutes at most, and sees no GPU: CUDA cannot be used in a fork of a process that has used it.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(_LIFETIME)  # which ends it
        # The threads of OpenMP stay behind in the parent.
        torch.set_num_threads(1)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for processes that begin anew
        torch.cuda.is_available, torch.cuda.device_count = bool, int  # nothing, and none
        if output is not None:
            # pytest has put files of its own into the place of these.
            sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
        status = int(function(*args) or 0)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def end_of(child):
    """Wait for a process, and give its exit status: negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def living(group: int) -> list[str]:
    """The processes of a group, without those that are dead and only wait to be noticed; on Linux."""
    states = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            states.append(path.read_text())
    fields = {
        state: state.rsplit(")", 1)[1].split() for state in states
    }  # state, parent, group, ...
    return [
        state
        for state, (kind, _, its_group, *_) in fields.items()
        if int(its_group) == group and kind != "Z"
    ]


def group_is_gone(group: int) -> bool:
    """Whether all processes of a group end within ten seconds."""
    end = time.monotonic() + 10
    while living(group) and time.monotonic() < end:
        time.sleep(0.05)
    return not living(group)


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_agent(function, *args, port, num_processes=2, num_machines=1, max_restarts=0):
    """Do what torchrun does on one machine, but fork the processes. To be run in a process of its own."""
    config = LaunchConfig(
        min_nodes=num_machines,
        max_nodes=num_machines,
        nproc_per_node=num_processes,
        run_id="test",
        rdzv_backend="c10d",
        rdzv_endpoint=f"localhost:{port}",
        max_restarts=max_restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, function)(*args)


def together(function, *args, folder, world_size=2):
    """Run a function in several processes that form a group of gloo's, and give what it returns in each, by rank.

    Args:
        function: Called with `args`.
        folder: For the file that they meet at, and what they print.
        world_size: Number of processes.
    """
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(world_size)]
    meeting = folder / f"meeting_{len(list(folder.glob('meeting_*')))}"
    children = [
        fork(
            _one_of,
            function,
            args,
            rank,
            world_size,
            meeting,
            pipes[rank][1],
            output=f"{meeting}_{rank}.txt",
        )
        for rank in range(world_size)
    ]
    results = []
    for rank, (receiving, sending) in enumerate(pipes):
        sending.close()
        with contextlib.suppress(EOFError):
            if receiving.poll(_TIMEOUT):
                results.append(pickle.loads(receiving.recv_bytes()))
        if len(results) <= rank:
            break
    else:
        assert [end_of(child) for child in children] == [0] * world_size
        return results
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, 9)
        end_of(child)
    said = [
        f"process {rank}:\n{_read(f'{meeting}_{rank}.txt')[-5000:]}" for rank in range(world_size)
    ]
    raise AssertionError("\n".join(said))


def _read(path):
    with open(path, errors="replace") as file:
        return file.read()


def _one_of(function, args, rank, world_size, meeting, pipe):
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=_TIMEOUT / 2),
    )
    pipe.send_bytes(pickle.dumps(function(*args)))
    dist.barrier()
    dist.destroy_process_group()
