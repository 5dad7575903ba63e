"""Environment of a run: seeds, devices, memory, versions."""

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import logging
import os
import platform
import random
import re
import runpy
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch.fx import _symbolic_trace

from detkit import __version__
from detkit.utils.errors import ConfigError

logger = logging.getLogger(__name__)

# Parameters of glibc's mallopt, from its malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# Set by users who select or tune an allocator.
_ALLOCATOR_VARIABLES = (
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
# Listed by `collect_env_info`.
_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "fvcore",
    "iopath",
    "pycocotools",
)
# Listed where they are installed.
_EXTRAS = ("timm", "safetensors", "albumentations", "onnxruntime", "openvino", "av")
_VARIABLES = (
    "DETKIT_DATASETS",
    "DETECTRON2_DATASETS",
    "DETKIT_OFFLINE",
    "DETKIT_CPU_KERNELS",
    "DETKIT_REMOTE_CACHE_GB",
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
    """Seed Python, NumPy and torch (all devices), and return the seed.

    Args:
        seed: In [0, 2**32); None draws a random seed and logs it.

    Raises:
        ConfigError: The seed is out of range.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        logger.info("random seed of this run: %d (SEED repeats it)", seed)
    if not 0 <= seed < 2**32:
        raise ConfigError(f"a seed (SEED) must lie in [0, 2**32), got {seed}")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def random_state() -> dict[str, Any]:
    """Return the states of the generators of Python, NumPy, torch, and CUDA if it is in use."""
    # As numbers and tensors, which checkpoints can hold.
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
    """Restore the states from `random_state`; that of CUDA only if there is a CUDA device."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["state"].tolist()), python["gauss"]))
    keys = numpy["state"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def resolve_device(name: str) -> torch.device:
    """Return the device of MODEL.DEVICE; "auto" selects cuda, then mps, then cpu.

    Raises:
        ConfigError: The name is not a device, or the device is not available.
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


@contextlib.contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Switch Python's garbage collector off while millions of lists and dicts are built.

    There is no garbage, and looking for it takes 40 % of the time to load COCO's training set.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def reuse_freed_memory() -> bool:
    """Let this process reuse freed memory of CPU tensors instead of returning it to the system.

    The process keeps its peak size.

    Returns:
        Whether this was done: only with glibc, and only if no environment variable selects or tunes
        an allocator.
    """
    # glibc maps each block above 32 MB anew and unmaps it when it is freed, so that writing a large
    # feature map causes a page fault per 4 KB: 13 % of the time of Faster R-CNN R50-FPN on an image
    # of 800x1067 (209,000 faults, none with this).
    is_tuned = any(os.environ.get(name) for name in _ALLOCATOR_VARIABLES)
    if platform.libc_ver()[0] != "glibc" or is_tuned:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions of glibc refuse this threshold. Without maps there is more fragmentation.
    if not mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 << 20)
    return True


def return_freed_memory() -> None:
    """Return all freed memory of this process to the system, also that between what is kept.

    glibc alone: elsewhere this does nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def collect_env_info() -> str:
    """Return a table of versions, devices and environment variables, for logs and bug reports."""
    rows = [("platform", platform.platform()), ("python", sys.version.split()[0])]
    rows += [("detkit", f"{__version__} in {Path(__file__).parents[1]}")]
    rows += [(name, _version(name)) for name in (*_PACKAGES, *filter(find_spec, _EXTRAS))]
    cuda = "not available"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        cuda = f"{torch.version.cuda}: {', '.join(names)}"
    rows += [("CPU threads", str(torch.get_num_threads())), ("CUDA", cuda)]
    rows += [(name, os.environ[name]) for name in _VARIABLES if name in os.environ]
    return tabulate(rows, tablefmt="plain")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def min_torch_version(min_version: str) -> bool:
    """Return whether torch is of a version or a later one.

    Example:
        >>> min_torch_version("1.13"), min_torch_version("99")
        (True, False)
    """
    needed = [int(part) for part in re.findall(r"\d+", min_version)][:3]
    found = [int(part) for part in re.findall(r"\d+", torch.__version__)][:3]
    return found >= needed


TORCH_VERSION = torch_version()
"""Major and minor number of torch's version."""


def setup_environment() -> None:
    """Run the module that `$DETECTRON2_ENV_MODULE` names, if any, as Detectron2 does."""
    if name := os.environ.get("DETECTRON2_ENV_MODULE"):
        setup_custom_environment(name)


def setup_custom_environment(custom_module: str) -> None:
    """Import a module, by its name or its file, and call its `setup_environment`.

    Raises:
        ConfigError: The module has no such function.
    """
    if custom_module.endswith(".py"):
        module = runpy.run_path(custom_module)
    else:
        module = vars(importlib.import_module(custom_module))
    if not callable(module.get("setup_environment")):
        raise ConfigError(f"module {custom_module} has no function setup_environment()")
    module["setup_environment"]()


def is_fx_tracing() -> bool:
    """Return whether torch.fx records the running code."""
    return _symbolic_trace.is_fx_tracing()


def assert_fx_safe(condition: bool, message: str) -> None:
    """Raise an AssertionError unless a condition holds, but not while torch.fx records."""
    if not is_fx_tracing():
        assert condition, message
