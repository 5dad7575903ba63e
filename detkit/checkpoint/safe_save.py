"""Atomic saving of checkpoints and weights that `safe_load` can read."""

import contextlib
import enum
import json
import logging
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np
import torch
from torch import Tensor

from detkit.utils.errors import WeightsError, import_package
from detkit.utils.file_io import PathManager

logger = logging.getLogger(__name__)

WEIGHT_FORMATS = (".pth", ".safetensors", ".pkl")
"""Endings of weight files: torch's format, safetensors, Detectron2's pickle of arrays."""

_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes)


def save_checkpoint_file(checkpoint: Mapping[str, Any], path: str) -> None:
    """Save a checkpoint in torch's format; a crash leaves the old file or the new one.

    Args:
        checkpoint: Tensors, numbers, strings and containers of them; NumPy values become tensors
            and numbers.
        path: Local path, or a remote one that `PathManager` knows, whose store decides what a
            crash leaves.

    Raises:
        TypeError: A value has a type that `load_checkpoint_file` would refuse; the message says
            where in the checkpoint.
        OSError: The file cannot be written, for example because the disk is full. The old file
            is unchanged.
    """
    content = _loadable(checkpoint, "checkpoint")
    try:
        with atomic_write(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        # torch tries to finish its zip file after an error, and raises a RuntimeError there: the
        # system's error is in its context.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        reason = (
            f"the checkpoint could not be written: {cause.strerror or cause}; those written before"
            " are intact"
        )
        raise OSError(cause.errno, reason, path) from error


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` at the end of the block, unless the block fails.

    A remote `path` is opened directly.
    """
    if "://" in path:
        with PathManager.open(path, "wb") as file:
            yield cast(IO[bytes], file)
        return
    target = Path(path)
    # The process id separates two runs in one folder; the leading dot hides incomplete files from
    # `*.pth`.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            # To the disk before the rename: otherwise a power cut may leave an empty file.
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _flush_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Write a rename to the disk, where the system supports it."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems refuse; the content of the file is safe
        pass
    finally:
        os.close(descriptor)


def _loadable(value: Any, where: str) -> Any:
    """Return a value in types that `safe_load` accepts, or raise a TypeError that says where."""
    # Checked while saving: an error at the first checkpoint of a run is better than at a resume.
    if value is None or isinstance(value, torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        plain = value.detach().as_subclass(Tensor)
        # torch saves the whole storage of a tensor, so views of a larger one are copied.
        is_part = plain.layout == torch.strided and plain.untyped_storage().nbytes() > plain.nbytes
        return plain.clone() if is_part else plain
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return _loadable(value.item(), where)
    if isinstance(value, Mapping):
        content: OrderedDict[Any, Any] = OrderedDict()
        for key, item in value.items():
            content[_loadable(key, where)] = _loadable(item, f"{where}[{key!r}]")
        metadata = getattr(value, "_metadata", None)  # versions of the modules of a state_dict
        if metadata is None:
            return dict(content)
        # torch's safe reader restores the attributes of an OrderedDict, and of no other type.
        vars(content)["_metadata"] = metadata
        return content
    if isinstance(value, list | tuple | set | frozenset):
        items = [_loadable(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, tuple):  # a named one becomes a plain one
            return tuple(items)
        return set(items) if isinstance(value, set | frozenset) else items
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, enum.Enum):
        return _loadable(value.value, where)
    for plain_type in _SCALARS:
        if isinstance(value, plain_type):
            return plain_type(value)  # a subclass would be pickled by its name
    raise TypeError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be loaded"
        " safely; a state must consist of tensors, numbers, strings, lists and dicts"
    )


def loadable_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts that `load_checkpoint_file` would accept, and warn about the others."""
    # These are for later readers only: no checkpoint is worth losing for them.
    kept = {}
    for name, value in metadata.items():
        try:
            kept[name] = _loadable(value, f"metadata[{name!r}]")
        except (TypeError, RecursionError) as error:
            logger.warning("not saved in the checkpoint: %s", error)
    return kept


def save_weights_file(
    weights: Mapping[str, Tensor], path: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Save weights without other states; a crash leaves the old file or the new one.

    Args:
        weights: Name -> tensor.
        path: Its ending, one of `WEIGHT_FORMATS`, selects the format.
        metadata: Facts about the weights, such as `thing_classes`, that JSON can represent.

    Raises:
        WeightsError: The ending is unknown.
        MissingPackageError: The format needs safetensors, which is not installed.
    """
    ending = check_weight_format(path)
    metadata = loadable_metadata(metadata or {})
    # Copies, as the formats write the whole storage of a view, or refuse views.
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
        message = f"writing {path} needs the package safetensors: pip install safetensors"
        safetensors = import_package("safetensors.torch", message)
        strings = {"format": "pt", "detkit": json.dumps(metadata, default=str)}
        content = safetensors.save(plain, metadata=strings)
    with atomic_write(path) as file:
        file.write(content)


def check_weight_format(path: str) -> str:
    """Return the ending of a path, one of `WEIGHT_FORMATS`.

    Raises:
        WeightsError: The ending is another one.
    """
    ending = PurePosixPath(path).suffix
    if ending not in WEIGHT_FORMATS:
        raise WeightsError(f"{path} must end with one of {', '.join(WEIGHT_FORMATS)}")
    return ending
