"""The configuration: one tree of declared keys, safe YAML, and `@configurable`."""

from detkit.config.architectures import (
    BRANCHES,
    Architecture,
    declare_architecture,
    find_architecture,
    score_threshold_keys,
)
from detkit.config.cfg_node import EPOCHS, SHARE, CfgNode, ConfigKeyError
from detkit.config.compat import downgrade_config, upgrade_config
from detkit.config.configurable import configurable
from detkit.config.defaults import (
    default_trainer_settings,
    explain,
    get_cfg,
    settings_without_effect,
    unread_settings,
)
from detkit.config.user_modules import import_user_modules

__all__ = [
    "BRANCHES",
    "EPOCHS",
    "SHARE",
    "Architecture",
    "CfgNode",
    "ConfigKeyError",
    "configurable",
    "declare_architecture",
    "default_trainer_settings",
    "downgrade_config",
    "explain",
    "find_architecture",
    "get_cfg",
    "import_user_modules",
    "score_threshold_keys",
    "settings_without_effect",
    "unread_settings",
    "upgrade_config",
]
