"""The configs that a run derives from its own: completed from its data, and for evaluations beside
the main one.
"""

from pathlib import Path

from detkit.config import CfgNode
from detkit.data import count_images_per_class


def with_class_counts(cfg: CfgNode) -> CfgNode:
    """Return the config with the class frequencies that a federated loss samples by: a model does
    not see data.
    """
    head = cfg.MODEL.ROI_BOX_HEAD
    if not head.USE_FED_LOSS or head.FED_LOSS_CLASS_COUNTS:
        return cfg
    counts = count_images_per_class(cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS = counts
    return cfg


def without_augmentation(cfg: CfgNode) -> CfgNode:
    """Return the config for the evaluations on the way, which are not to take many times as long."""
    if not cfg.TEST.AUG.ENABLED:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.AUG.ENABLED = False
    return cfg


def in_folder(cfg: CfgNode, folder: str) -> CfgNode:
    """Return the config of a run that writes to a folder within OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / folder)
    return cfg
