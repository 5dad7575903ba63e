"""Evaluations beside the plain one: with test-time augmentation, of averaged weights, of losses.

Legend: N images of all processes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from detkit.config import CfgNode
from detkit.data import (
    DatasetMapper,
    build_augmentation,
    build_detection_test_loader,
    get_test_records,
)
from detkit.data.annotations import create_keypoint_hflip_indices
from detkit.engine.simple_trainer import sum_losses
from detkit.modeling import GeneralizedRCNNWithTTA
from detkit.utils import comm
from detkit.utils.env import random_state, resolve_device, seed_all_rng, set_random_state
from detkit.utils.errors import ConfigError, DataError
from detkit.utils.events import EventStorage
from detkit.utils.module_state import BufferSnapshot, preserved_modes
from detkit.utils.sharded import gathered

# Anchors and regions are sampled alike each time: losses of two evaluations can be compared.
_SEED = 0


def with_test_time_augmentation(cfg: CfgNode, model: nn.Module) -> GeneralizedRCNNWithTTA:
    """Return a model that augments every image as TEST.AUG says, and shares the given weights.

    Raises:
        ValueError: The model predicts keypoints, and it is not known which of them a flip swaps.
    """
    flip_indices = None
    if cfg.MODEL.KEYPOINT_ON and cfg.TEST.AUG.FLIP:
        names = cfg.DATASETS.TEST or cfg.DATASETS.TRAIN
        flip_indices = create_keypoint_hflip_indices(names).tolist()
    return GeneralizedRCNNWithTTA(cfg, model, keypoint_flip_indices=flip_indices)


def testing_precision(cfg: CfgNode) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the context in which a model is evaluated or used, as TEST.AMP says.

    Raises:
        ConfigError: TEST.AMP.DTYPE is fp16, and the model is not on CUDA.
    """
    if not cfg.TEST.AMP.ENABLED:
        return nullcontext
    device_type = resolve_device(cfg.MODEL.DEVICE).type
    if cfg.TEST.AMP.DTYPE == "fp16" and device_type != "cuda":
        raise ConfigError(
            f"TEST.AMP.DTYPE fp16 needs MODEL.DEVICE cuda, the model is on {device_type}: use bf16"
            " there"
        )
    dtype = torch.float16 if cfg.TEST.AMP.DTYPE == "fp16" else torch.bfloat16
    return partial(torch.autocast, device_type, dtype=dtype)


def named_as_augmented(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return results by task under names of their own: `bbox_TTA` for `bbox`."""
    return {f"{task}_TTA": metrics for task, metrics in results.items()}


def with_averaged_results(
    results: Mapping[str, Any], averaged: Mapping[str, Any], *, is_per_dataset: bool
) -> dict[str, Any]:
    """Return the results, and those of the averaged weights as tasks of their own: `bbox_EMA`."""
    if is_per_dataset:
        return {
            name: with_averaged_results(results[name], averaged[name], is_per_dataset=False)
            for name in results
        }
    return {**results, **{f"{task}_EMA": metrics for task, metrics in averaged.items()}}


def build_validation_loader(cfg: CfgNode, dataset_name: str) -> Iterable[Any]:
    """Build a loader of a test set with ground truth, resized as in testing.

    Raises:
        DataError: A record of the data set has no ground truth.
    """
    records = get_test_records(cfg, dataset_name)
    for record in records:
        if "annotations" not in record and "sem_seg_file_name" not in record:
            raise DataError(
                f"TEST.COMPUTE_LOSS needs ground truth: data set {dataset_name!r} has none for "
                f"{record.get('file_name')}"
            )
    mapper = DatasetMapper(
        cfg, is_train=True, augmentations=build_augmentation(cfg, False), recompute_boxes=False
    )
    return build_detection_test_loader(
        records, mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
    )


@torch.no_grad()
def validation_losses(model: nn.Module, loader: Iterable[Any]) -> dict[str, float]:
    """Return the mean of each loss over N images, and of their sum as `total_loss`.

    All processes must call it, and get the same. Norms use their running statistics and nothing is
    dropped out, as in testing. Modes, buffers and random number generators are restored.

    Args:
        model: Without the wrapper of DistributedDataParallel, which would wait for a gradient.
        loader: This process's share of the images, in batches.

    Raises:
        DataError: There are no images.
    """
    sums: dict[str, Any] = defaultdict(float)
    count = 0
    # A storage of its own: layers log into the active one.
    with _untouched(model), EventStorage():
        for batch in loader:
            losses = model(batch)
            losses = losses if isinstance(losses, dict) else {"loss": losses}
            for name, loss in {**losses, "total_loss": sum_losses(losses)}.items():
                sums[name] = sums[name] + loss.detach().double() * len(batch)
            count += len(batch)
    shares = comm.all_gather(({name: float(value) for name, value in sums.items()}, count))
    num_images = sum(share[1] for share in shares)
    if not num_images:
        raise DataError("TEST.COMPUTE_LOSS: there are no images in the data set")
    means: dict[str, float] = defaultdict(float)
    for share, _ in shares:
        for name, value in share.items():
            means[name] += value
    return {name: total / num_images for name, total in means.items()}


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Run the block with the parts that give losses in training mode, then restore the model."""
    snapshot = BufferSnapshot(model)
    snapshot.take()
    random = random_state()
    try:
        with preserved_modes(model), gathered(model):
            model.train()
            # Only modules made of others choose between losses and predictions: the backbone and
            # every layer run as in evaluation.
            backbone = getattr(model, "backbone", None)
            if isinstance(backbone, nn.Module):
                backbone.eval()
            for module in model.modules():
                if next(module.children(), None) is None:
                    module.eval()
            seed_all_rng(_SEED)
            yield
    finally:
        snapshot.restore()
        set_random_state(random)


def validation_losses_of(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Return the losses on DATASETS.TEST as a task `val`, by data set where there are several."""
    by_name = {}
    for name in cfg.DATASETS.TEST:
        by_name[name] = validation_losses(model, build_validation_loader(cfg, name))
    return {"val": by_name if len(by_name) > 1 else next(iter(by_name.values()))}
