"""Addresses of torchvision's published weights: `torchvision://NAME[/WEIGHTS]`.

`torchvision://resnet50` selects the DEFAULT weights of a model, and
`torchvision://resnet50/IMAGENET1K_V1` the weights of that name. Files are stored in torchvision's
cache.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision

from detkit.utils.download import fetch
from detkit.utils.errors import ConfigError
from detkit.utils.file_io import DownloadHandler, PathManager
from detkit.utils.text import did_you_mean

_PREFIX = "torchvision://"
# torch.hub's convention: file names end with the first digits of the hash.
_HASH = re.compile(r"-([a-f0-9]{8,})\.")


def torchvision_weights(address: str) -> Any:
    """Return torchvision's enum member of an address, with its `url`, `meta` and `transforms`.

    Args:
        address: `torchvision://NAME` or `torchvision://NAME/WEIGHTS`; the prefix is optional.

    Raises:
        ConfigError: torchvision has no such model, or the model has no such weights.
    """
    name, _, weights_name = address.removeprefix(_PREFIX).strip("/").partition("/")
    known = torchvision.models.list_models()
    if name not in known:
        raise ConfigError(
            f"{address}: torchvision has no model {name!r}.{did_you_mean(name, known)}"
        )
    published = torchvision.models.get_model_weights(name)
    if not weights_name:
        return published["DEFAULT"]
    if weights_name not in published.__members__:
        names = ", ".join(member for member in published.__members__ if member != "DEFAULT")
        raise ConfigError(f"{address}: {name} has the weights {names}, not {weights_name!r}")
    return published[weights_name]


def torchvision_weights_file(address: str) -> Path:
    """Return the local file of an address, downloaded and verified if necessary.

    Raises:
        ConfigError: See `torchvision_weights`.
        DownloadError: See `fetch`.
    """
    url, name = torchvision_weights(address).url, published_file_name(address)
    found = _HASH.search(name)
    place = Path(torch.hub.get_dir()) / "checkpoints" / name
    return fetch(url, place, sha256=found[1] if found else "")


def published_file_name(path: str) -> str:
    """Return the file name of a path or address, also of a `torchvision://` address."""
    if path.startswith(_PREFIX):
        path = urlsplit(torchvision_weights(path).url).path
    return PurePosixPath(path).name


class TorchvisionHandler(DownloadHandler):
    """Opens `torchvision://` addresses."""

    def _get_supported_prefixes(self) -> list[str]:
        return [_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        self._check_kwargs(kwargs)
        return str(torchvision_weights_file(path))


PathManager.register_handler(TorchvisionHandler(), allow_override=True)
