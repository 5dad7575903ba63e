"""The folder of a run: the identity of the run that it belongs to, and the lock of its training.

Each run has an identity, a text that no other run has. Its checkpoints carry it, and so does
`detkit_run.json` in its folder, which the process that trains keeps locked. A run that version
0.1.0 began has "", as its checkpoints and its folder say nothing.
"""

import contextlib
import errno
import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detkit.utils.errors import UserError
from detkit.utils.text import file_stem

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked
    fcntl = None

logger = logging.getLogger(__name__)

_RECORD = "detkit_run.json"
LAST_CHECKPOINT = "last_checkpoint"
# Files that runs append to. Checkpoints of different runs differ by the identity in them.
_METRICS = ("metrics.json", "metrics.csv", "events.out.tfevents.*")


class FolderInUseError(UserError, RuntimeError):
    """A folder in which another process trains."""


def new_identity() -> str:
    """Return the identity of a new run: when it began, and what keeps it apart from others."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}"


def recorded_run(folder: str) -> str | None:
    """Return the identity of the run that a folder belongs to; None if nothing is recorded."""
    try:
        run = _parsed((Path(folder) / _RECORD).read_bytes()).get("run")
    except OSError:
        return None
    return run if isinstance(run, str) else None


@contextlib.contextmanager
def training_in(folder: str, run: str, *, is_new: bool) -> Iterator[None]:
    """Keep a folder for the training of a run inside the block.

    A new run in the folder of another one sets the metrics of that aside, and its checkpoint is no
    longer the one to resume from: what `--resume` continues is the latest run.

    Args:
        folder: Folder of the run; not locked if it is empty or an address.
        run: Identity of the run.
        is_new: Whether the run has begun in this process, and was not resumed.

    Raises:
        FolderInUseError: Another process trains in the folder.
    """
    if not folder or "://" in folder:
        yield
        return
    before = recorded_run(folder)
    lock = lock_folder(folder)
    try:
        if is_new and before != run:
            _set_aside(Path(folder), before or f"before_{run}")
        # Only now: of a run that is killed before, the folder must not have a checkpoint to resume.
        _record(lock, run, folder)
        yield
    finally:
        os.close(lock)


def lock_folder(folder: str) -> int:
    """Lock a folder for this process, and return the descriptor of the lock.

    The lock lasts until the process ends, however it does, or closes a descriptor of the file. A
    process may take its lock again.

    Args:
        folder: Made if absent.

    Raises:
        FolderInUseError: Another process has the lock.
    """
    path = Path(folder) / _RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    # Not by another descriptor: closing that would release the lock.
    before = _parsed(os.read(descriptor, 4096))
    try:
        if fcntl is not None:
            # Of the process, not of the open file (flock): workers, which outlive a killed parent
            # by seconds, do not inherit it.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise FolderInUseError(
                f"another run is training in OUTPUT_DIR {folder}: process {before.get('pid')} on"
                f" {before.get('host')}. Give this run a folder of its own, or wait until the other"
                " one has ended"
            ) from None
        logger.warning("%s cannot be locked (%s): start no second run in it", folder, error)
    _record(descriptor, before.get("run"), folder)
    return descriptor


def _record(descriptor: int, run: str | None, folder: str) -> None:
    content = {"run": run, "host": socket.gethostname(), "pid": os.getpid()}
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    try:
        os.write(descriptor, json.dumps(content).encode())
    except OSError as error:  # a full disk: name the file
        raise OSError(error.errno, error.strerror, str(Path(folder) / _RECORD)) from None


def _parsed(record: bytes) -> dict[str, Any]:
    """Return the content of a record; nothing if a crash has damaged it."""
    try:
        content = json.loads(record)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _set_aside(folder: Path, before: str) -> None:
    """Move the metrics of an earlier run to a folder of their own; remove its last checkpoint."""
    said = []
    metrics = [path for pattern in _METRICS for path in folder.glob(pattern)]
    if metrics:
        # TensorBoard shows a folder as a run of its own.
        target = folder / f"run_{file_stem(before)}"
        target.mkdir(exist_ok=True)
        for path in metrics:
            path.replace(target / path.name)
        said.append(f"its metrics are in {target} now")
    last = folder / LAST_CHECKPOINT
    if last.is_file():
        name = last.read_bytes().decode(errors="replace").strip()
        last.unlink()
        said.append(
            f"--resume continues the new run (to continue the former one, write {name!r} into"
            f" {last})"
        )
    if said:
        logger.warning(
            "a new run begins in %s, which holds another run: %s. Checkpoints of equal names are"
            " replaced. A run of its own needs an OUTPUT_DIR of its own",
            folder,
            "; ".join(said),
        )
