"""The configuration: one tree of declared keys, safe YAML, and `@configurable`."""

from detkit.config.architectures import (
    BRANCHES,
    Architecture,
    declare_architecture,
    find_architecture,
    score_threshold_keys,
)
from detkit.config.cfg_node import EPOCHS, CfgNode, ConfigKeyError
from detkit.config.configurable import configurable
from detkit.config.defaults import explain, get_cfg, unread_settings
from detkit.config.user_modules import import_user_modules
from detkit.config.without_effect import settings_without_effect

__all__ = [
    "BRANCHES",
    "EPOCHS",
    "Architecture",
    "CfgNode",
    "ConfigKeyError",
    "configurable",
    "declare_architecture",
    "explain",
    "find_architecture",
    "get_cfg",
    "import_user_modules",
    "score_threshold_keys",
    "settings_without_effect",
    "unread_settings",
]
