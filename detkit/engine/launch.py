"""Start the processes of a run, or join the run that torchrun has started."""

import contextlib
import datetime
import inspect
import itertools
import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing.spawn import ProcessExitedException, spawn
from torch.nn.parallel import DistributedDataParallel

from detkit.utils import comm
from detkit.utils.errors import ConfigError, UserError
from detkit.utils.sharded import is_sharded
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
# Counts the runs that this process has joined: a second one in the same script is no restart.
_joined = itertools.count()
_POLL_SECONDS = 0.01
_COMPRESSIONS = {"fp16": fp16_compress_hook, "bf16": bf16_compress_hook}


class JoinError(UserError, RuntimeError):
    """A process that could not join its run; the message names it, the address and the cause."""


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

    Under torchrun (or anything that sets its variables), this process joins the run, and the
    numbers given here are not used. Otherwise processes are started, unless one is enough. The
    backend is NCCL with CUDA, else gloo.

    Args:
        main_func: A function of a module, so that new processes can import it.
        num_gpus_per_machine: Processes per machine, one per GPU; without GPUs they share the CPU.
            0 on a single machine counts as 1, as in Detectron2.
        num_machines: Machines; call `launch` on each.
        machine_rank: Number of this machine, from 0.
        dist_url: Where process 0 listens, such as `tcp://192.168.1.1:29500`; `auto` or None picks a
            free port, which works on one machine only.
        args: Arguments of the function.
        timeout: How long a process waits for the others.

    Returns:
        The result of the function if it ran in this process; None if processes were started.

    Raises:
        ConfigError: Numbers that do not fit, or `auto` with several machines.
    """
    if all(name in os.environ for name in _TORCHRUN_VARIABLES):
        return _run_under_torchrun(main_func, args, timeout)
    if num_gpus_per_machine == 0 and num_machines == 1:
        num_gpus_per_machine = 1
    _check_numbers(num_gpus_per_machine, num_machines, machine_rank)
    if num_gpus_per_machine * num_machines == 1:
        return main_func(*args)
    url = _resolve_url(dist_url, num_machines)
    arguments = (main_func, num_gpus_per_machine, num_machines, machine_rank, url, args, timeout)
    _wait_for(spawn(_spawned, nprocs=num_gpus_per_machine, args=arguments, join=False))
    return None


def _wait_for(processes: Any) -> None:
    """Wait until all processes have ended, and pass on to them that this one is asked to stop."""

    def pass_on(number: int) -> None:
        # SIGTERM, whichever it was: they may have received the Ctrl-C too, and a second one makes
        # them end at once.
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


def create_ddp_model(
    model: nn.Module,
    *,
    fp16_compression: bool = False,
    compression: str = "",
    **kwargs: Any,
) -> nn.Module:
    """Wrap a model in DistributedDataParallel; with one process or FSDP return the model itself.

    Args:
        model: On the device of this process.
        fp16_compression: Detectron2's name for `compression="fp16"`.
        compression: "fp16" or "bf16" halves the bytes that gradients take between processes, whose
            sums have the digits of that type; "" sends them as they are.
        **kwargs: For DistributedDataParallel, such as `find_unused_parameters=True`.

    Raises:
        ValueError: `compression` is unknown.
    """
    compression = compression or "fp16" * fp16_compression
    if compression not in ("", *_COMPRESSIONS):
        raise ValueError(f"compression must be fp16, bf16 or empty, got {compression!r}")
    if comm.get_world_size() == 1 or is_sharded(model):
        return model
    device = next(model.parameters()).device
    kwargs.setdefault("device_ids", [device.index] if device.type == "cuda" else None)
    # Batch norm keeps the statistics of each process's own images, as in Detectron2; SyncBN shares
    # them.
    if "broadcast_buffers" not in kwargs:
        kwargs.setdefault(_SYNC_BUFFERS, False)
    wrapped = DistributedDataParallel(model, **kwargs)
    if compression:
        wrapped.register_comm_hook(None, _COMPRESSIONS[compression])
    return wrapped


def _check_numbers(num_per_machine: int, num_machines: int, machine_rank: int) -> None:
    if num_per_machine < 1 or num_machines < 1:
        raise ConfigError(
            f"--num-gpus and --num-machines must be at least 1, got {num_per_machine} and"
            f" {num_machines}; for the CPU set MODEL.DEVICE cpu"
        )
    if not 0 <= machine_rank < num_machines:
        raise ConfigError(f"--machine-rank must lie in [0, {num_machines}), got {machine_rank}")
    available = torch.cuda.device_count()
    if 0 < available < num_per_machine:
        raise ConfigError(
            f"--num-gpus is {num_per_machine}, but torch sees {available} CUDA devices on this"
            " machine"
        )


def _resolve_url(dist_url: str | None, num_machines: int) -> str:
    if dist_url is not None and dist_url != "auto":
        return dist_url
    if num_machines > 1:
        raise ConfigError(
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
    """Join the run from a started process, and call the function."""
    if "OMP_NUM_THREADS" not in os.environ:
        # Otherwise each process would start as many threads as the machine has cores.
        torch.set_num_threads(max(1, torch.get_num_threads() // num_per_machine))
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
    # On several machines, torchrun counts a restart only where the process failed; `_fresh_part`
    # counts the starts that its store has seen. The larger number is right.
    seen = max(restarts - next(_joined), comm.get_num_restarts())
    comm.set_num_restarts(comm.all_reduce_max_int(seen))
    return _run_and_leave(main_func, args)


def _run_and_leave(main_func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    # `record` writes the traceback where torchrun looks for it, to show which process failed first.
    result = record(main_func)(*args)
    # Not after an error: the others would fail at once over the closed connection, and torchrun
    # would show theirs.
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
    """Join the run, on a GPU of its own where there are GPUs; return the starts before this one."""
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        # Before the group: NCCL would otherwise create a context of every process on GPU 0.
        torch.cuda.set_device(local_rank)
    try:
        store, _, _ = next(rendezvous(url, rank, world_size, timeout=timeout))
        store, restarts = _fresh_part(store, rank=rank, world_size=world_size, timeout=timeout)
        dist.init_process_group(
            "nccl" if has_cuda else "gloo",
            store=store,
            world_size=world_size,
            rank=rank,
            timeout=timeout,
        )
    except Exception as error:
        raise JoinError(
            f"process {rank} of {world_size} could not join the run at {url}: {error}"
        ) from error
    comm.set_local(local_rank, local_size)
    comm.synchronize()
    return restarts


def _fresh_part(
    store: Store, *, rank: int, world_size: int, timeout: datetime.timedelta
) -> tuple[Store, int]:
    """Return a part of the store that is new and the same for all processes that start together.

    Args:
        store: Shared by all processes, and perhaps by those before them. Its timeout is set.
        rank: Of this process.
        world_size: Number of processes.
        timeout: How long a process waits for the others.

    Returns:
        The part, and the number of earlier starts that met in this store.

    Raises:
        TimeoutError: In process 0, if some of the others do not come; the others get an error of
            the store.
    """
    # torchrun's agent keeps one store through all restarts (torch 2.14). Processes that were killed
    # have left their addresses in it; a process that reads one of these, because the new process 0
    # is a little later, is refused, and one more restart is lost (test_launch.py shows it). The
    # number of restarts cannot name the part: on several machines, only the agent whose process
    # failed increments it.
    #
    # So process 0 counts the starts in the store, and answers each of the others under a name that
    # the other has just made up: neither question nor answer can be of an earlier start.
    store.set_timeout(timeout)
    meeting = PrefixStore("detkit", store)
    if rank == 0:
        start = meeting.add("starts", 1)
        _tell_all(meeting, start, world_size, timeout)
    else:
        name = uuid.uuid4().hex
        meeting.set(f"name/{rank}", name)
        start = int(meeting.get(f"start_of/{name}"))  # waits for it
        meeting.set(f"told/{start}/{rank}", "")
    return PrefixStore(f"start_{start}", meeting), start - 1


def _tell_all(meeting: Store, start: int, world_size: int, timeout: datetime.timedelta) -> None:
    waiting = list(range(1, world_size))
    deadline = time.monotonic() + timeout.total_seconds()
    while waiting:
        for rank in waiting:
            # The name may be that of a killed process: then nobody reads the answer, and the new
            # name is seen in a later round.
            if meeting.check([f"name/{rank}"]):
                meeting.set(f"start_of/{meeting.get(f'name/{rank}').decode()}", str(start))
        waiting = [rank for rank in waiting if not meeting.check([f"told/{start}/{rank}"])]
        if waiting and time.monotonic() > deadline:
            raise TimeoutError(
                f"{len(waiting)} processes did not come within {timeout}: {str(waiting[:10])[1:-1]}"
            )
        time.sleep(_POLL_SECONDS if waiting else 0)
