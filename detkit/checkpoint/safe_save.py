"""Writing of files of checkpoints and weights: loadable, and either complete or absent."""

import contextlib
import enum
import importlib
import json
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from detkit.utils.errors import MissingPackageError, WeightsError
from detkit.utils.file_io import PathManager

WEIGHT_FORMATS = (".pth", ".safetensors", ".pkl")
"""Endings of files of weights: torch's format, safetensors, Detectron2's pickle of arrays."""

_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


def save_checkpoint_file(checkpoint: Mapping[str, Any], path: str) -> None:
    """Write a checkpoint in torch's format; a crash leaves the old file or the new one.

    Args:
        checkpoint: Tensors, numbers, strings and containers of them; NumPy values become tensors
            and numbers.
        path: Local path, or one that `PathManager` knows, where the remote store decides what a
            crash leaves.

    Raises:
        TypeError: A value has a type that `load_checkpoint_file` would refuse; the message names
            its place.
        OSError: The disk is full, or the system refuses otherwise. The old file is unchanged.
    """
    content = _loadable(checkpoint, "checkpoint")
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        reason = (
            f"the checkpoint could not be written: {cause.strerror or cause}; those written before"
            " are whole"
        )
        raise OSError(cause.errno, reason, path) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the system's error behind one of torch, or None."""
    # torch finishes its zip file even after an error, and fails again there.
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` at the end of the block, unless the block fails.

    A remote `path` is opened itself: its store decides what a crash leaves.
    """
    if "://" in path:
        with PathManager.open(path, "wb") as file:
            yield cast(IO[bytes], file)
        return
    target = Path(path)
    # The process id keeps two runs in one folder apart; the leading dot keeps half-written files
    # out of `*.pth`.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            # To the disk before the rename: a power cut must not leave an empty file of that name.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the file itself is safe
        pass
    finally:
        os.close(descriptor)


def _loadable(value: Any, where: str) -> Any:
    """Return the value in types that a safe reader accepts, or raise a TypeError with its place."""
    # An error at the first checkpoint of a run is better than one when the last is needed.
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor)
        # torch writes the whole storage of a tensor, so a part of a larger one is copied.
        is_part = plain.layout == torch.strided and plain.untyped_storage().nbytes() > plain.nbytes
        return plain.clone() if is_part else plain
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return _loadable(value.item(), where)
    if isinstance(value, Mapping):
        return _loadable_mapping(value, where)
    if isinstance(value, list | tuple | set | frozenset):
        items = [_loadable(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, tuple):  # also a named one
            return tuple(items)
        return set(items) if isinstance(value, set | frozenset) else items
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return _loadable_scalar(value, where)


def _loadable_mapping(value: Mapping[Any, Any], where: str) -> dict[Any, Any]:
    content = {
        _loadable(key, where): _loadable(item, f"{where}[{key!r}]") for key, item in value.items()
    }
    metadata = getattr(value, "_metadata", None)  # versions of the modules of a state_dict
    if metadata is None:
        return content
    state_dict = OrderedDict(content)  # the one type whose attributes torch's safe reader restores
    vars(state_dict)["_metadata"] = metadata
    return state_dict


def _loadable_scalar(value: Any, where: str) -> Any:
    if value is None or isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, enum.Enum):
        return _loadable(value.value, where)
    for plain in _SCALARS:
        if isinstance(value, plain):
            return plain(value)  # subclasses would be pickled by name
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be loaded"
        " again safely. A state must be made of tensors, numbers, text, lists and dicts."
    )


def save_weights_file(
    weights: Mapping[str, Tensor], path: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write weights alone, in the format of the ending; a crash leaves the old file or the new one.

    Args:
        weights: Name -> tensor.
        path: Ends with one of `WEIGHT_FORMATS`.
        metadata: Facts about them, such as `thing_classes`: numbers, strings, lists and dicts.

    Raises:
        WeightsError: The ending is another one.
        MissingPackageError: safetensors is not installed; the message has the command.
    """
    ending = check_weight_format(path)
    metadata = dict(metadata or {})
    # Copies: the formats write whole storages, more than a view shows, or refuse views.
    plain = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }
    if ending == ".pth":
        save_checkpoint_file({"model": plain, "metadata": metadata}, path)
        return
    if ending == ".pkl":
        arrays = {name: value.numpy() for name, value in plain.items()}
        saved = {"model": arrays, "__author__": "detkit", "metadata": metadata}
        content = pickle.dumps(saved, protocol=4)
    else:
        content = _as_safetensors(plain, metadata, path)
    with atomic_write(path) as file:
        file.write(content)


def check_weight_format(path: str) -> str:
    """Return the ending of a path, or raise the WeightsError of `save_weights_file`."""
    ending = PurePosixPath(path).suffix
    if ending not in WEIGHT_FORMATS:
        raise WeightsError(
            f"{path} must end with one of {', '.join(WEIGHT_FORMATS)}, which tells the format"
        )
    return ending


def _as_safetensors(weights: dict[str, Tensor], metadata: Mapping[str, Any], path: str) -> bytes:
    try:
        safetensors = importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise MissingPackageError(
            f"writing {path} needs the package safetensors: pip install safetensors"
        ) from error
    return safetensors.save(weights, metadata={"format": "pt", "detkit": json.dumps(metadata)})
