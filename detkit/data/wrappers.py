"""Data sets around data sets: from a list of records to batches of model inputs.

Legend: B samples in a batch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from detkit.data.samplers import Draw
from detkit.utils.image_file import BadImageError

logger = logging.getLogger(__name__)


# So many bad images in a row mean a wrong folder or a lost disk, and a run that would skip for
# ever.
_MAX_SKIPPED_IN_A_ROW = 1000


class SampleError(RuntimeError):
    """A sample that could not be made ready; the message names its file."""


@dataclass(frozen=True)
class SkippedImage:
    """What comes in the place of a sample whose image cannot be read; batches leave it out."""

    reason: str


class DatasetFromList(Dataset):
    """A list as a data set that any number of worker processes can read without each holding a copy.

    The items are pickled once, into one tensor. A list of dicts would be copied into each worker
    bit by bit, since counting references writes to the memory that the processes share; a tensor's
    memory is never written to. Where workers are spawned, not forked, torch moves it to shared
    memory when the first one starts.
    """

    def __init__(self, lst: Sequence[Any], copy: bool = True, serialize: bool = True) -> None:
        """Take the items.

        Args:
            lst: Items that can be pickled.
            copy: Give copies, which the receiver may change. Only without `serialize`, which always
                gives copies.
            serialize: Pickle the items.
        """
        self._copy = copy
        self._items: _PickledItems | Sequence[Any] = _PickledItems(lst) if serialize else lst

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        is_shared = self._copy and not isinstance(self._items, _PickledItems)
        return copy.deepcopy(item) if is_shared else item


class _PickledItems:
    """Pickled items, end to end in one tensor."""

    def __init__(self, items: Sequence[Any]) -> None:
        pickled = [
            np.frombuffer(pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL), dtype=np.uint8)
            for item in items
        ]
        self._ends = torch.from_numpy(np.cumsum([len(p) for p in pickled], dtype=np.int64))
        self._bytes = torch.from_numpy(
            np.concatenate(pickled) if pickled else np.zeros(0, dtype=np.uint8)
        )
        logger.debug("%d items take %.1f MiB", len(pickled), len(self._bytes) / 2**20)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return pickle.loads(
            self._bytes[start : int(self._ends[index])].numpy().data
        )  # bytes of our own making


class MapDataset(Dataset):
    """A data set whose items go through a function, such as a `DatasetMapper`.

    A sample that fails stops the run, with its file named, unless bad images are to be skipped.
    (Detectron2 puts another image in the place of one whose mapper gives None; which data were
    trained on is then no longer known.)
    """

    def __init__(
        self, dataset: Any, map_func: Callable[[Any], Any], *, skip_bad_images: bool = False
    ) -> None:
        """Take both; `skip_bad_images` gives a `SkippedImage` for an image that is missing or
        cannot be read.
        """
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                "MapDataset takes a data set with indices; use MapIterableDataset for an"
                " IterableDataset"
            )
        self.dataset = dataset
        self.map_func = map_func
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return map_item(self.map_func, self.dataset[index], skip_bad_images=self.skip_bad_images)


class MapIterableDataset(IterableDataset):
    """As `MapDataset`, for data sets without indices."""

    def __init__(
        self,
        dataset: Iterable[Any],
        map_func: Callable[[Any], Any],
        *,
        skip_bad_images: bool = False,
    ) -> None:
        self.dataset = dataset
        self.map_func = map_func
        self.skip_bad_images = skip_bad_images

    def __iter__(self) -> Iterator[Any]:
        for item in self.dataset:
            yield map_item(self.map_func, item, skip_bad_images=self.skip_bad_images)


def map_item(map_func: Callable[[Any], Any], item: Any, *, skip_bad_images: bool = False) -> Any:
    """Return `map_func(item)`, or a `SkippedImage` where that is asked for and the image cannot be read.

    Raises:
        BadImageError, FileNotFoundError: As the function does: these name the file.
        SampleError: The function failed otherwise, or gave None; the message names the file.
    """
    try:
        mapped = map_func(item)
    except (BadImageError, FileNotFoundError) as error:
        if skip_bad_images:
            return SkippedImage(str(error))
        raise
    except Exception as error:
        # Of one text, so that it survives the way out of a worker process, which builds it anew
        # from its message.
        raise SampleError(
            f"{_name(map_func)} failed on {_sample(item)}: {type(error).__name__}: {error}"
        ) from error
    if mapped is None:
        raise SampleError(
            f"{_name(map_func)} gave None for {_sample(item)}; it must give a sample. Leave images"
            " out before training: register a data set without them."
        )
    return mapped


def _name(function: Any) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _sample(item: Any) -> str:
    if not isinstance(item, dict):
        return f"an item of type {type(item).__name__}"
    image_id = f" (image_id {item['image_id']})" if "image_id" in item else ""
    return f"{item.get('file_name', 'a record without file_name')}{image_id}"


class SeededDataset(Dataset):
    """Gives each draw of a run its own random numbers.

    All generators that augmentations use (Python's, NumPy's, torch's on the CPU) are seeded from
    the run's seed and the draw's number while the sample is made, and put back afterwards. So a
    sample is the same whichever worker makes it, however many there are, and after a resume; and
    making it in the training process does not disturb the training's own draws.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        with _random_numbers_of(_mix(self.seed, draw.number)):
            return self.dataset[draw.index]


def _mix(seed: int, number: int) -> int:
    """Return 64 bits in which seed and number are well mixed. Source: Steele et al. 2014,
    SplitMix64.
    """
    mask = 2**64 - 1
    bits = (seed * 0xD1342543DE82EF95 + (number + 1) * 0x9E3779B97F4A7C15) & mask
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
    return bits ^ (bits >> 31)


@contextlib.contextmanager
def _random_numbers_of(seed: int) -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(
        seed % 2**63
    )  # not torch.manual_seed, which goes to the GPU as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ToIterableDataset(IterableDataset):
    """A data set with indices and a sampler, as one without indices; the worker processes share the
    stream out.
    """

    def __init__(self, dataset: Any, sampler: Iterable[Any], shard_sampler: bool = True) -> None:
        """Take both.

        Args:
            dataset: Anything that can be indexed by what the sampler gives.
            sampler: The indices.
            shard_sampler: Each worker takes its part of the sampler; False where the sampler sees
                to that.
        """
        if isinstance(dataset, IterableDataset):
            raise TypeError("the data set is an IterableDataset already")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.shard_sampler else None
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for index in itertools.islice(self.sampler, first, None, step):
            yield self.dataset[index]


class _GroupedBatches(IterableDataset):
    """Samples in lists of B, each list of one group; it knows which samples wait for their list to get full.

    Attributes:
        num_taken: Samples taken by the latest iterator when it gave its last batch.
        waiting: Which of them, counted from 0 in the order of coming, are in no batch yet.
        skipped: Why images were left out, and how often each.
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
        """Fill the groups, and give each one that gets full, as a list of its own."""
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
        """Take the samples and B; `drop_last` leaves out a last list that is shorter."""
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
    """Samples in lists of B, wide images with wide ones and the others with the others, so that less is padded.

    The order is that in which the lists get full, which is nearly that of the samples. What has not
    filled a list at the end is left out.
    """

    def __init__(self, dataset: Iterable[dict[str, Any]], batch_size: int) -> None:
        """Take samples that have `width` and `height`, and B."""
        super().__init__(dataset, batch_size)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        yield from self._full_groups({True: [], False: []})

    def _group_of(self, sample: Any) -> bool:
        return sample["width"] > sample["height"]
