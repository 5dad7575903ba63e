"""Seeds, devices, memory and versions: what a run takes from its surroundings."""

import ctypes
import logging
import os
import platform
import random
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# A user who has chosen an allocator, or tuned it, has the last word.
_ALLOCATOR_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


def torch_version() -> tuple[int, int]:
    """Major and minor version of the torch that runs, also for pre-releases and local builds."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if match is None:
        raise RuntimeError(f"cannot read torch's version from {torch.__version__!r}")
    return int(match[1]), int(match[2])


def seed_all_rng(seed: int | None = None) -> int:
    """Seed Python, NumPy and torch (every device) and give the seed used.

    Args:
        seed: In [0, 2**32); None draws one from the operating system and logs it, so that the run
            can be repeated.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logger.info("SEED is negative: drew the seed %d", seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"a seed must lie in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def random_state() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, with that of the present CUDA
    device if in use.
    """
    version, python, gauss = random.getstate()
    _, numpy, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": {
            "version": version,
            "state": torch.tensor(python, dtype=torch.int64),
            "gauss": gauss,
        },
        "numpy": {
            "state": torch.from_numpy(np.asarray(numpy, dtype=np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take over what `random_state` gave; that of a CUDA device only where there is one."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    keys = numpy["state"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def resolve_device(name: str) -> torch.device:
    """Turn MODEL.DEVICE into a device: "auto" picks cuda, then mps, then cpu.

    Raises:
        ValueError: The name is no device, or torch cannot use it on this machine.
    """
    if name == "auto":
        return torch.device(_best_device())
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE must be auto, cpu, cuda, cuda:N or mps, got {name!r}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {name!r}, but torch {torch.__version__} sees no CUDA device. Set"
            " MODEL.DEVICE to cpu or auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {name!r}, but this machine has none. Set MODEL.DEVICE to cpu or auto."
        )
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def reuse_freed_memory() -> bool:
    """Let this process keep the memory it frees, for the next tensor, instead of handing it back to the system.

    glibc maps every block above 32 MB anew and unmaps it when it is freed, so each large feature
    map on a CPU begins with a page fault per 4 KB: 13 % of the time of a Faster R-CNN R50-FPN on
    one image of 800x1067 (209,000 faults, none with this). The process stays as large as it once
    was. Concerns torch's CPU tensors only; GPUs have torch's own pool.

    Returns:
        Whether it was done: not without glibc, and not where an environment variable chooses or
        tunes an allocator.
    """
    if platform.libc_ver()[0] != "glibc" or any(
        os.environ.get(name) for name in _ALLOCATOR_VARIABLES
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions refuse so high a threshold; they get no maps at all, which costs more in
    # fragmentation.
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 << 20)
    return True
