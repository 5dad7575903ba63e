"""`PathManager` for files, URLs and model zoo addresses, and the folders of data and configs."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from iopath.common.file_io import NativePathHandler, PathHandler
from iopath.common.file_io import PathManager as _PathManager

from detkit.utils.download import DownloadError, fetch, redacted
from detkit.utils.errors import DataError, MissingFileError
from detkit.utils.remote_files import is_address, read_address
from detkit.utils.text import did_you_mean, listed

__all__ = [
    "PathManager",
    "dataset_root",
    "files_below",
    "has_own_handler",
    "packaged_configs",
    "read_file",
    "read_text",
    "require_regular_file",
]

logger = logging.getLogger(__name__)

_MAX_NAMED = 5
_DETECTRON2_PREFIX = "detectron2://"
_DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"
_CATALOG_PREFIX = "catalog://"
_DETECTRON1_URL = "https://dl.fbaipublicfiles.com/detectron/ImageNetPretrained/"
# Source: Detectron's catalog of models trained on ImageNet.
_CATALOG = {
    "ImageNetPretrained/MSRA/R-50": "MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": "MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/R-50-GN": "47261647/R-50-GN.pkl",
    "ImageNetPretrained/FAIR/R-101-GN": "47592356/R-101-GN.pkl",
    "ImageNetPretrained/FAIR/X-101-32x8d": "20171220/X-101-32x8d.pkl",
    "ImageNetPretrained/FAIR/X-101-64x4d": "FBResNeXt/X-101-64x4d.pkl",
    "ImageNetPretrained/FAIR/X-152-32x8d-IN5k": "25093814/X-152-32x8d-IN5k.pkl",
}


class DownloadHandler(PathHandler):
    """Opens `https://` addresses, downloaded once; `fetch` refuses http and ftp."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["https://", "http://", "ftp://"]

    def _address(self, path: str) -> str:
        return path

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return str(fetch(self._address(path)))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(f"{path} can only be read, got mode {mode!r}")
        return Path(self._get_local_path(path)).open(mode, buffering)


class Detectron2Handler(DownloadHandler):
    """Opens `detectron2://X`, the file X of Detectron2's model zoo, downloaded once."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_DETECTRON2_PREFIX]

    def _address(self, path: str) -> str:
        return _DETECTRON2_URL + path.removeprefix(_DETECTRON2_PREFIX)


class CatalogHandler(DownloadHandler):
    """Opens `catalog://ImageNetPretrained/X`, Detectron1's name for weights of backbones."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_CATALOG_PREFIX]

    def _address(self, path: str) -> str:
        name = path.removeprefix(_CATALOG_PREFIX)
        if name not in _CATALOG:
            raise MissingFileError(
                f"{path} is not in the catalog of weights.{did_you_mean(name, _CATALOG)}"
            )
        return _DETECTRON1_URL + _CATALOG[name]


class HomeHandler(NativePathHandler):
    """Opens `~/X`, the file X of the home folder, which no shell expands in a YAML file."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["~"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return super()._get_local_path(self._get_path_with_cwd(path), force, **kwargs)

    def _get_path_with_cwd(self, path: str) -> str:
        # Path.expanduser raises for `~x` if there is no user x; it may be the name of a file.
        return super()._get_path_with_cwd(os.path.expanduser(path))  # noqa: PTH111


PathManager = _PathManager()
PathManager.register_handler(DownloadHandler())
PathManager.register_handler(Detectron2Handler())
PathManager.register_handler(CatalogHandler())
PathManager.register_handler(HomeHandler())
_OWN_PREFIXES = frozenset(PathManager._path_handlers)


def take_handlers(manager: _PathManager) -> None:
    """Let `PathManager` open the addresses of another manager, but for those that it knows."""
    for handler in manager._path_handlers.values():
        if _OWN_PREFIXES.isdisjoint(handler._get_supported_prefixes()):
            PathManager.register_handler(handler, allow_override=True)


def require_regular_file(
    file_name: str, kind: str = "file", error: type[DataError] = DataError
) -> None:
    """Raise `error` for a folder, a pipe or a device; messages call the file `kind`.

    `/dev/zero` would fill the memory, and a pipe wait for ever. Missing files and addresses pass.
    """
    path = Path(file_name)
    if not path.is_file() and path.exists():
        raise error(f"{kind} {file_name} is not a regular file")


def read_file(file_name: str, kind: str = "file", error: type[DataError] = DataError) -> bytes:
    """Return the content of a file; messages call it `kind`.

    Addresses are read by the handler that was registered with `PathManager` for them, others and
    https by `read_address`, which keeps copies in a cache of bounded size.

    Raises:
        MissingFileError: The file does not exist.
        DataError: `error`; it is a folder, a pipe or a device, or cannot be fetched.
        ConfigError, MissingPackageError: See `read_address`.
    """
    if is_address(file_name) and not has_own_handler(file_name):
        try:
            return read_address(file_name)
        except DownloadError as failed:
            raise error(f"{kind} {redacted(file_name)} cannot be read: {failed}") from failed
    require_regular_file(file_name, kind, error)
    try:
        with PathManager.open(file_name, "rb") as file:
            return cast(bytes, file.read())
    # No file has a name with a zero or half a character in it, which are ValueErrors.
    except (FileNotFoundError, ValueError) as missing:
        raise MissingFileError(f"{kind} {file_name} does not exist") from missing


def read_text(file_name: str, kind: str = "file") -> str:
    """Return the text of a file in UTF-8, or in UTF-16, as Windows' tools write it.

    Raises:
        MissingFileError: The file does not exist.
        DataError: It is in another encoding, or no file.
    """
    data = read_file(file_name, kind)
    try:
        return data.decode(json.detect_encoding(data))
    except UnicodeDecodeError as error:
        raise DataError(f"{kind} {file_name} must be text in UTF-8: {error}") from error


def has_own_handler(address: str) -> bool:
    """Return whether `PathManager` has a handler for an address, other than `DownloadHandler`."""
    handlers = PathManager._path_handlers.items()
    return any(address.startswith(p) and type(h) is not DownloadHandler for p, h in handlers)


def files_below(folder: str, endings: Sequence[str], what: str) -> dict[str, list[str]]:
    """Return the files below a folder by their names without ending, in the order of names.

    Hidden files and folders, such as macOS's `._x.jpg` and Jupyter's `.ipynb_checkpoints`, and
    files of other endings are left out; a log message counts and names them.

    Args:
        folder: With all folders in it, linked ones too.
        endings: Such as `.jpg`; small and capital letters are the same.
        what: The files are, for messages: `images`.

    Returns:
        Name -> file names of that name, relative to the folder, with `/`.

    Raises:
        MissingFileError: The folder does not exist.
    """
    root = PathManager.get_local_path(folder)
    if not Path(root).is_dir():
        raise MissingFileError(f"folder {folder} of {what} does not exist")
    found: dict[str, list[str]] = {}
    hidden, others = [], []
    seen: set[str] = set()
    for place, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        hidden += [f"{name}/" for name in folders if name.startswith(".")]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = Path(place).relative_to(root)
        for file in sorted(files):
            name = (below / file).as_posix()
            ending = next((e for e in endings if file.lower().endswith(e.lower())), None)
            if file.startswith("."):
                hidden.append(name)
            elif ending is None:
                others.append(name)
            else:
                found.setdefault(name[: -len(ending)], []).append(name)
    for left_out, reason in ((hidden, "hidden"), (others, f"without {' or '.join(endings)}")):
        if left_out:
            names = listed(sorted(left_out), _MAX_NAMED)
            message = "left out of %s in %s: %d that are %s: %s"
            logger.info(message, what, folder, len(left_out), reason, names)
    return dict(sorted(found.items()))


def dataset_root() -> Path:
    """Return the folder of built-in and relative data sets: `$DETKIT_DATASETS` or `datasets`.

    Without the former, `$DETECTRON2_DATASETS`, which users of Detectron2 have set: the files below
    it are the same.
    """
    own = os.environ.get("DETKIT_DATASETS")
    return Path(own or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def packaged_configs() -> Path:
    """Return the folder of detkit's YAML files: in the package, or beside it in a checkout.

    Raises:
        MissingFileError: Neither folder exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise MissingFileError(f"no configs of detkit in {package} or beside it: reinstall detkit")
