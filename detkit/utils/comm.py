"""Collective operations of the processes of a run; all also work in a single process.

Python objects are sent through a gloo group, without the GPU.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Set by the launcher, for `get_local_rank`, `get_local_size` and `get_num_restarts`.
_LOCAL: dict[str, int] = {}

_LOCAL_GROUP: list[Any] = []


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Return the number of processes in the run."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Return the rank of this process over all machines, in [0, world size)."""
    return dist.get_rank() if _is_distributed() else 0


def set_local(rank: int, size: int) -> None:
    """Record rank and number of processes on this machine; called once, by the launcher."""
    if not 0 <= rank < size:
        raise ValueError(f"local rank must lie in [0, {size}), got {rank}")
    _LOCAL.update(rank=rank, size=size)


def get_local_rank() -> int:
    """Return the rank of this process on its machine: the index of its GPU."""
    return _LOCAL.get("rank", 0)


def get_local_size() -> int:
    """Return the number of processes on this machine."""
    return _LOCAL.get("size", 1)


def set_num_restarts(count: int) -> None:
    """Record the number of restarts of the run; called once, by the launcher."""
    _LOCAL["restarts"] = count


def get_num_restarts() -> int:
    """Return the number of restarts of the run by torchrun."""
    return _LOCAL.get("restarts", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def is_main_process() -> bool:
    """Return whether this process has rank 0, which writes files and logs."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until all processes have called this."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _cpu_group() -> Any:
    """Return a gloo group of all ranks: the default group, unless that is NCCL's."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(obj: T) -> list[T]:
    """Return the objects of all processes, by rank. They are pickled and should be small."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj, group=_cpu_group())
    return gathered


def gather(obj: T, dst: int = 0) -> list[T]:
    """Return the objects of all processes, by rank, in rank `dst`; an empty list in the others."""
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(obj, gathered, dst=dst, group=_cpu_group())
    return gathered or []


def all_reduce_max_int(number: int) -> int:
    """Return the maximum of an integer over the processes, through the CPU group."""
    if get_world_size() == 1:
        return number
    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_cpu_group())
    return int(value)  # a CPU tensor: no synchronization with a device


def all_reduce_max(values: Tensor) -> Tensor:
    """Return the element-wise maximum of a tensor over the processes, on its device."""
    if get_world_size() == 1:
        return values
    maximum = values.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return maximum


def shared_random_seed() -> int:
    """Return a random seed that is the same in every process, in [0, 2**31)."""
    seed = int(torch.randint(2**31, (1,)).item())
    return all_gather(seed)[0]


def reduce_dict(values: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or average scalars over the processes, by key, in one reduce.

    Args:
        values: Scalar tensors; the keys are the same in every process.
        average: Divide the sum by the number of processes.

    Returns:
        The reduced scalars, valid on rank 0 only.
    """
    world_size = get_world_size()
    if world_size == 1 or not values:
        return values
    with torch.no_grad():
        names = sorted(values)  # the order of the keys may differ between processes
        stacked = torch.stack([values[name] for name in names])
        dist.reduce(stacked, dst=0)
        if average and get_rank() == 0:
            stacked /= world_size
        return dict(zip(names, stacked, strict=True))


def concatenate_in_main(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Concatenate the arrays of all processes in rank 0, by name and in order of rank.

    Args:
        arrays: Arrays to concatenate along the first axis, by name; names may differ between
            processes.

    Returns:
        The arrays in rank 0, None in the others.

    Raises:
        ValueError: Non-empty arrays of a name differ in type, or in the shape after the first axis;
            raised in all processes.
    """
    if get_world_size() == 1:
        return dict(arrays)
    layouts = all_gather({name: (array.dtype.str, array.shape) for name, array in arrays.items()})
    gathered: dict[str, np.ndarray] = {}
    for name in sorted(set().union(*layouts)):
        given = {rank: layout[name] for rank, layout in enumerate(layouts) if name in layout}
        filled = {rank: layout for rank, layout in given.items() if layout[1][0] > 0}
        # Empty arrays are ignored, as they often have NumPy's default type. If all are empty, the
        # first one defines the result.
        of_name = filled or dict(list(given.items())[:1])
        if len({(dtype, shape[1:]) for dtype, shape in of_name.values()}) > 1:
            raise ValueError(
                f"arrays {name!r} differ between processes: by rank {of_name} (type, shape)"
            )
        whole = _concatenate_in_main(arrays.get(name), of_name)
        if whole is not None:
            gathered[name] = whole
    return gathered if is_main_process() else None


def _concatenate_in_main(
    own: np.ndarray | None, layouts: Mapping[int, tuple[str, tuple]]
) -> np.ndarray | None:
    # Received as bytes, directly in the result and from one process at a time: a gather of pickles
    # would need twice the memory in rank 0.
    if not is_main_process():
        if own is not None and own.size:
            dist.send(_bytes_of(np.ascontiguousarray(own)), dst=0, group=_cpu_group())
        return None
    dtype, (_, *rest) = next(iter(layouts.values()))
    whole = np.empty((sum(shape[0] for _, shape in layouts.values()), *rest), dtype)
    start = 0
    for rank, (_, shape) in layouts.items():
        part = whole[start : start + shape[0]]
        start += shape[0]
        if rank == 0:
            part[:] = own
        elif part.size:
            dist.recv(_bytes_of(part), src=rank, group=_cpu_group())
    return whole


def _bytes_of(array: np.ndarray) -> Tensor:
    """Return a view of the bytes of a contiguous array that is not empty."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def sum_to_main(tensor: Tensor) -> Tensor:
    """Return the sum of a CPU tensor over the processes in rank 0, the input in the others."""
    if get_world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.reduce(total, dst=0, group=_cpu_group())
    return total if get_rank() == 0 else tensor


def create_local_process_group(num_workers_per_machine: int) -> None:
    """Create the groups of the processes of each machine, for `get_local_process_group`.

    All processes must call it.

    Raises:
        ValueError: The number of processes is no multiple.
    """
    size = get_world_size()
    if size % num_workers_per_machine:
        raise ValueError(
            f"{size} processes are no multiple of {num_workers_per_machine} per machine"
        )
    if not _is_distributed():
        return
    for first in range(0, size, num_workers_per_machine):
        ranks = list(range(first, first + num_workers_per_machine))
        group = dist.new_group(ranks)  # by all processes, of the group or not
        if get_rank() in ranks:
            _LOCAL_GROUP[:] = [group]


def get_local_process_group() -> Any:
    """Return the group of the processes of this machine; None in a single process."""
    return _LOCAL_GROUP[0] if _LOCAL_GROUP else None
