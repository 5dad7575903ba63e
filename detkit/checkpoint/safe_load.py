"""Loading of checkpoint files as data: no code in a file is run.

The first bytes of a file choose its reader, not its name: torch's zip and legacy formats go to
`torch.load` with `weights_only=True`, other pickles to `array_unpickler`. Only `.safetensors` goes
by name.
"""

import importlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from detkit.checkpoint.array_unpickler import UnsafePickleError, load_array_pickle
from detkit.utils.download import DownloadError, is_offline
from detkit.utils.errors import MissingFileError, MissingPackageError, WeightsError
from detkit.utils.file_io import PathManager

_ZIP = b"PK\x03\x04"
# torch.save before version 1.6: the pickle of a magic number comes first.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"
# Keys of the weights in checkpoints of detkit and Detectron2, of Lightning and MMDetection, and of
# Detectron.
_WEIGHT_KEYS = ("model", "state_dict", "blobs")
# Saved buffers may repeat a few values many times (`Tensor.expand`); weights do not, beyond this.
_MAX_REPEATED_BYTES = 2**26


class CheckpointError(WeightsError):
    """A file that is no checkpoint, is broken, or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A file that asks for functions or classes that weights do not need; none was called."""


def load_checkpoint_file(path: str) -> dict[str, Any]:
    """Read a checkpoint of any known format onto the CPU.

    Args:
        path: Local path, or an address that `PathManager` knows (`https://`, `detectron2://`),
            fetched once and cached.

    Returns:
        The content of the file, with the weights under `model`: a dict from name to tensor. A file
        of weights alone becomes `{"model": weights}`.

    Raises:
        MissingFileError: There is no such file.
        DownloadError: It could not be fetched.
        UnsafeCheckpointError: The file asks for code; the message names it.
        CheckpointError: The file is empty, truncated or no checkpoint.
    """
    local = local_checkpoint_file(path)
    try:
        loaded = _read(local, path)
    except (CheckpointError, ImportError):
        raise
    except UnsafePickleError as error:
        raise _unsafe(path, error.asked_for) from error
    except pickle.UnpicklingError as error:
        # torch's message advises to load the file unsafely: only the refused name is passed on.
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is not None:
            raise _unsafe(path, refused[1]) from None
        raise CheckpointError(f"{path} is not a readable checkpoint: {_gist(error)}") from None
    except Exception as error:  # broken files cause any error: MemoryError, RecursionError, ...
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {_gist(error)}") from error
    return _with_model_key(loaded, path)


def local_checkpoint_file(path: str) -> Path:
    """Return the local file of a path or address, downloaded where needed.

    Raises:
        MissingFileError: There is no such file.
        DownloadError: It cannot be fetched.
    """
    try:
        local = Path(PathManager.get_local_path(path))
    except OSError as error:
        advice = " Without network, download the file elsewhere and give its path."
        raise DownloadError(
            f"could not fetch {path}: {error}.{'' if is_offline() else advice}"
        ) from error
    if not local.is_file():
        raise MissingFileError(
            f"no checkpoint at {path}" + (", which is a folder" if local.is_dir() else "")
        )
    return local


def _read(local: Path, path: str) -> Any:
    with local.open("rb") as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise CheckpointError(f"{path} is empty")
        if local.suffix == ".safetensors":
            return _read_safetensors(local, path)
        if head.startswith(_ZIP):
            require_stored_zip(file)
        if head.startswith((_ZIP, _LEGACY_TORCH)):
            return torch.load(file, map_location="cpu", weights_only=True)
        if head.startswith(_PICKLE):
            return load_array_pickle(file)
    raise CheckpointError(f"{path} is not a checkpoint: it starts with {head[:24]!r}.{_hint(head)}")


def require_stored_zip(file: IO[bytes]) -> None:
    """Refuse a zip archive whose members claim more bytes than the file has.

    Raises:
        ValueError: They do.
        zipfile.BadZipFile: The archive is incomplete.
    """
    # torch stores members uncompressed. Members that overlap claim too much as well: Fifield 2019,
    # A better zip bomb.
    num_bytes = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        claimed = sum(member.file_size for member in archive.infolist())
    file.seek(0)
    if claimed > num_bytes:
        raise ValueError(
            f"it is a zip of {num_bytes} bytes whose members claim {claimed}: compressed, or a zip"
            " bomb; torch.save writes them uncompressed"
        )


def _read_safetensors(local: Path, path: str) -> dict[str, Any]:
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError as error:
        raise MissingPackageError(
            f"reading {path} needs the package safetensors: pip install safetensors"
        ) from error
    with safetensors.safe_open(local, framework="pt") as file:
        weights: dict[str, Any] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = (file.metadata() or {}).get("detkit")
    # The format has a table of strings beside the tensors; detkit writes JSON there.
    if metadata is None:
        return weights
    if not isinstance(parsed := json.loads(metadata), dict):
        raise CheckpointError(
            f"{path} must hold a JSON object under its metadata 'detkit', holds {parsed!r:.80}"
        )
    return {"model": weights, "metadata": parsed}


def _with_model_key(loaded: Any, path: str) -> dict[str, Any]:
    """Move the weights to `model`, from the key that the file has them under."""
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} is not a checkpoint: it holds a {type(loaded).__name__}, not a dict"
        )
    for key in _WEIGHT_KEYS:
        if isinstance(loaded.get(key), dict):
            rest = {name: value for name, value in loaded.items() if name != key}
            return {**rest, "model": _checked_weights(loaded[key], path)}
    if not any(isinstance(value, Tensor) for value in loaded.values()):
        keys = ", ".join(repr(key) for key in list(loaded)[:8])
        raise CheckpointError(
            f"{path} is not a checkpoint: it has neither weights nor a 'model' among its keys:"
            f" {keys}"
        )
    return {"model": _checked_weights(loaded, path)}


def _checked_weights(weights: dict[Any, Any], path: str) -> dict[str, Tensor]:
    if not weights:
        raise CheckpointError(f"{path} holds no weights: its dict of them is empty")
    for name, value in weights.items():
        # Modules may keep any object under `_extra_state` (torch.nn.Module.get_extra_state).
        is_extra = isinstance(name, str) and name.endswith("_extra_state")
        if not isinstance(name, str) or not (isinstance(value, Tensor) or is_extra):
            raise CheckpointError(
                f"{path} is not a checkpoint: {name!r} is a {type(value).__name__}, not a tensor"
            )
        problem = tensor_problem(value) if isinstance(value, Tensor) else ""
        if problem:
            raise CheckpointError(f"{path} is not a checkpoint: {name!r} is {problem}")
    return weights


def tensor_problem(tensor: Tensor) -> str:
    """Return why a tensor of a file cannot be weights, or "" if it can."""
    # Meta tensors and expanded ones claim any shape without stored data.
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
        f"{path} asks for {asked_for}, which no weights need. Nothing of it was run. If you trust"
        " its source, convert it elsewhere to bare weights: torch.save(model.state_dict(),"
        " 'weights.pth')."
    )


def _gist(error: BaseException) -> str:
    """Return the type of an error and its first line that is not advice about `weights_only`."""
    for line in str(error).splitlines():
        if line.strip() and "weights_only" not in line:
            return f"{type(error).__name__}: {line.strip()}"
    return f"{type(error).__name__}: unreadable"


def _hint(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs"):
        return " It is a pointer of Git LFS: fetch the file itself with `git lfs pull`."
    if head.lstrip()[:1] == b"<":
        return " It looks like a web page: the download went to the wrong address."
    return ""
