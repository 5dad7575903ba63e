"""Downloads over https into a cache: atomic, verified, and safe with several processes.

The cache is `$FVCORE_CACHE`, else `~/.torch/iopath_cache`. For files of Detectron2's host it has
Detectron2's layout, so that both share them. With `DETKIT_OFFLINE=1`, a missing file is an error
that says what to place where.
"""

import contextlib
import hashlib
import logging
import os
import re
import ssl
import string
import sys
import urllib.request
import uuid
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import IO, Any
from urllib.error import URLError
from urllib.parse import quote, urlsplit

from iopath.common.file_io import file_lock
from tqdm import tqdm

from detkit.utils.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

SCHEMES = ("https",)
"""Without http, where anybody on the network could replace the file."""
_DETECTRON2_HOST = "dl.fbaipublicfiles.com"
_TIMEOUT = 60.0  # seconds without a byte
_NETWORK_ERRORS = (URLError, TimeoutError, ConnectionError, ssl.SSLError, HTTPException)
# Ends a stream without end; the largest published detectors have 3 GB.
_MAX_BYTES = 32 << 30


class DownloadError(UserError, OSError):
    """A file that could not be downloaded completely."""


def redacted(address: str) -> str:
    """Return an address for messages: without the query, which may be a signature."""
    return re.sub(r"(https?://[^?]*\?).+", r"\1...", address)


def require_no_password(address: str) -> None:
    """Raise a ConfigError if an address has a user or a password before its host."""
    if found := re.search(r"://[^/@]*@", address):
        hidden = redacted(address).replace(found[0], "://...@")
        raise ConfigError(
            f"{hidden} has a user or password, which logs and copies of the config would show: set"
            " them in the environment, or in a file of the package that reads the address"
        )


def is_offline() -> bool:
    """Return whether `DETKIT_OFFLINE` forbids the network."""
    return os.environ.get("DETKIT_OFFLINE", "") not in ("", "0")


def cache_root() -> Path:
    """Return the folder of the cache."""
    return Path(os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache").expanduser()


def cache_path(url: str) -> Path:
    """Return the path of a download in the cache: `HOST/PATH`, with a hash of the query.

    Files of Detectron2's own host are where Detectron2 has them, without the host.

    Raises:
        ConfigError: The path leads out of the cache.
    """
    parts = urlsplit(url)
    host = "" if parts.netloc == _DETECTRON2_HOST else parts.netloc.lower().replace(":", "_")
    if host and "." not in host:
        host += "."  # a host of the local network may be called like a folder of Detectron2
    root = cache_root()
    path = root / host / parts.path.lstrip("/")
    if parts.query:
        digest = hashlib.sha256(parts.query.encode()).hexdigest()[:16]
        path = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    if "\0" in url or not path.resolve().is_relative_to(root.resolve()):
        raise ConfigError(f"{url!r} leads out of the cache {root}")
    return path


def fetch(
    url: str, path: Path | None = None, *, sha256: str = "", schemes: tuple[str, ...] = SCHEMES
) -> Path:
    """Return the local copy of a file, downloaded if it does not exist.

    Args:
        url: Address.
        path: Path of the copy; None for `cache_path`.
        sha256: First digits of the hash, checked after a download; empty skips the check.
        schemes: Accepted schemes of `url` and of its redirects.

    Raises:
        ConfigError: The address has another scheme, or no file name, or leads out of the cache.
        DownloadError: The file does not exist, and `DETKIT_OFFLINE` is set.
        DownloadError: The server cannot be reached, or does not send the file.
        DownloadError: The download is incomplete or its hash differs; it is deleted.
    """
    require_no_password(url)
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"{redacted(url)} is not an address: {error}") from error
    if parts.scheme not in schemes:
        raise ConfigError(f"{redacted(url)} is not fetched: only {', '.join(schemes)} is")
    if not parts.netloc or not parts.path.strip("/") or parts.path.endswith("/"):
        raise ConfigError(f"{redacted(url)} names no file")
    path = cache_path(url) if path is None else path
    if path.is_file():
        return path
    if is_offline():
        raise DownloadError(
            f"DETKIT_OFFLINE is set: download {redacted(url)} on a machine with network, and place"
            f" it as {path}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(str(path)):  # other processes wait, and then find the file
        if not path.is_file():
            logger.info("downloading %s to %s", redacted(url), path)
            download(url, path, sha256, schemes)
    return path


def download(
    url: str,
    path: Path,
    sha256: str = "",
    schemes: tuple[str, ...] = SCHEMES,
    max_bytes: int | None = None,
    progress: bool = True,
) -> None:
    """Download a file to `path`, with a bar on a terminal; see `fetch`, which does so once.

    Raises:
        DownloadError: As there; or the file has more than `max_bytes`, 32 GiB if None.
    """
    limit = _MAX_BYTES if max_bytes is None else max_bytes
    shown = redacted(url)
    # To a temporary file in the same folder, then renamed: readers never see a part of the file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    opener = urllib.request.build_opener(_Redirects(schemes))
    try:
        with (
            # Spaces and other letters than ASCII's are quoted, as browsers do.
            contextlib.closing(
                opener.open(quote(url, string.punctuation), timeout=_TIMEOUT)
            ) as answer,
            temporary.open("wb") as file,
            tqdm(
                total=int(answer.headers.get("Content-Length") or 0) or None,
                file=sys.stdout,
                disable=not (progress and sys.stdout.isatty()),
                dynamic_ncols=True,
                leave=False,
                unit="B",
                unit_scale=True,
            ) as bar,
        ):
            while part := answer.read(1 << 20):
                if file.tell() + len(part) > limit:
                    raise DownloadError(f"{shown} sends more than {limit} bytes")
                file.write(part)
                bar.update(len(part))
        size, announced = temporary.stat().st_size, answer.headers.get("Content-Length")
        if size == 0:
            raise DownloadError(f"{shown} is empty")
        if announced is not None and size != int(announced):
            cut = IncompleteRead(b"", int(announced) - size)
            raise DownloadError(
                f"incomplete download of {shown}: {size} of {announced} bytes"
            ) from cut
        digest = hashlib.sha256()
        with temporary.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        found = digest.hexdigest()
        if not found.startswith(sha256):
            raise DownloadError(
                f"{shown} has sha256 {found}, expected one that starts with {sha256}"
            )
        temporary.replace(path)
    except (*_NETWORK_ERRORS, ValueError) as error:
        raise DownloadError(f"{shown}: {error or type(error).__name__}") from error
    finally:
        temporary.unlink(missing_ok=True)


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
                f"{redacted(req.full_url)} redirects to {redacted(newurl)}: only"
                f" {', '.join(self.schemes)} is followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)
