"""Seeds, devices and versions: what a run takes from its surroundings."""

import logging
import os
import random
import re

import numpy as np
import torch

logger = logging.getLogger(__name__)


def torch_version() -> tuple[int, int]:
    """Major and minor version of the torch that runs, also for pre-releases and local builds."""
    match = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if match is None:
        raise RuntimeError(f"cannot read torch's version from {torch.__version__!r}")
    return int(match[1]), int(match[2])


def seed_all_rng(seed: int | None = None) -> int:
    """Seed Python, NumPy and torch (every device) and give the seed used.

    Args:
        seed: In [0, 2**32); None draws one from the operating system and logs it, so that the run can be repeated.
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
        raise ValueError(f"MODEL.DEVICE must be auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {name!r}, but torch {torch.__version__} sees no CUDA device. Set MODEL.DEVICE to"
            " cpu or auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"MODEL.DEVICE is {name!r}, but this machine has none. Set MODEL.DEVICE to cpu or auto.")
    return device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
