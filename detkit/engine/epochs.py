"""Lengths of a run in passes over its training data: SOLVER.MAX_EPOCH, and periods such as `2ep`,
as iterations.
"""

import logging
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from detkit.config import EPOCHS, CfgNode

logger = logging.getLogger(__name__)

_PERIODS = ("WARMUP_ITERS", "CHECKPOINT_PERIOD")


def in_iterations(cfg: CfgNode, loader: Iterable[Any]) -> CfgNode:
    """Return the config with all its lengths in iterations; it is the same one where they are already.

    An iteration takes SOLVER.IMS_PER_BATCH * SOLVER.ACCUM_STEPS images; E epochs over N images are
    rounded up to whole iterations. With MAX_EPOCH, MAX_ITER is replaced.

    Args:
        cfg: Not changed.
        loader: The training data, as `build_detection_train_loader` gives them; only counted where
            it is needed.

    Raises:
        ValueError: A text that is no number of epochs, or data whose number is not known.
    """
    texts = [
        cfg.SOLVER.WARMUP_ITERS,
        cfg.SOLVER.CHECKPOINT_PERIOD,
        cfg.TEST.EVAL_PERIOD,
        cfg.VIS_PERIOD,
    ]
    if not cfg.SOLVER.MAX_EPOCH and not any(
        isinstance(value, str) for value in [*texts, *cfg.SOLVER.STEPS]
    ):
        return cfg
    num_images = _images_per_epoch(cfg, loader)
    batch = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUM_STEPS

    def count(value: Any, key: str) -> Any:
        return iterations_of(value, key, num_images=num_images, batch=batch)

    was_frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SOLVER.MAX_EPOCH:
        cfg.SOLVER.MAX_ITER = count(f"{cfg.SOLVER.MAX_EPOCH}ep", "SOLVER.MAX_EPOCH")
    cfg.SOLVER.STEPS = tuple(count(step, "SOLVER.STEPS") for step in cfg.SOLVER.STEPS)
    for name in _PERIODS:
        cfg.SOLVER[name] = count(cfg.SOLVER[name], f"SOLVER.{name}")
    cfg.TEST.EVAL_PERIOD = count(cfg.TEST.EVAL_PERIOD, "TEST.EVAL_PERIOD")
    cfg.VIS_PERIOD = count(cfg.VIS_PERIOD, "VIS_PERIOD")
    logger.info(
        "an epoch of %d images is %g iterations of %d; training takes %d iterations",
        num_images,
        num_images / batch,
        batch,
        cfg.SOLVER.MAX_ITER,
    )
    if was_frozen:
        cfg.freeze()
    return cfg


def iterations_of(value: int | str, key: str, *, num_images: int, batch: int) -> int:
    """Return a length in iterations: a number as it is, `2ep` as the iterations that take 2 * `num_images` images.

    Raises:
        ValueError: Another text; the message names `key`.
    """
    if not isinstance(value, str):
        return value
    match = EPOCHS.fullmatch(value)
    if match is None:
        raise ValueError(
            f"{key} must be a number of iterations, or of epochs such as '2ep'; got {value!r}"
        )
    # Exact: 0.1 * 30 images are 3, and not a little more.
    return math.ceil(Fraction(match.group(1)) * num_images / batch)


def _images_per_epoch(cfg: CfgNode, loader: Any) -> int:
    # The loader of batches has one of samples within, and that one the data set.
    dataset = getattr(getattr(loader, "dataset", None), "dataset", None)
    try:
        num_images = len(dataset)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(
            "SOLVER.MAX_EPOCH and periods in epochs need training data of a known number: give"
            " iterations instead"
        ) from None
    if cfg.DATALOADER.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        return max(1, int(num_images * cfg.DATALOADER.RANDOM_SUBSET_RATIO))
    return num_images
