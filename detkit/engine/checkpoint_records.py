"""What a checkpoint records beside the state of a run: the classes of its model, its settings."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from detkit.config import CfgNode
from detkit.config.yaml_loader import parse_yaml
from detkit.data import MetadataCatalog
from detkit.data.build import MODEL_NAMES
from detkit.utils.errors import ConfigError
from detkit.utils.text import shortened

logger = logging.getLogger(__name__)

# What drawing and evaluating need to know without the data set. Paths and counts stay out.
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
    """Return what is known about the classes of the first data set, for the checkpoints."""
    if not dataset_names:
        return {}
    metadata = MetadataCatalog.get(dataset_names[0])
    record = {"dataset": dataset_names[0]}
    for key in _KEYS:
        value = metadata.get(key)
        if value is not None:
            record[key] = value
    return record


def expect_classes_of_checkpoint(cfg: CfgNode, metadata: Any) -> None:
    """Have the data sets of DATASETS.TEST match the classes and keypoints of a checkpoint by name.

    Args:
        cfg: Read for `DATASETS.TEST`.
        metadata: Of the checkpoint. Only what `class_metadata` returned is taken: published weights
            may spell the names of the same classes in another way.
    """
    for key, model_key in MODEL_NAMES.items() if _is_of_a_run(metadata) else ():
        for name in cfg.DATASETS.TEST if metadata.get(key) else ():
            MetadataCatalog.get(name).set(**{model_key: list(metadata[key])})


def require_classes_of_checkpoint(cfg: CfgNode, metadata: Any) -> None:
    """Check that DATASETS.TRAIN has the classes of the checkpoint that a run continues from.

    Args:
        cfg: Read for `DATASETS.TRAIN`, which have been loaded.
        metadata: Of the checkpoint.

    Raises:
        ConfigError: Classes, stuff classes or keypoints have other names or another order.
    """
    now = class_metadata(cfg.DATASETS.TRAIN)
    for key in MODEL_NAMES if _is_of_a_run(metadata) else ():
        before, found = metadata.get(key), now.get(key)
        if before and found and list(before) != list(found):
            kind = key.replace("_names", "s").replace("_", " ")
            raise ConfigError(
                f"the run to resume was trained on other {kind}, or in another order:"
                f" {shortened(list(before))}; data set {now['dataset']!r} now has"
                f" {shortened(list(found))}. Put the data back, give them that order by"
                " `classes` in the entry under DATASETS.REGISTER, or start a new run in another"
                " OUTPUT_DIR"
            )


def _is_of_a_run(metadata: Any) -> bool:
    return isinstance(metadata, Mapping) and "dataset" in metadata


class ConfigRecord:
    """Stores the settings in each checkpoint, and logs what has changed when one is resumed."""

    def __init__(self, cfg: CfgNode) -> None:
        """Keep the settings as they are now, as text."""
        self._text = cfg.dump()

    def state_dict(self) -> str:
        """Return the settings as YAML."""
        return self._text

    def load_state_dict(self, state_dict: str) -> None:
        """Compare with the settings of a checkpoint; the present ones stay in effect.

        Raises:
            ConfigError: The record is not a config.
        """
        changes = changed_settings(str(state_dict), self._text)
        if changes:
            logger.warning(
                "settings changed since the checkpoint was written:\n%s", "\n".join(changes)
            )


def changed_settings(before: str, now: str) -> list[str]:
    """Return a line `KEY: before -> now` for each setting that differs between two YAML texts."""
    record = parse_yaml(before, Path("the config in the checkpoint"))
    old, new = flat_settings(record.tree), flat_settings(yaml.safe_load(now))
    lines = []
    for key in sorted({**old, **new}):
        # Not by `get`: None is a value that a setting may have.
        if key in old and key in new and old[key] == new[key]:
            continue
        shown = [repr(tree[key]) if key in tree else "(not there)" for tree in (old, new)]
        lines.append(f"{key}: {' -> '.join(shown)}")
    return lines


def flat_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the settings of a tree by full key.

    Example:
        >>> flat_settings({"A": {"B": 1, "C": [2]}})
        {'A.B': 1, 'A.C': [2]}
    """
    if not isinstance(tree, dict) or (prefix and not tree):
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for name, below in tree.items():
        flat.update(flat_settings(below, f"{prefix}{name}."))
    return flat
