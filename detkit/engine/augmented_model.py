"""Test-time augmentation as a run uses it: what a model cannot know about its data is looked up
here.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detkit.config import CfgNode
from detkit.data.annotations import create_keypoint_hflip_indices
from detkit.modeling import GeneralizedRCNNWithTTA


def with_test_time_augmentation(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """Return a model that looks at every image as TEST.AUG says; it shares the weights of the one given.

    Raises:
        ValueError: The model predicts keypoints, and it is not known which of them a mirror
            exchanges.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    flip_indices = None
    if cfg.MODEL.KEYPOINT_ON and cfg.TEST.AUG.FLIP:
        flip_indices = create_keypoint_hflip_indices(
            cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
        ).tolist()
    return GeneralizedRCNNWithTTA(cfg, model, keypoint_flip_indices=flip_indices)


def named_as_augmented(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results by task under the names that tell them from those without augmentation:
    `bbox_TTA`, ...
    """
    return {f"{task}_TTA": metrics for task, metrics in results.items()}
