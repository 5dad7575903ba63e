"""Downloads over https into a cache: whole, checked, and safe with several processes at once.

The cache is `$FVCORE_CACHE`, else `~/.torch/iopath_cache`, with the layout of Detectron2, so that
its downloads are found. With `DETKIT_OFFLINE=1` no socket is opened: a missing file is an error
that names its address and its place.
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

from detkit.utils.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

SCHEMES = ("https",)
"""Not http: anybody on the way could answer."""
_TIMEOUT = 60.0  # seconds without a byte


class DownloadError(UserError, OSError):
    """A file that could not be downloaded whole."""


def is_offline() -> bool:
    """Return whether `DETKIT_OFFLINE` forbids the network."""
    return os.environ.get("DETKIT_OFFLINE", "") not in ("", "0")


def cache_path(url: str) -> Path:
    """Return the place of a download in the cache: the path of its address, without the host."""
    folder = os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache"
    return Path(folder).expanduser() / urlsplit(url).path.lstrip("/")


def fetch(
    url: str, path: Path | None = None, *, sha256: str = "", schemes: tuple[str, ...] = SCHEMES
) -> Path:
    """Return a local copy of a file, from the cache or else from its address.

    Args:
        url: Address.
        path: Place of the copy; None for `cache_path`.
        sha256: First digits of the hash of the content; empty checks nothing. Existing files are
            trusted.
        schemes: Those that are accepted, of `url` and of its redirects.

    Raises:
        ConfigError: The address has another scheme, or no file name.
        DownloadError: The file is missing and the network is forbidden.
        DownloadError: The download was cut short, or the hash differs. Nothing is left behind.
        OSError: The server cannot be reached.
    """
    path = cache_path(url) if path is None else path
    if path.is_file():
        return path
    _check_address(url, schemes)
    if is_offline():
        raise DownloadError(
            f"DETKIT_OFFLINE is set: download {url} on a machine with network, and place it as"
            f" {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(path)):  # the second process waits, and then finds the file
        if not path.is_file():
            logger.info("downloading %s to %s", url, path)
            _download(url, path, sha256, schemes)
    return path


def _check_address(url: str, schemes: tuple[str, ...]) -> None:
    parts = urlsplit(url)
    if parts.scheme not in schemes:
        raise ConfigError(f"{url} is not fetched: only {', '.join(schemes)} is")
    if not parts.netloc or not parts.path.strip("/") or parts.path.endswith("/"):
        raise ConfigError(f"{url} names no file")
    if ".." in parts.path.split("/"):
        raise ConfigError(f"{url} leads out of the cache: '..' in its path")


def _download(url: str, path: Path, sha256: str, schemes: tuple[str, ...]) -> None:
    # Under its own name in the same folder, then renamed: a reader sees the whole file or none.
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
        raise DownloadError(f"{url} is empty")
    if announced is not None and size != int(announced):
        raise DownloadError(
            f"the download of {url} was cut short: {size} of {announced} bytes came"
        )


def _check_hash(url: str, path: Path, sha256: str) -> None:
    if not sha256:
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if not digest.hexdigest().startswith(sha256):
        raise DownloadError(
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
            raise DownloadError(
                f"{req.full_url} redirects to {newurl}: only {', '.join(self.schemes)} is followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
