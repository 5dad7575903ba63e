"""Settings that another setting robs of their effect: what is set and does nothing is said."""

from typing import Any

from detkit.config.cfg_node import CfgNode
from detkit.config.defaults import get_cfg

# Keys -> the key that decides whether they are looked at, and its values under which they are; none
# means any but empty or False. Left out is what base files set for some of the configs that share
# them (SOLVER.STEPS, which a cosine does not look at; MODEL.ROI_MASK_HEAD): it would be named in
# runs where nobody has a mistake to find.
_LOOKED_AT_WITH: dict[tuple[str, ...], tuple[str, tuple[Any, ...]]] = {
    ("SOLVER.MOMENTUM", "SOLVER.NESTEROV"): ("SOLVER.OPTIMIZER", ("SGD",)),
    ("SOLVER.ADAMW.BETAS", "SOLVER.ADAMW.EPS"): ("SOLVER.OPTIMIZER", ("AdamW",)),
    ("SOLVER.BASE_LR_END",): ("SOLVER.LR_SCHEDULER_NAME", ("WarmupCosineLR",)),
    ("SOLVER.NUM_DECAYS",): ("SOLVER.LR_SCHEDULER_NAME", ("WarmupStepWithFixedGammaLR",)),
    ("SOLVER.AMP.DTYPE",): ("SOLVER.AMP.ENABLED", ()),
    (
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    ): (
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        (),
    ),
    ("DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT"): (
        "DATALOADER.SAMPLER_TRAIN",
        ("RepeatFactorTrainingSampler",),
    ),
    ("DATALOADER.RANDOM_SUBSET_RATIO",): (
        "DATALOADER.SAMPLER_TRAIN",
        ("RandomSubsetTrainingSampler",),
    ),
    ("DATASETS.PROPOSAL_FILES_TRAIN", "DATASETS.PROPOSAL_FILES_TEST"): ("MODEL.LOAD_PROPOSALS", ()),
    ("INPUT.CROP.TYPE", "INPUT.CROP.SIZE", "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA"): (
        "INPUT.CROP.ENABLED",
        (),
    ),
    (
        "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
        "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
        "MODEL.ROI_BOX_HEAD.FED_LOSS_CLASS_COUNTS",
    ): ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS", ()),
    ("MODEL_EMA.DECAY", "MODEL_EMA.WARMUP"): ("MODEL_EMA.ENABLED", ()),
    ("BEST_METRIC_MODE",): ("BEST_METRIC", ()),
    ("TEST.EVAL_PERIOD", "TEST.COMPUTE_LOSS", "VIS_PERIOD"): ("DATASETS.TEST", ()),
    ("TEST.NMS.SIGMA",): ("TEST.NMS.METHOD", ("gaussian",)),
    ("TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.AUG.FLIP"): ("TEST.AUG.ENABLED", ()),
    ("TEST.PRECISE_BN.NUM_ITER",): ("TEST.PRECISE_BN.ENABLED", ()),
    ("TEST.KEYPOINT_OKS_SIGMAS", "TEST.KEYPOINT_DETECTIONS_PER_IMAGE"): ("MODEL.KEYPOINT_ON", ()),
}


def settings_without_effect(cfg: CfgNode) -> dict[str, str]:
    """Return the keys that a config sets to no effect, each with the setting that takes it away."""
    defaults, found = get_cfg(), {}
    for keys, (decider, values) in _LOOKED_AT_WITH.items():
        decision = cfg.get_by_full_key(decider)
        if decision in values if values else decision:
            continue
        for key in keys:
            if cfg.get_by_full_key(key) != defaults.get_by_full_key(key):
                found[key] = f"{decider} is {decision!r}"
    return found
