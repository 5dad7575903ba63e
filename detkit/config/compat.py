"""Configs of versions 0 and 1, from before Detectron2's release, whose keys had other names."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from detkit.config.yaml_loader import YamlFile
from detkit.utils.errors import ConfigError

logger = logging.getLogger(__name__)

LATEST_VERSION = 2
# A CfgNode, which imports this file.
_Tree = TypeVar("_Tree", bound=dict[str, Any])
# By the version that brought the new names: pairs of an old and a new key.
_RENAMED = {
    1: (("MODEL.RPN_HEAD.NAME", "MODEL.RPN.HEAD_NAME"),),
    2: (
        ("MODEL.WEIGHT", "MODEL.WEIGHTS"),
        ("MODEL.PANOPTIC_FPN.SEMANTIC_LOSS_SCALE", "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT"),
        ("MODEL.PANOPTIC_FPN.RPN_LOSS_SCALE", "MODEL.RPN.LOSS_WEIGHT"),
        (
            "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_SCALE",
            "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
        ),
        ("MODEL.PANOPTIC_FPN.COMBINE_ON", "MODEL.PANOPTIC_FPN.COMBINE.ENABLED"),
        (
            "MODEL.PANOPTIC_FPN.COMBINE_OVERLAP_THRESHOLD",
            "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH",
        ),
        (
            "MODEL.PANOPTIC_FPN.COMBINE_STUFF_AREA_LIMIT",
            "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
        ),
        (
            "MODEL.PANOPTIC_FPN.COMBINE_INSTANCES_CONFIDENCE_THRESHOLD",
            "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
        ),
        ("MODEL.ROI_HEADS.SCORE_THRESH", "MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
        ("MODEL.ROI_HEADS.NMS", "MODEL.ROI_HEADS.NMS_THRESH_TEST"),
        ("MODEL.RETINANET.INFERENCE_SCORE_THRESHOLD", "MODEL.RETINANET.SCORE_THRESH_TEST"),
        ("MODEL.RETINANET.INFERENCE_TOPK_CANDIDATES", "MODEL.RETINANET.TOPK_CANDIDATES_TEST"),
        ("MODEL.RETINANET.INFERENCE_NMS_THRESHOLD", "MODEL.RETINANET.NMS_THRESH_TEST"),
        ("TEST.DETECTIONS_PER_IMG", "TEST.DETECTIONS_PER_IMAGE"),
        ("TEST.AUG_ON", "TEST.AUG.ENABLED"),
        ("TEST.AUG_MIN_SIZES", "TEST.AUG.MIN_SIZES"),
        ("TEST.AUG_MAX_SIZE", "TEST.AUG.MAX_SIZE"),
        ("TEST.AUG_FLIP", "TEST.AUG.FLIP"),
    ),
}
# Version 1 has the anchors of both detectors; those of the model's own kind are kept.
_ANCHORS = tuple((f"ANCHOR_{name}", f"MODEL.ANCHOR_GENERATOR.{name}") for name in
                 ("SIZES", "ASPECT_RATIOS"))  # fmt: skip


def upgrade_files(files: Sequence[YamlFile], meta_architecture: str) -> None:
    """Give the keys of a file and its bases the names of version 2, if they have older ones.

    Their version is the last VERSION in them. Without one, `MODEL.WEIGHT` or `TEST.AUG_ON` tells
    version 1, as in Detectron2.

    Args:
        files: Changed.
        meta_architecture: Of the config that they are merged into.

    Raises:
        ConfigError: They are of a later version.
    """
    is_old = any(_find(file.tree, key) for file in files for key in ("MODEL.WEIGHT", "TEST.AUG_ON"))
    version: Any = 1 if is_old else LATEST_VERSION
    for file in files:
        version = file.tree.get("VERSION", version)
        model = file.tree.get("MODEL")
        if isinstance(model, dict):
            meta_architecture = model.get("META_ARCHITECTURE", meta_architecture)
    if version not in range(LATEST_VERSION):
        return  # any other value is refused when it is merged
    for file in files:
        for old, new in _renamed(version, LATEST_VERSION, meta_architecture):
            if _move(file.tree, old, new):
                line = file.lines.get(old)
                if new and line is not None:
                    file.lines[new] = line
                logger.warning("%s: %s is %s since version 2", file.where(old), old, new or "gone")
        if "VERSION" in file.tree:
            file.tree["VERSION"] = LATEST_VERSION


def upgrade_config(cfg: _Tree, to_version: int = LATEST_VERSION) -> _Tree:
    """Return a copy of a whole config with the keys of a later version.

    Raises:
        ConfigError: `to_version` is not one from that of the config to 2.
    """
    version = _version_of(cfg)
    if to_version not in range(version, LATEST_VERSION + 1):
        raise ConfigError(f"to_version must be {version} to {LATEST_VERSION}, got {to_version!r}")
    upgraded = copy.deepcopy(cfg)
    for old, new in _renamed(version, to_version, cfg["MODEL"]["META_ARCHITECTURE"]):
        _move(upgraded, old, new)
    upgraded["VERSION"] = to_version
    return upgraded


def downgrade_config(cfg: _Tree, to_version: int) -> _Tree:
    """Return a copy of a whole config with the keys of an earlier version.

    Raises:
        ConfigError: `to_version` is not one from 0 to that of the config.
    """
    version = _version_of(cfg)
    if to_version not in range(version + 1):
        raise ConfigError(f"to_version must be 0 to {version}, got {to_version!r}")
    downgraded = copy.deepcopy(cfg)
    for number in range(version, to_version, -1):
        if number == LATEST_VERSION:
            model = downgraded["MODEL"]
            for name, key in _ANCHORS:
                _move(downgraded, key, f"MODEL.RPN.{name}")
                model["RETINANET"][name] = copy.deepcopy(model["RPN"][name])
            model["RETINANET"]["ANCHOR_STRIDES"] = []
        for old, new in _RENAMED[number]:
            _move(downgraded, new, old)
    downgraded["VERSION"] = to_version
    return downgraded


def _version_of(cfg: dict[str, Any]) -> int:
    version: Any = cfg.get("VERSION")
    if version not in range(LATEST_VERSION + 1):
        raise ConfigError(f"VERSION must be 0 to {LATEST_VERSION}, got {version!r}")
    return version


def _renamed(version: int, to_version: int, meta_architecture: str) -> list[tuple[str, str]]:
    """Return pairs of an old key and its new name, which is empty for a key that is dropped."""
    pairs = [pair for number in range(version, to_version) for pair in _RENAMED[number + 1]]
    if version < LATEST_VERSION == to_version:
        kept, dropped = "RPN", "RETINANET"
        if meta_architecture == "RetinaNet":
            kept, dropped = dropped, kept
        pairs += [(f"MODEL.{kept}.{name}", key) for name, key in _ANCHORS]
        pairs += [(f"MODEL.{dropped}.{name}", "") for name, _ in _ANCHORS]
        pairs += [("MODEL.RETINANET.ANCHOR_STRIDES", "")]
    return pairs


def _find(tree: dict[str, Any], full_key: str) -> list[dict[str, Any]]:
    """Return the groups from the one that holds a key out to the tree; none without the key."""
    groups: list[dict[str, Any]] = []
    node: Any = tree
    for part in full_key.split("."):
        if not isinstance(node, dict) or part not in node:
            return []
        groups.insert(0, node)
        node = node[part]
    return groups


def _move(tree: dict[str, Any], old: str, new: str) -> bool:
    """Rename a key, or drop it if `new` is empty, and the groups that it leaves empty.

    Returns:
        Whether the tree has the key.
    """
    groups = _find(tree, old)
    if not groups:
        return False
    *_, name = old.split(".")
    value = groups[0].pop(name)
    for inner, outer, part in zip(groups, groups[1:], reversed(old.split(".")[:-1]), strict=False):
        if not inner:
            del outer[part]
    if new:
        *parts, name = new.split(".")
        node: Any = tree
        for part in parts:
            node = node.setdefault(part, type(tree)())
        node[name] = value
    return True
