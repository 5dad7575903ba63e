"""Data sets around data sets: from a list of records to samples.

`training_stream` shows the whole row, from records to batches.
"""

import contextlib
import copy
import itertools
import logging
import pickle
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from detkit.data.samplers import Draw
from detkit.data.transforms.augmentation import run_progress
from detkit.utils.errors import UserError
from detkit.utils.image_file import BadImageError

logger = logging.getLogger(__name__)


class SampleError(UserError, RuntimeError):
    """A sample that could not be made; the message names its file."""


@dataclass(frozen=True)
class SkippedImage:
    """Takes the place of a sample whose image cannot be read; batches leave it out."""

    reason: str


class DatasetFromList(Dataset):
    """A list as a data set that any number of worker processes can read without copies of it.

    Example:
        >>> dataset = DatasetFromList([{"file_name": "a.jpg"}, {"file_name": "b.jpg"}])
        >>> len(dataset), dataset[1]
        (2, {'file_name': 'b.jpg'})
    """

    def __init__(self, lst: Sequence[Any], copy: bool = True, serialize: bool = True) -> None:
        """Take the items.

        Args:
            lst: Items that can be pickled.
            copy: Return copies, which the caller may change. Has an effect only without
                `serialize`, which always returns copies.
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

    # A list of dicts would be copied into each worker bit by bit: counting references writes to
    # the memory that forked processes share. A tensor's memory is never written to, and where
    # workers are spawned, torch moves it to shared memory when the first one starts.

    def __init__(self, items: Sequence[Any]) -> None:
        # One buffer that grows: pieces that are joined at the end would take twice the memory.
        pickled, ends = bytearray(), array("q")
        for item in items:
            pickled += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(pickled))
        self._ends, self._bytes = _as_tensor(ends, torch.int64), _as_tensor(pickled, torch.uint8)
        logger.debug("%d items take %.1f MiB", len(ends), len(pickled) / 2**20)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        # Safe to unpickle: the bytes were written by this object.
        return pickle.loads(self._bytes[start : int(self._ends[index])].numpy().data)


def _as_tensor(buffer: Any, dtype: torch.dtype) -> Tensor:
    """Return a tensor over the memory of a buffer."""
    return torch.frombuffer(buffer, dtype=dtype) if len(buffer) else torch.empty(0, dtype=dtype)


class MapDataset(Dataset):
    """A data set whose items go through a function, such as a `DatasetMapper`.

    A sample that fails stops the run, with its file named, unless bad images are skipped. Of an
    `IterableDataset` it is a `MapIterableDataset`.
    """

    # Detectron2 puts another image in the place of one whose mapper returns None; which data a run
    # was trained on is then no longer known.

    def __new__(cls, dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Without arguments where one is unpickled.
        if isinstance(dataset, IterableDataset):
            return MapIterableDataset(dataset, *args, **kwargs)
        return super().__new__(cls)

    def __init__(
        self, dataset: Any, map_func: Callable[[Any], Any], *, skip_bad_images: bool = False
    ) -> None:
        """Take data set and function.

        With `skip_bad_images`, an image that is missing or cannot be read becomes a `SkippedImage`.
        """
        self.dataset = dataset
        self.map_func = map_func
        self.skip_bad_images = skip_bad_images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return map_item(self.map_func, self.dataset[index], skip_bad_images=self.skip_bad_images)


class MapIterableDataset(IterableDataset):
    """A `MapDataset` for data sets without indices."""

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
    """Return `map_func(item)`, or a `SkippedImage` if bad images are skipped and this is one.

    Raises:
        BadImageError, FileNotFoundError: The function raised it; the message names the file.
        SampleError: The function failed otherwise, or returned None; the message names the file.
    """
    name = getattr(map_func, "__qualname__", type(map_func).__name__)
    try:
        mapped = map_func(item)
    except (BadImageError, FileNotFoundError) as error:
        if skip_bad_images:
            return SkippedImage(str(error))
        raise
    except Exception as error:
        # One text as the only argument: torch builds a worker's error anew from its message.
        raise SampleError(
            f"{name} failed on {_describe(item)}: {type(error).__name__}: {error}"
        ) from error
    if mapped is None:
        raise SampleError(
            f"{name} returned None for {_describe(item)}; it must return a sample. Leave images"
            " out before training: register a data set without them."
        )
    return mapped


def _describe(item: Any) -> str:
    if not isinstance(item, dict):
        return f"an item of type {type(item).__name__}"
    image_id = f" (image_id {item['image_id']})" if "image_id" in item else ""
    return f"{item.get('file_name', 'a record without file_name')}{image_id}"


class SeededDataset(Dataset):
    """Seeds random numbers for each draw of a run.

    All generators that augmentations use (Python's, NumPy's, torch's on the CPU) are seeded from
    the run's seed and the draw's number while the sample is made, and restored afterwards. So a
    sample is the same whichever worker makes it, however many there are, and after a resume; and
    making it in the training process does not disturb the training's own draws. Augmentations that
    end before the run does (`Until`) count its draws.
    """

    def __init__(self, dataset: Any, seed: int, num_draws: int | None = None) -> None:
        """Take the data, the seed, and the number of draws in the run, if it is known."""
        self.dataset = dataset
        self.seed = seed
        self.num_draws = num_draws

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> Any:
        share = min(1.0, draw.number / self.num_draws) if self.num_draws else 0.0
        with _random_numbers_of(_mix(self.seed, draw.number)), run_progress(share):
            return self.dataset[draw.index]


def _mix(seed: int, number: int) -> int:
    """Return 64 bits in which seed and number are well mixed.

    Source: Steele et al. 2014, SplitMix64.
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
    # Not `torch.manual_seed`, which seeds the GPU as well.
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ToIterableDataset(IterableDataset):
    """A data set with indices and its sampler, as one without indices."""

    def __init__(self, dataset: Any, sampler: Iterable[Any], shard_sampler: bool = True) -> None:
        """Take both.

        Args:
            dataset: Anything that can be indexed by what the sampler yields.
            sampler: The indices.
            shard_sampler: Whether each worker process takes its part of the sampler; False if the
                sampler does that itself.
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
