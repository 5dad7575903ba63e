"""A table of versions and devices, for the top of a log and for bug reports."""

import importlib.metadata
import os
import platform
import sys

import torch
from tabulate import tabulate

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


def collect_env_info() -> str:
    """Return a table of platform, packages, devices and the environment variables that change a
    run.
    """
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
