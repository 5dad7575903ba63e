"""Models whose parameters are shared out over the processes, by torch's FSDP2 (`fully_shard`).

Everything here leaves models without such parameters as they are.

Source: Zhao et al. 2023, arXiv 2304.11277, in torch's second version, with a tensor per parameter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def shard(model: nn.Module) -> None:
    """Share out the parameters of a model, their gradients and optimizer states.

    Each block of a transformer is gathered for itself, when it is computed; the rest of the model
    for a whole pass.

    Args:
        model: On the device of this process, in a run of several; changed in place. Its optimizer
            is built afterwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device_type = next(model.parameters()).device.type
    for parameter in model.parameters():
        # Convolutions in channels_last are not, and FSDP refuses what is not contiguous.
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    blocks = 0
    for name, module in model.named_modules():
        if name.endswith("blocks") and isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                fully_shard(block, mesh=mesh)
                blocks += 1
    fully_shard(model, mesh=mesh)
    logger.info("FSDP: parameters are shared out over %d processes, %d blocks", mesh.size(), blocks)


def is_sharded(model: nn.Module) -> bool:
    """Return whether the parameters of a model are shared out."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def whole(value: Any) -> Any:
    """Return nested containers of tensors with all that are shared out gathered, on the CPU.

    All processes must call it.
    """
    if hasattr(value, "full_tensor"):  # a DTensor, without the import that is slow
        return value.full_tensor().cpu()
    if isinstance(value, Mapping):
        gathered = {key: whole(item) for key, item in value.items()}
        return type(value)(gathered) if isinstance(value, dict) else gathered
    if isinstance(value, list | tuple):
        return type(value)(whole(item) for item in value)
    return value


def own_share(value: Tensor, parameter: Any) -> Tensor:
    """Return this process's share of a whole tensor, where the parameter of its shape is shared."""
    if not hasattr(parameter, "full_tensor") or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements
    device = parameter.to_local().device
    # Every process has read the same file: nothing has to be sent.
    return distribute_tensor(value.to(device), mesh, placements, src_data_rank=None)


def own_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a saved, whole state of an optimizer with the shares of this process."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(hasattr(parameter, "full_tensor") for parameter in parameters):
        return state
    shares = {
        index: {
            name: own_share(value, parameters[index]) if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for index, entries in state["state"].items()
    }
    return {**state, "state": shares}


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Hold the whole parameters in every process, so that each may compute as often as it likes.

    In evaluation processes have different numbers of images, and would otherwise wait for each
    other for ever.
    """
    if not isinstance(model, nn.Module) or not is_sharded(model):
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not model, recurse=False)
