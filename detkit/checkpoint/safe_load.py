"""Safe loading of checkpoint files, without running code in them.

The first bytes of a file select its reader: torch's zip and legacy formats are read by `torch.load`
with `weights_only=True`, other pickles by `array_unpickler`. Only safetensors are recognised by
the ending of the file name.
"""

import io
import json
import logging
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from detkit.checkpoint.array_unpickler import (
    UnsafePickleError,
    load_array_pickle,
    require_modest_pickle,
)
from detkit.utils.download import DownloadError, is_offline
from detkit.utils.errors import MissingFileError, WeightsError, import_package
from detkit.utils.file_io import PathManager
from detkit.utils.text import listed

logger = logging.getLogger(__name__)

_ZIP = b"PK\x03\x04"
# torch.save before version 1.6: the pickle of a magic number comes first.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"
# Where checkpoints keep their weights: detkit and Detectron2; Lightning and MMDetection; Detectron.
_WEIGHT_KEYS = ("model", "state_dict", "model_state", "blobs")
# `Tensor.expand` lets a file of a few bytes claim a huge tensor. Small expanded buffers are common,
# so this many bytes are allowed.
_MAX_REPEATED_BYTES = 2**26


class CheckpointError(WeightsError):
    """A file that is not a checkpoint, is damaged, or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A file that names functions or classes that weights do not need; none was called."""


def load_checkpoint_file(path: str) -> dict[str, Any]:
    """Load a checkpoint of any known format onto the CPU.

    Args:
        path: Local path, or an address that `PathManager` knows (`https://`, `detectron2://`),
            downloaded once and cached.

    Returns:
        The content of the file, with the weights under `model`: a dict from name to tensor. A file
        of weights alone becomes `{"model": weights}`.

    Raises:
        MissingFileError: The file does not exist.
        DownloadError: The file could not be downloaded.
        UnsafeCheckpointError: The file names code to run; the message says which.
        CheckpointError: The file is empty, truncated or not a checkpoint.
    """
    local = local_checkpoint_file(path)
    try:
        loaded = _read(local, path)
    except (CheckpointError, ImportError):
        raise
    except UnsafePickleError as error:
        raise _unsafe(path, error.asked_for) from error
    except pickle.UnpicklingError as error:
        # torch's message recommends weights_only=False: take over only the name that it refused.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is not None:
            raise _unsafe(path, refused[1]) from None
        raise CheckpointError(f"{path} is not a readable checkpoint: {_gist(error)}") from None
    except Exception as error:  # damaged files raise anything: MemoryError, RecursionError, ...
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {_gist(error)}") from error
    return _with_model_key(loaded, path)


def local_checkpoint_file(path: str) -> Path:
    """Return the local file of a path or address, downloaded if necessary.

    Raises:
        MissingFileError: The file does not exist.
        DownloadError: The file could not be downloaded.
    """
    try:
        local = Path(PathManager.get_local_path(path))
    except OSError as error:
        advice = " Without network, download the file elsewhere and give its path."
        raise DownloadError(
            f"could not fetch {path}: {error}.{'' if is_offline() else advice}"
        ) from error
    if not local.is_file():
        fault = f"no checkpoint at {path}"
        if local.is_dir():
            files = sorted(file.name for file in local.glob("*.pth"))
            fault += ", which is a folder" + (f": name a file, of {listed(files)}" if files else "")
        raise MissingFileError(fault)
    return local


def _read(local: Path, path: str) -> Any:
    with local.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{path} is empty")
        if local.suffix == ".safetensors":
            return _read_safetensors(local, path)
        if head.startswith((_ZIP, _LEGACY_TORCH)):
            require_modest_torch(file)
            return torch.load(file, map_location="cpu", weights_only=True)
        if head.startswith(_PICKLE):
            return load_array_pickle(file)
    hint = ""
    if head.startswith(b"version https://git-lfs"):
        hint = " It is a pointer of Git LFS: fetch the file itself with `git lfs pull`."
    elif head.lstrip().startswith(b"<"):
        hint = " It looks like a web page: check the address of the download."
    raise CheckpointError(f"{path} is not a checkpoint: it starts with {head[:24]!r}.{hint}")


def require_modest_torch(file: IO[bytes]) -> None:
    """Refuse a file of torch whose pickles or members claim more than it holds.

    Raises:
        ValueError: It is a zip bomb.
        zipfile.BadZipFile: The archive is incomplete.
        pickle.UnpicklingError: See `require_modest_pickle`.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:
        file.seek(0)
        for _ in range(5):  # a magic number, the version, the system, the content, and its keys
            require_modest_pickle(file, num_bytes)
    else:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            # torch stores members uncompressed, so only zip bombs are larger: compressed members,
            # or overlapping ones (Fifield 2019, A better zip bomb).
            claimed = sum(member.file_size for member in members)
            is_compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
            if is_compressed or claimed > num_bytes or not _has_one_directory(file, archive):
                raise ValueError(
                    f"it is a zip of {num_bytes} bytes whose members claim {claimed}: compressed,"
                    " with two directories, or a zip bomb. Save it again with torch.save"
                )
            for member in members:
                if member.filename.lower().endswith("data.pkl"):
                    require_modest_pickle(io.BytesIO(archive.read(member)), num_bytes)
    file.seek(0)


def _has_one_directory(file: IO[bytes], archive: zipfile.ZipFile) -> bool:
    """Return whether every reader finds the directory that Python's zipfile has found."""
    # zipfile looks for the directory right before its end record, torch where the record says.
    # Both agree if the records are the last bytes of the file, without gaps and comments.
    end = file.seek(-22, os.SEEK_END)
    signature, size, offset, comment = struct.unpack("<4s8x2IH", file.read(22))
    file.seek(max(0, end - 76))
    records = file.read(76)
    if records[56:60] == b"PK\x06\x07":  # zip64: another end record, and a locator of it
        (located,) = struct.unpack("<8xQ4x", records[56:])
        end -= 76
        if located != end:
            return False
        size, offset = struct.unpack("<40x2Q", records[:56])
    return (
        signature == b"PK\x05\x06"
        and comment == 0
        and offset + size == end
        and archive.start_dir == offset
    )


def _read_safetensors(local: Path, path: str) -> dict[str, Any]:
    message = f"reading {path} needs the package safetensors: pip install safetensors"
    safetensors = import_package("safetensors", message)
    with safetensors.safe_open(local, framework="pt") as file:
        weights: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = (file.metadata() or {}).get("detkit")
    # safetensors allow a table of strings beside the tensors; detkit stores JSON there.
    if metadata is None:
        return weights
    if not isinstance(parsed := json.loads(metadata), dict):
        raise CheckpointError(
            f"{path} must hold a JSON object under its metadata 'detkit', holds {parsed!r:.80}"
        )
    return {"model": weights, "metadata": parsed}


def _with_model_key(loaded: Any, path: str) -> dict[str, Any]:
    """Return the checkpoint with its weights under `model`, whatever key the file uses."""
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds a {type(loaded).__name__}, not a dict"
        )
    if "metadata" in loaded:
        loaded = {**loaded, "metadata": _usable_metadata(loaded["metadata"], path)}
    for key in _WEIGHT_KEYS:
        if isinstance(loaded.get(key), dict):
            rest = {name: value for name, value in loaded.items() if name != key}
            return {**rest, "model": checked_weights(loaded[key], path)}
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = ", ".join(f"{key!r:.40}" for key in list(loaded)[:8])
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no weights, and no 'model' among its keys {keys}"
        )
    return {"model": checked_weights(loaded, path)}


def _usable_metadata(saved: Any, path: str) -> dict[str, Any]:
    """Return the entries of a checkpoint's metadata that are what their names say."""
    if not isinstance(saved, Mapping):
        logger.warning("the metadata in %s are no table of names: they are left out", path)
        return {}
    usable = {key: value for key, value in saved.items() if _is_usable(key, value)}
    left_out = [key for key in saved if key not in usable]
    if left_out:
        names = ", ".join(f"{key!r:.40}" for key in left_out[:5])
        logger.warning("metadata in %s that cannot be used are left out: %s", path, names)
    return usable


def _is_usable(key: Any, value: Any) -> bool:
    if not isinstance(key, str):
        return False
    if key in ("thing_classes", "stuff_classes", "keypoint_names"):
        return _is_list(value) and all(isinstance(name, str) for name in value)
    if key in ("thing_colors", "stuff_colors"):
        return _is_list(value) and all(map(_is_color, value))
    if key == "keypoint_connection_rules":
        return _is_list(value) and all(
            _is_list(rule)
            and len(rule) == 3
            and all(isinstance(end, str) for end in rule[:2])
            and _is_color(rule[2])
            for rule in value
        )
    return key != "ignore_label" or value is None or isinstance(value, int)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_color(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) == 3
        and all(isinstance(level, int | float) and 0 <= level <= 255 for level in value)
    )


def checked_weights(weights: dict[Any, Any], path: str) -> dict[str, Tensor]:
    """Return the weights of a file if they are tensors by name, with their numbers stored.

    Raises:
        CheckpointError: They are not.
    """
    if not weights:
        raise CheckpointError(f"{path} holds no weights: their dict is empty")
    for name, value in weights.items():
        # Modules may keep any object under `_extra_state` (torch.nn.Module.get_extra_state).
        is_extra = isinstance(name, str) and name.endswith("_extra_state")
        if not isinstance(name, str) or not (isinstance(value, Tensor) or is_extra):
            raise CheckpointError(
                f"{path} is not a checkpoint: {name!r:.80} is a {type(value).__name__},"
                " not a tensor"
            )
        problem = tensor_problem(value) if isinstance(value, Tensor) else ""
        if problem:
            raise CheckpointError(f"{path} is not a checkpoint: {name!r:.80} is {problem}")
    return weights


def tensor_problem(tensor: Tensor) -> str:
    """Return why a tensor of a file cannot be weights, or "" if it can."""
    # Meta and expanded tensors may have any shape without stored data.
    if tensor.is_meta or tensor.layout != torch.strided:
        return (
            f"a tensor of shape {tuple(tensor.shape)} that is"
            f" {'on meta' if tensor.is_meta else tensor.layout}"
        )
    shown, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if shown > max(stored, _MAX_REPEATED_BYTES):
        return (
            f"a tensor of shape {tuple(tensor.shape)}, {shown} bytes, of which {stored} are stored"
        )
    return ""


def _unsafe(path: str, asked_for: str) -> UnsafeCheckpointError:
    return UnsafeCheckpointError(
        f"{path} asks for {asked_for:.80}, which weights do not need. Nothing of it was run. If you"
        " trust its source, convert it to plain weights: torch.save(model.state_dict(), 'w.pth')."
    )


def _gist(error: BaseException) -> str:
    """Return the type of an error and its first line without advice about `weights_only`."""
    for line in str(error).splitlines():
        if line.strip() and "weights_only" not in line:
            return f"{type(error).__name__}: {line.strip():.300}"
    return type(error).__name__
