"""Configs of tests."""

from collections.abc import Mapping, Sequence
from typing import Any

from detkit.config import CfgNode, get_cfg


def cfg_with(settings: Mapping[str, Any], overrides: Sequence[Any] = ()) -> CfgNode:
    """Return the default config with settings by their full keys, and `KEY, VALUE, ...` over them."""
    cfg = get_cfg()
    cfg.merge_from_list([word for pair in settings.items() for word in pair] + list(overrides))
    return cfg
