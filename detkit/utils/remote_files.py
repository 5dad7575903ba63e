"""Data files at addresses: `https://`, stores that fsspec knows, and archives of files.

    https://host/a.jpg        s3://bucket/a.jpg        gs://bucket/a.jpg
    zip://train/a.jpg::https://host/shard.zip          tar://a.jpg::/data/shard.tar

Files are copied to `remote` in the cache (`$FVCORE_CACHE`), archives as a whole, when they are
first read. The copies take `$DETKIT_REMOTE_CACHE_GB` together (default 32): those that were not
used for longest make room, by any of the processes that share the cache.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path, PurePath
from types import NoneType
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote

from iopath.common.file_io import file_lock

from detkit.utils.download import (
    SCHEMES,
    DownloadError,
    cache_root,
    download,
    is_offline,
    redacted,
    require_no_password,
)
from detkit.utils.errors import ConfigError, MissingFileError, MissingPackageError

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://")
_ARCHIVES = ("zip", "tar")
_WEB = ("https", "http", "ftp")
_WAITS = (1.0, 4.0)  # seconds before a second and a third try
_MAX_BYTES = 4 << 30  # of a file in an archive, which may be packed a thousandfold
_KEPT_SHARE = 0.9  # of the cache once room was made, so that it is rarely listed


def is_address(path: str) -> bool:
    """Return whether a path is an address, such as `s3://bucket/folder`."""
    return _ADDRESS.match(path) is not None


def join_address(folder: str, name: str) -> str:
    """Return the address of a file below a folder, which may lie in an archive."""
    first, chain, source = folder.partition("::")
    name = quote(name) if first.startswith("https:") else name
    return f"{first}{'' if first.endswith('/') else '/'}{name}{chain}{source}"


def stem_of(file_name: str) -> str:
    """Return the name of a file without folders and ending, also where it lies in an archive."""
    inside = file_name.partition("::")[0] if is_address(file_name) else file_name
    return PurePath(inside).stem


def relocated(path: str, place: Callable[[str], str]) -> str:
    """Return a path, or an address whose archive is a local file, with `place` applied to it."""
    first, chain, source = path.partition("::")
    if not is_address(path):
        return place(path)
    return f"{first}::{place(source)}" if chain and not is_address(source) else path


def require_address(address: str) -> None:
    """Check that an address, or a folder's, is of a kind that can be read.

    Raises:
        ConfigError: It is not.
        MissingFileError: A local archive does not exist.
        MissingPackageError: A package that reads it is not installed.
    """
    require_no_password(address)
    first, chain, source = address.partition("::")
    scheme, shown = first.partition("://")[0], redacted(address)
    if bool(chain) != (scheme in _ARCHIVES) or "::" in source:
        raise ConfigError(
            f"cannot read {shown}: need a file's address such as s3://BUCKET/FILE, or"
            " zip://FILE::ARCHIVE or tar://FILE::ARCHIVE with the path or address of an archive"
        )
    if scheme in _WEB:
        if scheme not in SCHEMES:
            raise ConfigError(f"{shown} is not fetched: only {', '.join(SCHEMES)} is")
        return
    try:
        importlib.import_module("fsspec").get_filesystem_class(scheme)
    except ValueError as error:  # in fsspec's list of schemes there is none
        raise ConfigError(f"{shown}: {error}") from error
    except ImportError as error:
        raise MissingPackageError(
            f"reading {shown} needs more packages: pip install 'detkit-vision[remote]' ({error})"
        ) from error
    if is_address(source):
        require_address(source)
    elif chain and not Path(source).is_file():
        raise MissingFileError(f"archive {source} does not exist, as {shown} has it")


def read_address(address: str) -> bytes:
    """Return the content of a file.

    Raises:
        ConfigError: See `require_address`; or the file is not in the cache, and `DETKIT_OFFLINE`
            is set.
        MissingFileError, MissingPackageError: See `require_address`.
        DownloadError: The file does not exist, or cannot be fetched or unpacked.
    """
    first, chain, source = address.partition("::")
    if not chain:
        with _opened_copy(address) as file:
            return file.read()
    require_address(address)
    scheme, _, name = first.partition("://")
    try:
        # Archives stay open, each thread and forked process has its own: they share no position.
        archive = _archive(scheme, source, os.getpid(), threading.get_ident())
        with archive.open(name, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (DownloadError, ConfigError):
        raise
    except Exception as error:  # zipfile, tarfile, zlib, lzma and fsspec have dozens
        raise DownloadError(f"{redacted(address)}: {type(error).__name__}: {error}") from error
    if len(data) > _MAX_BYTES:
        raise DownloadError(f"{redacted(address)} has more than {_MAX_BYTES} bytes")
    return data


@functools.lru_cache(maxsize=16)
def _archive(scheme: str, source: str, process: int, thread: int) -> Any:
    if is_address(source):
        archive = _opened_copy(source)
    else:
        archive = Path(source).open("rb")  # noqa: SIM115
    fsspec = importlib.import_module("fsspec")
    return fsspec.filesystem(scheme, fo=archive, skip_instance_cache=True)


def _opened_copy(address: str) -> BinaryIO:
    """Open the copy of a file, which is made if there is none.

    An open file, and no path: another process may remove the copy at any time.
    """
    key = hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()
    root = cache_root() / "remote"
    path = root / key[:2] / key
    with contextlib.suppress(FileNotFoundError):
        return _opened(path)
    require_address(address)
    if is_offline():
        raise ConfigError(
            f"DETKIT_OFFLINE is set, and {redacted(address)} is not in the cache {root}"
        )
    limit = _limit()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lock for each 256th of the files: one per file would leave as many lock files.
    with file_lock(str(path.parent)):
        with contextlib.suppress(FileNotFoundError):
            return _opened(path)
        _copy(address, path, limit)
        file = _opened(path)
        _make_room(root, os.fstat(file.fileno()).st_size, limit)
        return file


def _opened(path: Path) -> BinaryIO:
    file = path.open("rb")
    with contextlib.suppress(OSError):  # in a cache that others own
        os.utime(path)
    return file


def _limit() -> int:
    text = os.environ.get("DETKIT_REMOTE_CACHE_GB", "32")
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise ConfigError(f"DETKIT_REMOTE_CACHE_GB must be a number above 0, got {text!r}")
    return limit


def _copy(address: str, path: Path, limit: int) -> None:
    for wait in (*_WAITS, None):
        try:
            if address.startswith(_WEB):
                download(address, path, schemes=SCHEMES, max_bytes=limit, progress=False)
            else:
                _copy_from_store(address, path, limit)
            return
        except DownloadError as error:
            cause = error.__cause__
            is_final = isinstance(cause, FileNotFoundError | PermissionError | NoneType) or (
                isinstance(cause, HTTPError) and cause.code < 500 and cause.code != 429
            )
            if wait is None or is_final:
                raise
        time.sleep(wait)


def _copy_from_store(address: str, path: Path, limit: int) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        store, name = importlib.import_module("fsspec").core.url_to_fs(address)
        size = store.size(name)
        if size is not None and size > limit:
            raise DownloadError(
                f"{redacted(address)} has {size} bytes, DETKIT_REMOTE_CACHE_GB are {limit}"
            )
        with store.open(name, "rb") as source, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
        temporary.replace(path)
    except DownloadError:
        raise
    except Exception as error:  # each store has errors of its own
        raise DownloadError(f"{redacted(address)}: {type(error).__name__}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _make_room(root: Path, added: int, limit: int) -> None:
    """Count a new copy, and remove the copies used longest ago if all take more than `limit`."""
    count = root / "bytes"
    with file_lock(str(count)):
        try:
            total = int(count.read_text()) + added
        except (FileNotFoundError, ValueError):
            total = limit + 1  # unknown
        if total > limit:
            # Not through links, which lead out of the cache. Half copies of killed processes count.
            folders = [e for e in os.scandir(root) if e.is_dir(follow_symlinks=False)]
            files = []
            for entry in (entry for folder in folders for entry in os.scandir(folder.path)):
                with contextlib.suppress(FileNotFoundError):  # a process has renamed its half copy
                    state = entry.stat(follow_symlinks=False)
                    files.append((state.st_mtime_ns, state.st_size, entry.path))
            total = sum(size for _, size, _ in files)
            target = total if total <= limit else _KEPT_SHARE * limit
            for _, size, path in sorted(files)[:-1]:  # the newest is the one that was asked for
                if total <= target:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size
        count.write_text(str(total))
