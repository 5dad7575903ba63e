"""The environment of a run: seeds, devices, memory, versions."""

import ctypes
import importlib.metadata
import logging
import os
import platform
import random
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from detkit.utils.errors import ConfigError

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# Set by users who choose or tune an allocator themselves.
_ALLOCATOR_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)


# What `collect_env_info` lists.
_PACKAGES = (
    "detkit",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "fvcore",
    "iopath",
    "pycocotools",
    "faster-coco-eval",
)
_VARIABLES = (
    "DETKIT_DATASETS",
    "DETKIT_OFFLINE",
    "DETKIT_CPU_KERNELS",
    "FVCORE_CACHE",
    "CUDA_VISIBLE_DEVICES",
)


def torch_version() -> tuple[int, int]:
    """Return major and minor version of torch, also of pre-releases and local builds."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if match is None:
        raise RuntimeError(f"cannot read torch's version from {torch.__version__!r}")
    return int(match[1]), int(match[2])


def seed_all_rng(seed: int | None = None) -> int:
    """Seed Python, NumPy and torch (every device), and return the seed.

    Args:
        seed: In [0, 2**32); None draws one from the operating system and logs it, so that the run
            can be repeated.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logger.info("SEED is negative: drew the seed %d", seed)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"a seed (SEED) must lie in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch, and CUDA if it is in use."""
    # In plain numbers and tensors: checkpoints hold nothing else.
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
    """Restore what `random_state` returned; the state of CUDA only if there is a CUDA device."""
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
        ConfigError: The name is not a device, or torch cannot use it on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"MODEL.DEVICE must be auto, cpu, cuda, cuda:N or mps, got {name!r}"
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {name!r}, but torch {torch.__version__} sees no CUDA device. Set"
            " MODEL.DEVICE to cpu or auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"MODEL.DEVICE is {name!r}, but this machine has none. Set MODEL.DEVICE to cpu or auto."
        )
    return device


def reuse_freed_memory() -> bool:
    """Let this process keep the memory that it frees, instead of returning it to the system.

    The process stays as large as it once was. Affects CPU tensors only.

    Returns:
        Whether it was done: only with glibc, and only if no environment variable chooses or tunes
        an allocator.
    """
    # glibc maps each block above 32 MB anew and unmaps it when it is freed, so every large feature
    # map begins with a page fault per 4 KB: 13 % of the time of a Faster R-CNN R50-FPN on one image
    # of 800x1067 (209,000 faults, none with this).
    if platform.libc_ver()[0] != "glibc" or any(
        os.environ.get(name) for name in _ALLOCATOR_VARIABLES
    ):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions refuse so high a threshold. No maps at all cost more in fragmentation.
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 << 20)
    return True


def collect_env_info() -> str:
    """Return a table of versions, devices and environment variables, for logs and bug reports."""
    rows = [("platform", platform.platform()), ("python", sys.version.split()[0])]
    rows += [(name, _version(name)) for name in _PACKAGES]
    rows += [("CPU threads", str(torch.get_num_threads())), ("CUDA", _cuda())]
    rows += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return tabulate(rows, tablefmt="plain")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "not available"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"
