"""From the config that a user wrote to the config of a run: the only place that rewrites settings.

The steps have an order, and `run_config` is the one place that knows it: the learning rate follows
the batch, and both follow the number of processes; imports, declared data sets and pixel statistics
(`prepare`) come before the data, which are decoded in the channel order that the backbone wants;
epochs become iterations once the number of images is known; class counts come from the metadata of
the data.
"""

import logging
import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

from detkit.config import EPOCHS, SHARE, CfgNode, import_user_modules
from detkit.data import count_images_per_class, register_declared_datasets
from detkit.modeling import follow_backbone_pixels
from detkit.utils import comm
from detkit.utils.errors import ConfigError
from detkit.utils.text import counted

logger = logging.getLogger(__name__)

# Epochs of a schedule that is likely to be meant for other data: those of COCO's configs are 12 to
# 108 on COCO.
_MANY_EPOCHS = 200
# Periods that may be given in epochs, beside those of SOLVER.STEPS.
_PERIODS = (
    "SOLVER.WARMUP_ITERS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TEST.EVAL_PERIOD",
    "VIS_PERIOD",
)


def prepare(cfg: CfgNode) -> None:
    """Make a config usable in this process: imports, declared data sets, pixel statistics.

    Imports the modules of IMPORTS, registers the data sets of DATASETS.REGISTER, sets pixel mean,
    standard deviation and channel order as the backbone expects them (see `follow_backbone_pixels`)
    and expands `~` (see `expand_home`). A second call changes nothing. `default_setup`,
    `DefaultTrainer` and `DefaultPredictor` call it; code that builds models or evaluators by itself
    calls it first.

    Args:
        cfg: Changed, also when it is frozen.

    Example:
        >>> from detkit.config import get_cfg
        >>> cfg = get_cfg()
        >>> prepare(cfg)
    """
    expand_home(cfg)
    import_user_modules(cfg.IMPORTS)
    register_declared_datasets(cfg.DATASETS.REGISTER)
    follow_backbone_pixels(cfg)


def expand_home(cfg: CfgNode) -> None:
    """Replace a leading `~` of OUTPUT_DIR by the home folder, as no shell does in a YAML file.

    Args:
        cfg: Changed, also when it is frozen.

    Raises:
        ConfigError: There is no such home folder.
    """
    if not cfg.OUTPUT_DIR.startswith("~"):
        return
    try:
        folder = str(Path(cfg.OUTPUT_DIR).expanduser())
    except RuntimeError:
        raise ConfigError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR} names the home folder of a user that is not known here; a"
            f" folder of that name is ./{cfg.OUTPUT_DIR}"
        ) from None
    was_frozen = cfg.is_frozen()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    if was_frozen:
        cfg.freeze()


def run_config(
    cfg: CfgNode,
    build_train_loader: Callable[[CfgNode], Iterable[Any]],
    scale: Callable[[CfgNode, int], CfgNode] | None = None,
) -> tuple[CfgNode, Iterable[Any]]:
    """Return the config of a training run, complete and in iterations, and the training data.

    Args:
        cfg: Not changed.
        build_train_loader: Builds the data; it gets a config whose periods may still be in epochs.
        scale: Adapts the config to the number of processes; None is `scaled_to_processes`.

    Raises:
        ConfigError: A length is no number of iterations or epochs, the data have no known number,
            or the batch cannot be shared out.
    """
    cfg = scaled_to_batch(cfg)
    cfg = (scale or scaled_to_processes)(cfg, comm.get_world_size()).clone()
    prepare(cfg)
    loader = build_train_loader(cfg)
    with cfg.edited() as cfg:
        _epochs_to_iterations(cfg, loader)
        _add_class_counts(cfg)
    _warn_of_long_schedule(cfg, loader)
    return cfg, loader


def scaled_to_batch(cfg: CfgNode) -> CfgNode:
    """Return the config with its learning rates for the batch; see SOLVER.REFERENCE_BATCH.

    Source: the linear scaling rule, as in `scaled_to_processes`.

    Args:
        cfg: Not changed; returned itself where nothing is to be scaled.
    """
    reference, batch = cfg.SOLVER.REFERENCE_BATCH, _batch(cfg)
    if reference in (0, batch):
        return cfg
    with cfg.edited() as cfg:
        cfg.SOLVER.BASE_LR *= batch / reference
        cfg.SOLVER.BASE_LR_END *= batch / reference
        cfg.SOLVER.REFERENCE_BATCH = batch  # scaling again changes nothing
    logger.info(
        "learning rate %g for %s per iteration, scaled from SOLVER.REFERENCE_BATCH=%d",
        cfg.SOLVER.BASE_LR,
        counted(batch, "image", "images"),
        reference,
    )
    return cfg


def _batch(cfg: CfgNode) -> int:
    """Return the number of images of an iteration."""
    return cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUM_STEPS


def scaled_to_processes(cfg: CfgNode, num_processes: int) -> CfgNode:
    """Return the config for another number of processes than SOLVER.REFERENCE_WORLD_SIZE.

    Batch and learning rates grow with the number, iterations and periods shrink; epochs stay. With
    SOLVER.REFERENCE_WORLD_SIZE 0 everything stays as it is.

    Source: the linear scaling rule of Goyal et al. 2017, arXiv 1706.02677, section 2.1.

    Args:
        cfg: Not changed; returned itself where nothing is to be scaled.
        num_processes: Processes of the run.

    Raises:
        ConfigError: The batch cannot be shared out evenly over the reference number of processes.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, num_processes):
        return cfg
    if cfg.SOLVER.IMS_PER_BATCH % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH={cfg.SOLVER.IMS_PER_BATCH} must be a multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE={reference}"
        )
    scale = num_processes / reference

    def shrunk(length: int | str) -> int | str:
        # Epochs (`2ep`) are as many for any number of processes.
        return length if isinstance(length, str) else round(length / scale)

    with cfg.edited() as cfg:
        solver = cfg.SOLVER
        solver.IMS_PER_BATCH = round(solver.IMS_PER_BATCH * scale)
        solver.BASE_LR = solver.BASE_LR * scale
        solver.BASE_LR_END = solver.BASE_LR_END * scale
        solver.MAX_ITER = max(1, round(solver.MAX_ITER / scale))
        solver.WARMUP_ITERS = shrunk(solver.WARMUP_ITERS)
        solver.STEPS = tuple(shrunk(step) for step in solver.STEPS)
        # A period of 0 or less means never, so none that is set may shrink to it.
        solver.CHECKPOINT_PERIOD = shrunk(solver.CHECKPOINT_PERIOD) or 1
        period = cfg.TEST.EVAL_PERIOD
        if isinstance(period, str) or period > 0:
            cfg.TEST.EVAL_PERIOD = shrunk(period) or 1
        solver.REFERENCE_WORLD_SIZE = num_processes  # scaling again changes nothing
        solver.REFERENCE_BATCH = round(solver.REFERENCE_BATCH * scale)  # the rate is scaled
    logger.info(
        "scaled from %d to %d processes: batch %d, learning rate %g, %d iterations",
        reference,
        num_processes,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.BASE_LR,
        cfg.SOLVER.MAX_ITER,
    )
    return cfg


def _epochs_to_iterations(cfg: CfgNode, loader: Iterable[Any]) -> None:
    """Replace SOLVER.MAX_EPOCH and all periods in epochs, such as `2ep`, by iterations.

    An iteration takes SOLVER.IMS_PER_BATCH * SOLVER.ACCUM_STEPS images; E epochs over N images are
    rounded up to whole iterations.
    """
    lengths = [cfg.get_by_full_key(key) for key in _PERIODS] + list(cfg.SOLVER.STEPS)
    in_epochs = [length for length in lengths if isinstance(length, str) and "%" not in length]
    if not cfg.SOLVER.MAX_EPOCH and not in_epochs:
        return  # the number of images, which not all data have, is not needed
    num_images = _images_per_epoch(loader)
    if num_images is None:
        raise ConfigError(
            "SOLVER.MAX_EPOCH and periods in epochs need training data of a known number: give"
            " iterations instead"
        )
    batch = _batch(cfg)

    def count(length: int | str, key: str) -> int | str:
        if isinstance(length, str) and SHARE.fullmatch(length):
            return length  # of any number of iterations: see `build_lr_scheduler`
        return iterations_of(length, key, num_images=num_images, batch=batch)

    for key in _PERIODS:
        cfg.merge_from_list([key, count(cfg.get_by_full_key(key), key)])
    cfg.SOLVER.STEPS = tuple(count(step, "SOLVER.STEPS") for step in cfg.SOLVER.STEPS)
    if cfg.SOLVER.MAX_EPOCH:
        cfg.SOLVER.MAX_ITER = count(f"{cfg.SOLVER.MAX_EPOCH}ep", "SOLVER.MAX_EPOCH")
    logger.info(
        "an epoch of %d images is %g iterations of %d; training takes %d iterations",
        num_images,
        num_images / batch,
        batch,
        cfg.SOLVER.MAX_ITER,
    )


def iterations_of(length: int | str, key: str, *, num_images: int, batch: int) -> int:
    """Return a length in iterations; `2ep` is as many as take 2 * `num_images` images.

    Raises:
        ConfigError: Another text; the message names `key`.

    Example:
        >>> iterations_of("2ep", "TEST.EVAL_PERIOD", num_images=7, batch=2)
        7
    """
    if not isinstance(length, str):
        return length
    match = EPOCHS.fullmatch(length)
    if match is None:
        raise ConfigError(
            f"{key} must be a number of iterations, or of epochs such as '2ep'; got {length!r}"
        )
    # Exact: 0.1 * 30 images are 3, and not a little more, which would be rounded up to 4.
    return math.ceil(Fraction(match.group(1)) * num_images / batch)


def iterations_per_epoch(cfg: CfgNode, loader: Any) -> float | None:
    """Return how many iterations go once through the training data; None if it is not known."""
    num_images = _images_per_epoch(loader)
    if not num_images:
        return None
    return num_images / _batch(cfg)


def _warn_of_long_schedule(cfg: CfgNode, loader: Any) -> None:
    per_epoch = iterations_per_epoch(cfg, loader)
    if not per_epoch or cfg.SOLVER.MAX_EPOCH:
        return
    epochs = cfg.SOLVER.MAX_ITER / per_epoch
    if epochs >= _MANY_EPOCHS:
        logger.warning(
            "SOLVER.MAX_ITER=%d is %d epochs of %g iterations: the schedule of a larger data set?"
            " SOLVER.MAX_EPOCH sets the length in epochs; own_data/faster_rcnn.yaml and the other"
            " configs in own_data have settings for data of your own (detkit configs own_data)",
            cfg.SOLVER.MAX_ITER,
            epochs,
            round(per_epoch, 1),
        )


def _images_per_epoch(loader: Any) -> int | None:
    try:
        # A loader of the user's own has, like torch's, a `dataset` with a length.
        return loader.num_images if hasattr(loader, "num_images") else len(loader.dataset)
    except (AttributeError, TypeError):
        return None


def _add_class_counts(cfg: CfgNode) -> None:
    """Set the class frequencies that a federated loss samples by: a model does not see data."""
    head = cfg.MODEL.ROI_BOX_HEAD
    if head.USE_FED_LOSS and not head.FED_LOSS_CLASS_COUNTS:
        head.FED_LOSS_CLASS_COUNTS = count_images_per_class(
            cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        )


def without_augmentation(cfg: CfgNode) -> CfgNode:
    """Return the config of evaluations during training: test-time augmentation takes too long."""
    with cfg.edited() as cfg:
        cfg.TEST.AUG.ENABLED = False
    return cfg


def in_folder(cfg: CfgNode, folder: str) -> CfgNode:
    """Return the config of an evaluation that writes to a folder within OUTPUT_DIR."""
    with cfg.edited() as cfg:
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / folder)
    return cfg
