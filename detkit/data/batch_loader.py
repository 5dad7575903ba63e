"""Batches of training samples that worker processes make.

Legend: B images in a batch of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from detkit.data.samplers import NumberedSampler
from detkit.data.training_stream import TrainingStream
from detkit.data.watched_loader import DEFAULT_TIMEOUT, WatchedLoader, timeout_for
from detkit.data.wrappers import (
    AspectRatioGroupedDataset,
    BatchedDataset,
    MapIterableDataset,
    SeededDataset,
)
from detkit.utils import comm
from detkit.utils.env import seed_all_rng
from detkit.utils.signals import leave_signals_to_parent

Item = TypeVar("Item")


def build_batch_data_loader(
    dataset: Any,
    sampler: Iterable[int] | None,
    total_batch_size: int,
    *,
    aspect_ratio_grouping: bool = False,
    num_workers: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    drop_last: bool = True,
    seed: int = 0,
    timeout: float = DEFAULT_TIMEOUT,
) -> Iterable[Any]:
    """Build the batches of a data set whose items are samples already.

    Args:
        dataset: A data set of torch's; with indices, it needs a sampler.
        sampler: Gives this process its indices.
        total_batch_size: Over all processes.
        aspect_ratio_grouping: As in `build_detection_train_loader`.
        num_workers: As there.
        collate_fn: As there.
        drop_last: Leave out a last batch that is shorter. With grouping, these always are.
        seed: Of the augmentations, the same in every process.
        timeout: As in `build_detection_train_loader`.

    Raises:
        ValueError: The batch cannot be shared out over the processes, or data set and sampler do
            not go together.
    """
    if isinstance(dataset, IterableDataset) != (sampler is None):
        raise ValueError("a data set with indices needs a sampler, an IterableDataset none")
    batch_size = batch_size_per_process(total_batch_size)
    draws = None if sampler is None else NumberedSampler(sampler)
    items = dataset if draws is None else SeededDataset(dataset, seed)
    samples = _sample_loader(items, draws, num_workers, batch_size, seed, timeout)
    if aspect_ratio_grouping:
        batches: Any = AspectRatioGroupedDataset(samples, batch_size)
    else:
        batches = BatchedDataset(samples, batch_size, drop_last)
    if draws is not None:
        return TrainingStream(batches, draws, items, collate_fn)
    return batches if collate_fn is None else MapIterableDataset(batches, collate_fn)


def batch_size_per_process(total_batch_size: int) -> int:
    """Return B.

    Raises:
        ValueError: The processes of the run cannot all get the same number, at least one.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ValueError(
            "SOLVER.IMS_PER_BATCH (total_batch_size) must be a positive multiple of the number of"
            f" processes: got {total_batch_size} images for {world_size} processes"
        )
    return total_batch_size // world_size


def _sample_loader(
    dataset: Any,
    draws: NumberedSampler | None,
    num_workers: int,
    batch_size: int,
    seed: int,
    timeout: float,
) -> DataLoader:
    """Return samples one by one.

    Not whole batches, as workers could make: the batches waiting in shared memory would be `2 *
    num_workers`, hundreds of megabytes where a container has 64, and the first one would come after
    one worker has made all of it.
    """
    return WatchedLoader(
        dataset,
        batch_size=None,
        sampler=draws,
        num_workers=num_workers,
        collate_fn=_identity,  # the default would turn arrays and numbers into tensors
        worker_init_fn=_SeedWorker(seed + comm.get_rank() * max(1, num_workers)),
        generator=own_generator(),
        # A batch is taken at once: the next one and a little more wait, however many workers share
        # the work.
        prefetch_factor=math.ceil(batch_size / num_workers) + 1 if num_workers else None,
        timeout=timeout_for(num_workers, timeout),
    )


def _identity(sample: Item) -> Item:
    return sample


def own_generator() -> torch.Generator:
    """A generator for the numbers that a DataLoader draws, which would otherwise change those of
    the training.
    """
    return torch.Generator().manual_seed(0)


def leave_signals(worker_id: int) -> None:
    """Prepare a worker process: what asks a run to stop is for the main process alone."""
    leave_signals_to_parent()


class _SeedWorker:
    """Prepares a worker process; seeds it for data sets without indices, which have no draw to seed
    samples by.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, worker_id: int) -> None:
        leave_signals_to_parent()
        seed_all_rng((self.seed + worker_id) % 2**32)
