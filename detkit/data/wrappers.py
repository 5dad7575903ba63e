"""Data sets around data sets: from a list of records to samples.

`training_stream` shows the whole row, from records to batches.
"""

import contextlib
import copy
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
from detkit.utils.logger import log_first_n
from detkit.utils.serialize import PicklableWrapper, is_local_function

logger = logging.getLogger(__name__)

# So many samples without one in a row mean a mapper that is wrong for the data.
_MAX_NONE_IN_A_ROW = 1000


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

    def __init__(
        self, lst: Sequence[Any], copy: bool = True, serialize: bool | Callable[..., Any] = True
    ) -> None:
        """Take the items.

        Args:
            lst: Items that can be pickled.
            copy: Return copies, which the caller may change. Has an effect only without
                `serialize`, which always returns copies.
            serialize: Pickle the items; or a function that returns them in a form of its own, which
                has a length and is indexed.
        """
        self._copy = copy and not serialize
        if not serialize:
            self._items = lst
        else:
            self._items = serialize(lst) if callable(serialize) else _serialize_method(lst)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        return copy.deepcopy(item) if self._copy else item


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


_serialize_method: Callable[..., Any] = _PickledItems


@contextlib.contextmanager
def set_default_dataset_from_list_serialize_method(method: Callable[..., Any]) -> Iterator[None]:
    """Let a `DatasetFromList` hold its items as a function returns them, within a `with`."""
    global _serialize_method
    earlier, _serialize_method = _serialize_method, method
    try:
        yield
    finally:
        _serialize_method = earlier


class _Mapped:
    """A data set whose items go through a function, and what is done where that fails."""

    def __init__(
        self,
        dataset: Any,
        map_func: Callable[[Any], Any],
        *,
        skip_bad_images: bool = False,
        takes_none: bool = True,
    ) -> None:
        """Take data set and function.

        Args:
            dataset: The items.
            map_func: Returns the sample of an item.
            skip_bad_images: Whether an image that is missing or cannot be read becomes a
                `SkippedImage`.
            takes_none: Whether the function may return None, for an item that is to be left out.
        """
        self.dataset = dataset
        self.map_func = map_func
        self.skip_bad_images = skip_bad_images
        self.takes_none = takes_none

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if is_local_function(self.map_func):
            state["map_func"] = PicklableWrapper(self.map_func)
        return state

    def _map(self, item: Any) -> Any:
        mapped = map_item(self.map_func, item, skip_bad_images=self.skip_bad_images)
        if mapped is None and not self.takes_none:
            raise SampleError(
                f"{_name(self.map_func)} returned None for {_describe(item)}: an image that is"
                " evaluated cannot be left out"
            )
        if mapped is None:
            log_first_n(
                logging.WARNING,
                f"{_name(self.map_func)} returned None for {_describe(item)}, which is left out;"
                " the next image takes its place (others are left out without a message)",
                key=_name(self.map_func),
                name=__name__,
            )
        return mapped


class MapDataset(_Mapped, Dataset):
    """A data set whose items go through a function, such as a `DatasetMapper`.

    A sample that fails stops the run, with its file named, unless bad images are skipped. In the
    place of an item for which the function returns None comes the next one. Of an
    `IterableDataset` it is a `MapIterableDataset`.
    """

    # Detectron2 puts a random image in the place of one that is left out: a run that is resumed, or
    # has another number of workers, would see other data.

    def __new__(cls, dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Without arguments where one is unpickled.
        if isinstance(dataset, IterableDataset):
            return MapIterableDataset(dataset, *args, **kwargs)
        return super().__new__(cls)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        num_items = len(self.dataset)
        for step in range(min(num_items, _MAX_NONE_IN_A_ROW)):
            mapped = self._map(self.dataset[(index + step) % num_items])
            if mapped is not None:
                return mapped
        raise SampleError(
            f"{_name(self.map_func)} returned None for {min(num_items, _MAX_NONE_IN_A_ROW)} items"
            f" in a row, from item {index} on"
        )


class MapIterableDataset(_Mapped, IterableDataset):
    """A `MapDataset` for data sets without indices. Items whose sample is None are left out."""

    def __iter__(self) -> Iterator[Any]:
        for item in self.dataset:
            mapped = self._map(item)
            if mapped is not None:
                yield mapped


def map_item(map_func: Callable[[Any], Any], item: Any, *, skip_bad_images: bool = False) -> Any:
    """Return `map_func(item)`, or a `SkippedImage` if bad images are skipped and this is one.

    Raises:
        BadImageError, FileNotFoundError: The function raised it; the message names the file.
        SampleError: The function failed otherwise; the message names the file.
    """
    try:
        return map_func(item)
    except (BadImageError, FileNotFoundError) as error:
        if skip_bad_images:
            return SkippedImage(str(error))
        raise
    except Exception as error:
        # One text as the only argument: torch builds a worker's error anew from its message.
        raise SampleError(
            f"{_name(map_func)} failed on {_describe(item)}: {type(error).__name__}: {error}"
        ) from error


def _name(map_func: Callable[[Any], Any]) -> str:
    return getattr(map_func, "__qualname__", type(map_func).__name__)


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

    def __init__(
        self,
        dataset: Any,
        sampler: Iterable[Any],
        shard_sampler: bool = True,
        shard_chunk_size: int = 1,
    ) -> None:
        """Take both.

        Args:
            dataset: Anything that can be indexed by what the sampler yields.
            sampler: The indices.
            shard_sampler: Whether each worker process takes its part of the sampler; False if the
                sampler does that itself.
            shard_chunk_size: Number of indices in a row that one worker takes.
        """
        if isinstance(dataset, IterableDataset):
            raise TypeError("the data set is an IterableDataset already")
        self.dataset = dataset
        self.sampler = sampler
        self.shard_sampler = shard_sampler
        self.shard_chunk_size = shard_chunk_size

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info() if self.shard_sampler else None
        own, num_workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for number, index in enumerate(self.sampler):
            if number // self.shard_chunk_size % num_workers == own:
                yield self.dataset[index]
