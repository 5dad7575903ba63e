"""Paths: one `PathManager` for files, URLs and zoo addresses, and the folder of the data sets."""

import os
from pathlib import Path
from typing import Any

from iopath.common.file_io import PathHandler
from iopath.common.file_io import PathManager as _PathManager

from detkit.utils.download import fetch

__all__ = ["PathManager", "dataset_root", "packaged_configs"]

_DETECTRON2_PREFIX = "detectron2://"
_DETECTRON2_URL = "https://dl.fbaipublicfiles.com/detectron2/"


class DownloadHandler(PathHandler):
    """Opens `https://` addresses, downloaded once: see `download.fetch`. Others of the web are refused."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["https://", "http://", "ftp://"]

    def _address(self, path: str) -> str:
        return path

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return str(fetch(self._address(path)))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise OSError(f"{path}: what is downloaded can only be read")
        return Path(self._get_local_path(path)).open(mode, buffering)


class Detectron2Handler(DownloadHandler):
    """Opens `detectron2://X` as the file X of Detectron2's public model zoo, downloaded once."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_DETECTRON2_PREFIX]

    def _address(self, path: str) -> str:
        return _DETECTRON2_URL + path.removeprefix(_DETECTRON2_PREFIX)


PathManager = _PathManager()
PathManager.register_handler(DownloadHandler())
PathManager.register_handler(Detectron2Handler())


def dataset_root() -> Path:
    """The folder under which built-in and relative data sets are looked for: `$DETKIT_DATASETS`, else `datasets`."""
    return Path(os.environ.get("DETKIT_DATASETS", "datasets")).expanduser()


def packaged_configs() -> Path:
    """The folder of detkit's own YAML files: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: Neither is there: the installation is damaged.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"detkit's configs are neither in {package} nor beside it; reinstall detkit")
