"""Communication between the processes of one run; every function also works in a single process.

The CPU group is gloo, so that Python objects never travel through the GPU.
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

# Set by the launcher: what `get_local_rank`, `get_local_size` and `get_num_restarts` give.
_LOCAL: dict[str, int] = {}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes in the run."""
    return dist.get_world_size() if _is_distributed() else 1


def get_rank() -> int:
    """Rank of this process over all machines, in [0, world size)."""
    return dist.get_rank() if _is_distributed() else 0


def set_local(rank: int, size: int) -> None:
    """Record rank and number of processes on this machine; called once by the launcher, before
    anything asks.
    """
    if not 0 <= rank < size:
        raise ValueError(f"local rank must lie in [0, {size}), got {rank}")
    _LOCAL.update(rank=rank, size=size)


def get_local_rank() -> int:
    """Rank of this process on its machine: the index of its GPU."""
    return _LOCAL.get("rank", 0)


def get_local_size() -> int:
    """Number of processes on this machine."""
    return _LOCAL.get("size", 1)


def set_num_restarts(count: int) -> None:
    """Record how often the run was restarted; called once by the launcher."""
    _LOCAL["restarts"] = count


def get_num_restarts() -> int:
    """How often torchrun has restarted the run, on whichever of its machines a process failed."""
    return _LOCAL.get("restarts", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")))


def is_main_process() -> bool:
    """Whether this is rank 0, the process that writes files and logs."""
    return get_rank() == 0


def synchronize() -> None:
    """Wait until every process has come here."""
    if get_world_size() == 1:
        return
    if dist.get_backend() == dist.Backend.NCCL:
        dist.barrier(device_ids=[torch.cuda.current_device()])
    else:
        dist.barrier()


@functools.lru_cache
def _cpu_group() -> Any:
    """A gloo group over all ranks; the default group where that is gloo already."""
    return dist.new_group(backend="gloo") if dist.get_backend() == "nccl" else dist.group.WORLD


def all_gather(obj: T) -> list[T]:
    """Return every process the objects of all, in order of rank. Objects travel pickled: keep them
    small.
    """
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * get_world_size()
    dist.all_gather_object(gathered, obj, group=_cpu_group())
    return gathered


def gather(obj: T, dst: int = 0) -> list[T]:
    """Return rank `dst` the objects of all processes, in order of rank; the others get an empty
    list.
    """
    if get_world_size() == 1:
        return [obj]
    gathered: list[Any] | None = [None] * get_world_size() if get_rank() == dst else None
    dist.gather_object(obj, gathered, dst=dst, group=_cpu_group())
    return gathered or []


def largest(number: int) -> int:
    """Return every process the largest of a whole number of each; cheap enough for every iteration."""
    if get_world_size() == 1:
        return number
    value = torch.tensor(number, dtype=torch.int64)
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=_cpu_group())
    return int(value)  # of a CPU tensor: no device is waited for


def largest_of_each(values: Tensor) -> Tensor:
    """Return every process, element by element, the largest of the tensors of all, on the device
    that they are on.
    """
    if get_world_size() == 1:
        return values
    largest = values.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest


def shared_random_seed() -> int:
    """A random seed that is the same in every process, in [0, 2**31)."""
    seed = int(torch.randint(2**31, (1,)).item())
    return all_gather(seed)[0]


def reduce_dict(values: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Sum or average scalars over the processes, key by key, in one message.

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
        names = sorted(values)  # dictionaries may have been filled in another order elsewhere
        stacked = torch.stack([values[name] for name in names])
        dist.reduce(stacked, dst=0)
        if average and get_rank() == 0:
            stacked /= world_size
        return dict(zip(names, stacked, strict=True))


def concatenate_in_main(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Return rank 0 the arrays of all processes, those of a name behind each other in order of rank; the others None.

    They travel as they lie in memory, straight to their place, one process at a time: rank 0 holds
    nothing twice that the others send.

    Args:
        arrays: By name, along the first axis; a process may lack some names.

    Raises:
        ValueError: In all processes, if arrays of a name that are not empty differ in type, or in
            more than the first axis.
    """
    if get_world_size() == 1:
        return dict(arrays)
    layouts = all_gather({name: (array.dtype.str, array.shape) for name, array in arrays.items()})
    gathered: dict[str, np.ndarray] = {}
    for name in sorted({name for layout in layouts for name in layout}):
        given = {rank: layout[name] for rank, layout in enumerate(layouts) if name in layout}
        of_name = {rank: layout for rank, layout in given.items() if layout[1][0]} or dict(
            [next(iter(given.items()))]
        )
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
    """The memory of an array, which is contiguous and not empty."""
    return torch.from_numpy(array.reshape(-1).view(np.uint8))


def sum_to_main(tensor: Tensor) -> Tensor:
    """Return rank 0 the sum of the CPU tensors of all processes, which have the same shape; the
    others get their own.
    """
    if get_world_size() == 1:
        return tensor
    total = tensor.clone()
    dist.reduce(total, dst=0, group=_cpu_group())
    return total if get_rank() == 0 else tensor
