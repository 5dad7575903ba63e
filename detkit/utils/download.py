"""Files fetched once over https into a cache: whole, checked, and safe when two processes ask at once.

The cache is `$FVCORE_CACHE`, else `~/.torch/iopath_cache`, laid out as Detectron2 lays it out: its
downloads are found. With `DETKIT_OFFLINE=1` nothing is fetched, and no socket is opened: what is
not there yet is named, with its place.
"""

import contextlib
import hashlib
import logging
import os
import shutil
import urllib.request
import uuid
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from iopath.common.file_io import file_lock

logger = logging.getLogger(__name__)

SCHEMES = ("https",)
"""Nothing else is fetched: what comes over http may be anybody's."""
_TIMEOUT = 60.0  # seconds without a byte


def is_offline() -> bool:
    """Whether `DETKIT_OFFLINE` forbids the network."""
    return os.environ.get("DETKIT_OFFLINE", "") not in ("", "0")


def cache_path(url: str) -> Path:
    """Return the place of a download in the cache: host apart, its path below the cache's folder."""
    folder = os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache"
    return Path(folder).expanduser() / urlsplit(url).path.lstrip("/")


def fetch(
    url: str, path: Path | None = None, *, sha256: str = "", schemes: tuple[str, ...] = SCHEMES
) -> Path:
    """Return a local copy of a file, from the cache or else from its address.

    Args:
        url: Address.
        path: Where the copy lies, or is put; None for `cache_path`.
        sha256: How the hash of the content begins; empty checks nothing. Files that are there
            already are trusted.
        schemes: Those that are accepted, of `url` and of where it redirects to.

    Raises:
        ValueError: Another scheme, or an address without a file name.
        OSError: Not there and offline; not reachable, cut short, or not what the hash says. Nothing
            is left behind.
    """
    path = cache_path(url) if path is None else path
    if path.is_file():
        return path
    _check_address(url, schemes)
    if is_offline():
        raise OSError(
            f"DETKIT_OFFLINE is set: download {url} on a machine with network, and place it as"
            f" {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(path)):  # who comes second waits, and finds the file
        if not path.is_file():
            logger.info("downloading %s to %s", url, path)
            _download(url, path, sha256, schemes)
    return path


def _check_address(url: str, schemes: tuple[str, ...]) -> None:
    parts = urlsplit(url)
    if parts.scheme not in schemes:
        raise ValueError(f"{url} is not fetched: only {', '.join(schemes)} is")
    if not parts.netloc or not parts.path.strip("/") or parts.path.endswith("/"):
        raise ValueError(f"{url} names no file")
    if ".." in parts.path.split("/"):
        raise ValueError(f"{url} leads out of the cache: '..' in its path")


def _download(url: str, path: Path, sha256: str, schemes: tuple[str, ...]) -> None:
    # Under a name of its own in the same folder, then renamed: a reader sees the whole file or
    # none.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    opener = urllib.request.build_opener(_Redirects(schemes))
    try:
        with (
            contextlib.closing(opener.open(url, timeout=_TIMEOUT)) as answer,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file, 1 << 20)
        _check_length(url, temporary, answer.headers.get("Content-Length"))
        _check_hash(url, temporary, sha256)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _check_length(url: str, path: Path, announced: str | None) -> None:
    size = path.stat().st_size
    if size == 0:
        raise OSError(f"{url} is empty")
    if announced is not None and size != int(announced):
        raise OSError(f"the download of {url} was cut short: {size} of {announced} bytes came")


def _check_hash(url: str, path: Path, sha256: str) -> None:
    if not sha256:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(sha256):
        raise OSError(
            f"{url} is not what it should be: its sha256 is {digest.hexdigest()}, expected"
            f" {sha256}..."
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the accepted schemes only."""

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self.schemes = schemes

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:
        if urlsplit(newurl).scheme not in self.schemes:
            raise OSError(
                f"{req.full_url} redirects to {newurl}: only {', '.join(self.schemes)} is followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
