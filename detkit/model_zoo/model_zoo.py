"""Finding the YAML files that travel with detkit."""

from pathlib import Path

from detkit.config import CfgNode, get_cfg
from detkit.utils.file_io import packaged_configs
from detkit.utils.near_miss import did_you_mean


def list_configs() -> list[str]:
    """Give the names of all packaged configs, such as `COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml`, in order."""
    root = packaged_configs()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def get_config_file(config_path: str) -> str:
    """Give the path of a packaged config.

    Args:
        config_path: Its name as in `list_configs`; the file name alone, or the name without `.yaml`, is enough where
            only one config has it.

    Raises:
        FileNotFoundError: No packaged config has that name, or several have; the message lists the close ones.
    """
    name = config_path if config_path.endswith(".yaml") else config_path + ".yaml"
    known = list_configs()
    fitting = [k for k in known if k == name] or [k for k in known if k.endswith("/" + name)]
    if len(fitting) == 1:
        return str(packaged_configs() / fitting[0])
    if fitting:
        raise FileNotFoundError(f"several packaged configs are called {config_path!r}: {', '.join(fitting)}")
    by_file_name = {Path(k).name: k for k in known}
    hint = did_you_mean(name, [*known, *by_file_name])
    raise FileNotFoundError(f"no packaged config is called {config_path!r}.{hint}")


def find_config(path_or_name: str) -> str:
    """Give the path of a config file: the user's own where there is one, else the packaged one of that name.

    `configs/X` finds the packaged X as well, so that the README's commands work outside a checkout.

    Raises:
        FileNotFoundError: Neither is there.
    """
    if Path(path_or_name).expanduser().is_file():
        return str(Path(path_or_name).expanduser())
    try:
        return get_config_file(path_or_name.removeprefix("configs/"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no config file {path_or_name} (from {Path.cwd()}), and {error}") from error


def get_config(config_path: str) -> CfgNode:
    """Give the settings of a packaged config, complete and not frozen.

    Raises:
        FileNotFoundError: No packaged config has that name.
    """
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(config_path))
    return cfg
