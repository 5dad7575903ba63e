"""The configuration: one tree of declared keys, safe YAML, and `@configurable`."""

from detkit.config.cfg_node import EPOCHS, CfgNode, ConfigKeyError
from detkit.config.configurable import configurable
from detkit.config.defaults import explain, get_cfg, unread_settings
from detkit.config.user_modules import import_user_modules
from detkit.config.without_effect import settings_without_effect

__all__ = [
    "EPOCHS",
    "CfgNode",
    "ConfigKeyError",
    "configurable",
    "explain",
    "get_cfg",
    "import_user_modules",
    "settings_without_effect",
    "unread_settings",
]
