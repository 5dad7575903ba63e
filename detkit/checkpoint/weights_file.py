"""Writing weights alone, in the format that the ending of the file's name tells.

`.pth` is detkit's and torch's format, `.pkl` Detectron2's pickle of NumPy arrays, `.safetensors`
the one that cannot hold code at all. `load_checkpoint_file` reads each.
"""

import json
import pickle
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from detkit.checkpoint.safe_save import atomic_write, save_checkpoint_file

WEIGHT_FORMATS = (".pth", ".safetensors", ".pkl")


def save_weights_file(
    weights: Mapping[str, Tensor], path: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write weights; a crash at any moment leaves the old file or the new one.

    Args:
        weights: Name -> tensor.
        path: Ends with one of `WEIGHT_FORMATS`.
        metadata: What is known about them, such as `thing_classes`: numbers, text, lists and dicts.

    Raises:
        ValueError: The ending is another one.
        ImportError: safetensors is not installed; the message has the command.
    """
    ending = check_weight_format(path)
    metadata = dict(metadata or {})
    # Copies of their own: formats that write whole storages would write more than a view shows, and
    # some refuse it.
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    if ending == ".pth":
        save_checkpoint_file({"model": plain, "metadata": metadata}, path)
        return
    content = (
        _as_pickle(plain, metadata) if ending == ".pkl" else _as_safetensors(plain, metadata, path)
    )
    with atomic_write(path) as file:
        file.write(content)


def check_weight_format(path: str) -> str:
    """Return the ending of a path, or raise the ValueError of `save_weights_file`."""
    ending = PurePosixPath(path).suffix
    if ending not in WEIGHT_FORMATS:
        raise ValueError(
            f"{path} must end with one of {', '.join(WEIGHT_FORMATS)}, which tells the format"
        )
    return ending


def _as_pickle(weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    arrays = {name: value.numpy() for name, value in weights.items()}
    return pickle.dumps({"model": arrays, "__author__": "detkit", "metadata": metadata}, protocol=4)


def _as_safetensors(weights: dict[str, Tensor], metadata: Mapping[str, Any], path: str) -> bytes:
    try:
        from safetensors.torch import save  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"writing {path} needs the package safetensors: pip install safetensors"
        ) from error
    return save(weights, metadata={"format": "pt", "detkit": json.dumps(metadata)})
