"""Starting the processes of a run: on one machine or several, or those that torchrun has started
already.
"""

import contextlib
import datetime
import inspect
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.nn.parallel import DistributedDataParallel

from detkit.engine.rendezvous import fresh_part
from detkit.utils import comm
from detkit.utils.signals import STOPPED, asked_to_stop

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = datetime.timedelta(minutes=30)
# Its name since torch 2.15, where the older one is deprecated.
_SYNC_BUFFERS = (
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers"
)
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Counts the runs that this process has joined: one that a script launches behind another is no
# restart of it.
_joined = itertools.count()


def launch(
    main_func: Callable[..., Any],
    num_gpus_per_machine: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str | None = "auto",
    args: tuple[Any, ...] = (),
    timeout: datetime.timedelta = DEFAULT_TIMEOUT,
) -> Any:
    """Call `main_func(*args)` in every process of the run.

    Under torchrun (or anything that sets its variables), this process is one of the run: it joins,
    and the numbers given here are not used. Otherwise processes are started, unless one is enough.
    Without CUDA they talk over gloo.

    Args:
        main_func: A function of a module, so that new processes find it.
        num_gpus_per_machine: Processes per machine, one per GPU; on machines without GPU they share
            the CPU.
        num_machines: Machines; `launch` is to be called on each.
        machine_rank: Number of this machine, from 0.
        dist_url: Where process 0 listens, such as `tcp://192.168.1.1:29500`; `auto` or None picks a
            free port, which works on one machine only.
        args: Arguments of the function.
        timeout: How long a process waits for the others.

    Returns:
        What the function gave, where it ran in this process; None where processes were started.

    Raises:
        ValueError: Numbers that do not fit, or `auto` with several machines.
    """
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        return _run_under_torchrun(main_func, args, timeout)
    _check_numbers(num_gpus_per_machine, num_machines, machine_rank)
    if num_gpus_per_machine * num_machines == 1:
        return main_func(*args)
    url = _resolve_url(dist_url, num_machines)
    arguments = (main_func, num_gpus_per_machine, num_machines, machine_rank, url, args, timeout)
    _wait_for(spawn(_spawned, nprocs=num_gpus_per_machine, args=arguments, join=False))
    return None


def _wait_for(processes: Any) -> None:
    """Wait until all processes have ended, and pass on to them that this one is asked to stop.

    As SIGTERM, whichever it was: they may have got the Ctrl-C too, and take a second one for an
    order to end at once.
    """

    def pass_on(number: int) -> None:
        for process_id in processes.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGTERM)

    with asked_to_stop(pass_on):
        try:
            while not processes.join():
                pass
        except ProcessExitedException as error:
            if error.exit_code == STOPPED:
                raise SystemExit(STOPPED) from None
            raise


def create_ddp_model(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Wrap a model in DistributedDataParallel where there are several processes; else give it as it is.

    Args:
        model: On the device of this process.
        **kwargs: For DistributedDataParallel, such as `find_unused_parameters=True`.
    """
    if comm.get_world_size() == 1:
        return model
    device = next(model.parameters()).device
    kwargs.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    # Batch norm keeps the statistics of each process's own images, as in Detectron2: SyncBN is
    # there to share them.
    if "broadcast_buffers" not in kwargs:
        kwargs.setdefault(_SYNC_BUFFERS, False)
    return DistributedDataParallel(model, **kwargs)


def _check_numbers(num_per_machine: int, num_machines: int, machine_rank: int) -> None:
    if num_per_machine < 1 or num_machines < 1:
        raise ValueError(
            f"--num-gpus and --num-machines must be at least 1, got {num_per_machine} and"
            f" {num_machines}; for the CPU set MODEL.DEVICE cpu"
        )
    if not 0 <= machine_rank < num_machines:
        raise ValueError(f"--machine-rank must lie in [0, {num_machines}), got {machine_rank}")
    available = torch.cuda.device_count()
    if 0 < available < num_per_machine:
        raise ValueError(
            f"--num-gpus is {num_per_machine}, but torch sees {available} CUDA devices on this"
            " machine"
        )


def _resolve_url(dist_url: str | None, num_machines: int) -> str:
    if dist_url is not None and dist_url != "auto":
        return dist_url
    if num_machines > 1:
        raise ValueError(
            "--dist-url auto picks a port on this machine only; with several machines give the"
            " address of machine 0, such as tcp://192.168.1.1:29500, on all of them"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _spawned(
    local_rank: int,
    main_func: Callable[..., Any],
    num_per_machine: int,
    num_machines: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
    timeout: datetime.timedelta,
) -> None:
    """What a started process does."""
    _share_cpu(num_per_machine)
    _join_run(
        dist_url,
        rank=machine_rank * num_per_machine + local_rank,
        world_size=num_machines * num_per_machine,
        local_rank=local_rank,
        local_size=num_per_machine,
        timeout=timeout,
    )
    _run_and_leave(main_func, args)


def _run_under_torchrun(
    main_func: Callable[..., Any], args: tuple[Any, ...], timeout: datetime.timedelta
) -> Any:
    if dist.is_initialized():  # a script of the user's own has joined already
        return main_func(*args)
    local_rank = int(os.environ["LOCAL_RANK"])
    restarts = _join_run(
        "env://",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        local_rank=local_rank,
        # torchrun says it; Slurm scripts that only set the five variables may not.
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)),
        timeout=timeout,
    )
    # torchrun counts them on the machine whose process failed; what meets in its store counts those
    # it has seen.
    comm.set_num_restarts(
        comm.all_reduce_max_int(max(restarts - next(_joined), comm.get_num_restarts()))
    )
    return _run_and_leave(main_func, args)


def _run_and_leave(main_func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # `record` leaves the traceback where torchrun finds it, to show whose error it was that ended
    # the others.
    result = record(main_func)(*args)
    # Not after an error: the others would fail at the closed connection at once, and theirs would
    # be the error shown.
    dist.destroy_process_group()
    return result


def _join_run(
    url: str,
    *,
    rank: int,
    world_size: int,
    local_rank: int,
    local_size: int,
    timeout: datetime.timedelta,
) -> int:
    """Make this process a part of the run, with its own GPU where there are GPUs.

    Returns:
        How often processes have met in the store at this address before.
    """
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        # Before the group: NCCL would otherwise put a context of every process on GPU 0.
        torch.cuda.set_device(local_rank)
    try:
        store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
        store, restarts = fresh_part(store, rank=rank, world_size=world_size, timeout=timeout)
        dist.init_process_group(
            "nccl" if has_cuda else "gloo",
            store=store,
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except Exception as error:
        raise RuntimeError(
            f"process {rank} of {world_size} could not join the run at {url}: {error}"
        ) from error
    comm.set_local(local_rank, local_size)
    comm.synchronize()
    return restarts


def _share_cpu(num_processes: int) -> None:
    """Divide the CPU's cores among the processes of a machine, unless the user has decided."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
