"""Training batches: how they are put together, and how far a run has come in them.

Each box below iterates over, or indexes, the one before it:

    sampler                            endless indices of images, from the run's seed
      v
    NumberedSampler                    (index, number of the draw)
      v
    records -> MapDataset              index -> sample: read, augment, to tensors
      v                                                                        in worker processes
    SeededDataset                      the same, with random numbers of this draw alone
      v
    WatchedLoader                      samples one by one, in the order of the draws
      v
    AspectRatioGroupedDataset          lists of B samples, wide with wide and tall with tall
      v                                (or BatchedDataset)                in the training process
    TrainingStream                     batches, and the position among the draws as state

A sample depends on the run's seed and the number of its draw alone. So batches are the same with
any number of workers, and a resumed run restores one number and the samples that wait for their
group to fill up.

Legend: B samples in a batch of one process.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch.utils.data import IterableDataset

from detkit.data.samplers import NumberedSampler
from detkit.data.watched_loader import DEFAULT_TIMEOUT, WatchedLoader
from detkit.data.wrappers import MapIterableDataset, SeededDataset, SkippedImage
from detkit.utils import comm
from detkit.utils.env import seed_all_rng
from detkit.utils.errors import ConfigError, ContractError
from detkit.utils.image_file import BadImageError
from detkit.utils.signals import leave_signals_to_parent

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

# So many bad images in a row mean a wrong folder or a lost disk; skipping would go on forever.
_MAX_SKIPPED_IN_A_ROW = 1000


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
    num_draws: int | None = None,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
    persistent_workers: bool = False,
) -> Iterable[Any]:
    """Build the batches of a data set whose items are samples already.

    Args:
        dataset: A data set of torch; with indices, it needs a sampler.
        sampler: Yields the indices of this process.
        total_batch_size: Number of samples in a batch over all processes.
        aspect_ratio_grouping: See `build_detection_train_loader`.
        num_workers: As there.
        collate_fn: As there.
        drop_last: Whether to drop a last, shorter batch. With grouping, they are always dropped.
        seed: Seed of the augmentations, the same in every process.
        timeout: See `build_detection_train_loader`.
        num_draws: As there.
        prefetch_factor: Samples that each worker makes ahead; None for those of the next batch and
            a few more.
        pin_memory: Whether to hold samples in memory that a GPU copies from by itself.
        persistent_workers: Detectron2's, without effect: an endless stream starts its workers once.

    Raises:
        ConfigError: The batch size is not a positive multiple of the number of processes.
        ValueError: A data set with indices comes without a sampler, or an `IterableDataset` with
            one; or `prefetch_factor` is below 1.
    """
    if isinstance(dataset, IterableDataset) != (sampler is None):
        raise ContractError("a data set with indices needs a sampler, an IterableDataset none")
    batch_size = batch_size_per_process(total_batch_size)
    draws = None if sampler is None else NumberedSampler(sampler)
    items = dataset if draws is None else SeededDataset(dataset, seed, num_draws)
    if prefetch_factor is None:
        # Enough for the next batch and a little more, however many workers share the work.
        prefetch_factor = math.ceil(batch_size / max(1, num_workers)) + 1
    if prefetch_factor < 1:  # torch would give no batch at all
        raise ValueError(f"prefetch_factor must be at least 1, got {prefetch_factor}")
    # Workers make samples, not whole batches: `2 * num_workers` batches would wait in shared
    # memory, hundreds of megabytes where a container has 64, and the first one would come after a
    # single worker has made all of it.
    samples = WatchedLoader(
        items,
        batch_size=None,
        sampler=draws,
        num_workers=num_workers,
        collate_fn=_identity,  # the default would turn arrays and numbers into tensors
        worker_init_fn=_SeedWorker(seed + comm.get_rank() * max(1, num_workers)),
        prefetch_factor=prefetch_factor if num_workers else None,
        pin_memory=pin_memory and torch.cuda.is_available(),
        timeout=timeout,
    )
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
        ConfigError: The batch size is not a positive multiple of the number of processes.
    """
    world_size = comm.get_world_size()
    if total_batch_size < 1 or total_batch_size % world_size:
        raise ConfigError(
            "SOLVER.IMS_PER_BATCH (total_batch_size) must be a positive multiple of the number of"
            f" processes: got {total_batch_size} images for {world_size} processes"
        )
    return total_batch_size // world_size


def _identity(sample: Item) -> Item:
    return sample


class _SeedWorker:
    """Seeds a worker process, for data sets without indices: their samples have no draw."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, worker_id: int) -> None:
        leave_signals_to_parent()
        seed_all_rng((self.seed + worker_id) % 2**32)


class _GroupedBatches(IterableDataset):
    """Samples in lists of B, each list of one group.

    Attributes:
        num_taken: Samples taken by the latest iterator when it yielded its last batch.
        waiting: Those of them, counted from 0 as they came, that are in no batch yet.
        skipped: Reason -> number of images left out for it.
    """

    def __init__(self, dataset: Iterable[Any], batch_size: int) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_taken = 0
        self.waiting: list[int] = []
        self.skipped: Counter[str] = Counter()

    def _group_of(self, sample: Any) -> bool:
        raise NotImplementedError

    def _full_groups(self, groups: dict[bool, list[tuple[int, Any]]]) -> Iterator[list[Any]]:
        """Fill the groups, and yield each one when it is full, as a new list."""
        in_a_row = 0
        for number, sample in enumerate(self.dataset):
            if isinstance(sample, SkippedImage):
                in_a_row += 1
                self._note_skipped(sample.reason, in_a_row)
                continue
            in_a_row = 0
            group = groups[self._group_of(sample)]
            group.append((number, sample))
            if len(group) < self.batch_size:
                continue
            batch = [sample for _, sample in group]
            group.clear()
            self.num_taken = number + 1
            self.waiting = sorted(number for group in groups.values() for number, _ in group)
            yield batch

    def _note_skipped(self, reason: str, in_a_row: int) -> None:
        self.skipped[reason] += 1
        if self.skipped[reason] == 1:
            logger.warning(
                "image skipped (DATALOADER.ON_BAD_IMAGE): %s. So far %d images were skipped, %d"
                " times in all",
                reason,
                len(self.skipped),
                self.skipped.total(),
            )
        if in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise BadImageError(
                f"{in_a_row} images in a row could not be read, the last one because {reason}"
            )


class BatchedDataset(_GroupedBatches):
    """Samples in lists of B, in their order."""

    def __init__(self, dataset: Iterable[Any], batch_size: int, drop_last: bool = True) -> None:
        """Take the samples and B; `drop_last` drops a last, shorter list."""
        super().__init__(dataset, batch_size)
        self.drop_last = drop_last

    def __iter__(self) -> Iterator[list[Any]]:
        groups: dict[bool, list[tuple[int, Any]]] = {False: []}
        yield from self._full_groups(groups)
        if groups[False] and not self.drop_last:
            yield [sample for _, sample in groups[False]]

    def _group_of(self, sample: Any) -> bool:
        return False


class AspectRatioGroupedDataset(_GroupedBatches):
    """Samples in lists of B, wide images with wide ones and the rest with the rest, to pad less.

    Samples need `width` and `height`. Lists are yielded as they fill up, which is nearly the order
    of the samples. Samples that have not filled a list at the end are dropped.
    """

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        groups: dict[bool, list[tuple[int, Any]]] = {True: [], False: []}
        self._buckets = list(groups.values())  # of the latest iterator, under Detectron2's name
        yield from self._full_groups(groups)

    def _group_of(self, sample: Any) -> bool:
        return sample["width"] > sample["height"]


@runtime_checkable
class HasState(Protocol):
    """An object whose state can be saved and loaded."""

    def state_dict(self) -> Any:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Load a state."""
        ...


class TrainingStream(IterableDataset):
    """Batches with this process's position among the draws as state.

    The state is that after the batch last yielded, however many more samples worker processes have
    made by then: how many draws were taken, and which of them wait for others of their aspect
    ratio. A stream that loads it makes the waiting samples again, which turn out the same, and
    goes on behind them; nothing else is loaded twice.
    """

    def __init__(
        self,
        batches: BatchedDataset | AspectRatioGroupedDataset,
        draws: NumberedSampler,
        records: SeededDataset,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """Build the stream from its parts.

        Args:
            batches: Batches of the samples of `draws`, one sample per draw, in their order.
            draws: What the samples are made from.
            records: What makes the samples.
            collate_fn: Turns a list of B samples into a batch; None yields the list.
        """
        self._batches = batches
        self._draws = draws
        self._records = records
        self._collate_fn = collate_fn

    @property
    def dataset(self) -> Any:
        """The loader of the samples."""
        return self._batches.dataset

    @property
    def items(self) -> Any:
        """What the samples are made from: as a rule, records."""
        samples = self._records.dataset
        return getattr(samples, "dataset", samples)

    @property
    def num_images(self) -> int:
        """The images of an epoch: the whole data set, or the subset that the sampler has drawn."""
        return getattr(self._draws.sampler, "num_images", len(self._records))

    @property
    def skipped(self) -> Mapping[str, int]:
        """Reason -> number of images left out for it."""
        return self._batches.skipped

    def __iter__(self) -> Iterator[Any]:
        self._rewind()
        for batch in self._batches:
            yield batch if self._collate_fn is None else self._collate_fn(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the skipped images, and the seeds, which may have been drawn.

        `taken` is the number of draws, `waiting` those of them that are in no batch yet.
        """
        # The iterator began with the draws that waited at the last resume; those that follow count
        # from `start`.
        came_first, num_taken = self._draws.waiting, self._batches.num_taken
        taken = self._draws.start + max(0, num_taken - len(came_first))
        waiting = []
        for number in self._batches.waiting:
            if number < len(came_first):
                waiting.append(came_first[number])
            else:
                waiting.append(self._draws.start + number - len(came_first))
        # Before the first batch, some or all of the former ones are still to come.
        waiting += came_first[num_taken:]
        sampler = self._draws.sampler
        return {
            "taken": taken,
            "waiting": waiting,
            "world_size": comm.get_world_size(),
            "skipped": dict(self.skipped),
            "seed": self._records.seed,
            "sampler": sampler.state_dict() if isinstance(sampler, HasState) else {},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue at a position from `state_dict`, from the next iterator on.

        Raises:
            ValueError: The run had another number of processes: see `move_to_share`.
        """
        world_size = state_dict["world_size"]
        if world_size != comm.get_world_size():
            raise ValueError(
                f"the position is one of {world_size} processes, this run has"
                f" {comm.get_world_size()}"
            )
        self._draws.move_to(state_dict["taken"], state_dict["waiting"])
        self._batches.skipped = Counter(state_dict.get("skipped", {}))
        self._load_seeds(state_dict)

    def move_to_share(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Continue near the position of a run that had more or fewer processes than this one.

        The processes take turns in one stream of draws, and had come to different places in it:
        some images around those places are seen twice, or not in this epoch.
        """
        given = sum(state["taken"] - len(state["waiting"]) for state in states)
        given *= states[0]["world_size"] / len(states)  # one process may have saved alone
        self._draws.move_to(int(given) // comm.get_world_size())
        if comm.is_main_process():  # one process must hold the sum; which one does not matter
            self._batches.skipped = sum(
                (Counter(state.get("skipped", {})) for state in states), Counter[str]()
            )
        self._load_seeds(states[0])

    def _load_seeds(self, state: Mapping[str, Any]) -> None:
        self._records.seed = state["seed"]
        if isinstance(self._draws.sampler, HasState) and state["sampler"]:
            self._draws.sampler.load_state_dict(state["sampler"])
        self._rewind()

    def _rewind(self) -> None:
        self._batches.num_taken = 0
        self._batches.waiting = []
