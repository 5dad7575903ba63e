"""The settings of a run for another number of processes than they were chosen for."""

import logging

from detkit.config import CfgNode

logger = logging.getLogger(__name__)


def scaled_to_processes(cfg: CfgNode, num_processes: int) -> CfgNode:
    """Return the config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE, which it was chosen for.

    Batch and learning rates grow with the number, iterations and periods shrink. 0 leaves
    everything as it is.

    Source: the linear scaling rule of Goyal et al. 2017, arXiv 1706.02677, section 2.1.

    Args:
        cfg: Not changed.
        num_processes: Processes of the run.

    Raises:
        ValueError: The batch cannot be shared out evenly over the reference number of processes.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_processes):
        return cfg
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH={cfg.SOLVER.IMS_PER_BATCH} must be a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE={reference}"
        )
    was_frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    scale = num_processes / reference
    cfg.SOLVER.IMS_PER_BATCH = round(cfg.SOLVER.IMS_PER_BATCH * scale)
    cfg.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR * scale
    cfg.SOLVER.BASE_LR_END = cfg.SOLVER.BASE_LR_END * scale
    cfg.SOLVER.MAX_ITER = max(1, round(cfg.SOLVER.MAX_ITER / scale))
    cfg.SOLVER.WARMUP_ITERS = _shrunk(cfg.SOLVER.WARMUP_ITERS, scale)
    cfg.SOLVER.STEPS = tuple(_shrunk(step, scale) for step in cfg.SOLVER.STEPS)
    cfg.SOLVER.CHECKPOINT_PERIOD = _shrunk(cfg.SOLVER.CHECKPOINT_PERIOD, scale) or 1
    cfg.TEST.EVAL_PERIOD = cfg.TEST.EVAL_PERIOD and (_shrunk(cfg.TEST.EVAL_PERIOD, scale) or 1)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = num_processes  # scaling again changes nothing
    logger.info(
        "scaled from %d to %d processes: batch %d, learning rate %g, %d iterations",
        reference,
        num_processes,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.MAX_ITER,
    )
    if was_frozen:
        cfg.freeze()
    return cfg


def _shrunk(length: int | str, scale: float) -> int | str:
    """Return a number of iterations divided by the scale; epochs (`2ep`) are as many for any number
    of processes.
    """
    return length if isinstance(length, str) else round(length / scale)
