"""What a checkpoint of a run records beside its state: the classes of its model and its settings."""

import logging
from collections.abc import Sequence
from typing import Any

import yaml

from detkit.config import CfgNode
from detkit.data import MetadataCatalog

logger = logging.getLogger(__name__)

_KEYS = (
    "thing_classes",
    "thing_dataset_id_to_contiguous_id",
    "thing_colors",
    "stuff_classes",
    "stuff_dataset_id_to_contiguous_id",
    "stuff_colors",
    "ignore_label",
    "keypoint_names",
    "keypoint_flip_map",
    "keypoint_connection_rules",
)


def class_metadata(dataset_names: Sequence[str]) -> dict[str, Any]:
    """What is known about the classes of the training data, for the checkpoints."""
    if not dataset_names:
        return {}
    metadata = MetadataCatalog.get(dataset_names[0])
    found = {key: metadata.get(key) for key in _KEYS}
    return {
        "dataset": dataset_names[0],
        **{key: value for key, value in found.items() if value is not None},
    }


class ConfigRecord:
    """Puts the settings into each checkpoint, and says what has changed when one is taken up with
    others.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Take the settings; they are not kept."""
        self._text = cfg.dump()

    def state_dict(self) -> str:
        """Return the settings as YAML."""
        return self._text

    def load_state_dict(self, state_dict: str) -> None:
        """Compare with those of a checkpoint; the present ones hold."""
        changes = changed_settings(state_dict, self._text)
        if changes:
            logger.warning(
                "settings changed since the checkpoint was written:\n%s", "\n".join(changes)
            )


def changed_settings(before: str, now: str) -> list[str]:
    """Return a line `KEY: before -> now` for each setting that differs between two texts of YAML."""
    old, new = flat_settings(yaml.safe_load(before)), flat_settings(yaml.safe_load(now))
    return [
        f"{key}: {_shown(old, key)} -> {_shown(new, key)}"
        for key in sorted({**old, **new})
        if key not in old or key not in new or old[key] != new[key]
    ]


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "(not there)"


def flat_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a tree by full key: `{"A": {"B": 1}}` is `{"A.B": 1}`."""
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix.rstrip("."): tree}
    parts = (flat_settings(below, f"{prefix}{name}.") for name, below in tree.items())
    return {key: value for part in parts for key, value in part.items()}
