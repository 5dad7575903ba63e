"""The YAML files that travel with detkit, and the weights that were published for them."""

from pathlib import Path

from torch import nn

from detkit.checkpoint import DetectionCheckpointer
from detkit.config import CfgNode, get_cfg
from detkit.model_zoo.urls import PREFIX, PUBLISHED_WEIGHTS
from detkit.modeling import build_model
from detkit.utils.file_io import packaged_configs
from detkit.utils.near_miss import did_you_mean


def list_configs() -> list[str]:
    """Return the names of all packaged configs, such as
    `COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml`, in order.
    """
    root = packaged_configs()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def get_config_file(config_path: str) -> str:
    """Return the path of a packaged config.

    Args:
        config_path: Its name as in `list_configs`; the file name alone, or the name without
            `.yaml`, is enough where only one config has it.

    Raises:
        FileNotFoundError: No packaged config has that name, or several have; the message lists the
            close ones.
    """
    name = config_path if config_path.endswith(".yaml") else config_path + ".yaml"
    known = list_configs()
    fitting = [k for k in known if k == name] or [k for k in known if k.endswith("/" + name)]
    if len(fitting) == 1:
        return str(packaged_configs() / fitting[0])
    if fitting:
        raise FileNotFoundError(
            f"several packaged configs are called {config_path!r}: {', '.join(fitting)}"
        )
    by_file_name = {Path(k).name: k for k in known}
    hint = did_you_mean(name, [*known, *by_file_name])
    raise FileNotFoundError(f"no packaged config is called {config_path!r}.{hint}")


def find_config(path_or_name: str) -> str:
    """Return the path of a config file: the user's own where there is one, else the packaged one of that name.

    `configs/X` finds the packaged X as well, so that the README's commands work outside a checkout,
    and so does `detkit://X`, which is how `_BASE_` writes it.

    Raises:
        FileNotFoundError: Neither is there.
    """
    if Path(path_or_name).expanduser().is_file():
        return str(Path(path_or_name).expanduser())
    try:
        return get_config_file(path_or_name.removeprefix("detkit://").removeprefix("configs/"))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no config file {path_or_name} (from {Path.cwd()}), and {error}"
        ) from error


def get_checkpoint_url(config_path: str) -> str:
    """Return the address of the weights that Detectron2 published for a config.

    Args:
        config_path: As in `get_config_file`.

    Raises:
        FileNotFoundError: No packaged config has that name.
        ValueError: There are no published weights for it.
    """
    name = (
        Path(get_config_file(config_path))
        .relative_to(packaged_configs())
        .with_suffix("")
        .as_posix()
    )
    if name not in PUBLISHED_WEIGHTS:
        hint = did_you_mean(name, PUBLISHED_WEIGHTS)
        raise ValueError(
            f"Detectron2 published no weights for {name}; it did for {len(PUBLISHED_WEIGHTS)}"
            f" others.{hint}"
        )
    return f"{PREFIX}{name}/{PUBLISHED_WEIGHTS[name]}"


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """Return the settings of a packaged config, complete and not frozen.

    Args:
        config_path: As in `get_config_file`.
        trained: Let MODEL.WEIGHTS be the published result of the config instead of what its
            training starts from.

    Raises:
        FileNotFoundError: No packaged config has that name.
        ValueError: `trained` is set and there are no published weights.
    """
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    if trained:
        cfg.MODEL.WEIGHTS = get_checkpoint_url(config_path)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Return the model of a packaged config, in training mode, with weights.

    Args:
        config_path: As in `get_config_file`.
        trained: Load the published result of the config; every learned tensor must be in it.
            Otherwise what its training starts from, such as a backbone's weights from ImageNet.
        device: Where to put it, as MODEL.DEVICE; None takes the config's.

    Raises:
        FileNotFoundError: No packaged config has that name.
        ValueError: `trained` is set and there are no published weights.
    """
    cfg = get_config(config_path, trained)
    if device is not None:
        cfg.MODEL.DEVICE = device
    model = build_model(cfg)
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS, strict=trained)
    return model
