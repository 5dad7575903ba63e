"""Samplers that share a data set among the processes of a run.

Training samplers draw one endless stream of indices from a seed, the same in every process, and
each process takes every `world_size`-th of it. So the stream does not depend on the number of
processes, and nothing has to be exchanged.

Legend: N images in the data set.
"""

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from detkit.structures import ImageRecord
from detkit.utils import comm
from detkit.utils.errors import ConfigError

logger = logging.getLogger(__name__)


class _EndlessSampler(Sampler[int]):
    """An endless stream of indices, epoch after epoch, of which this process takes its part."""

    def __init__(self, *, shuffle: bool, seed: int | None) -> None:
        """Take the seed, the same in every process; None draws one."""
        self._shuffle = shuffle
        self._seed = comm.shared_random_seed() if seed is None else int(seed)
        self._rank = comm.get_rank()
        self._world_size = comm.get_world_size()

    def state_dict(self) -> dict[str, int]:
        """Return the seeds, which may have been drawn."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Yield the stream of these seeds from the next iterator on."""
        self._seed = state_dict["seed"]

    def __iter__(self) -> Iterator[int]:
        """Start the stream from the beginning: the same one every time."""
        yield from itertools.islice(self._infinite_indices(), self._rank, None, self._world_size)

    def _infinite_indices(self) -> Iterator[int]:
        # One generator over all epochs, on the CPU: the order does not depend on the device.
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            indices = self._get_epoch_indices(generator)
            # A permutation per epoch, not independent draws: every image is seen equally often.
            if self._shuffle:
                indices = indices[torch.randperm(len(indices), generator=generator)]
            yield from indices.tolist()

    def _get_epoch_indices(self, generator: torch.Generator) -> Tensor:
        """Return the indices of one epoch in order, at least one, as int64."""
        raise NotImplementedError


class TrainingSampler(_EndlessSampler):
    """Every image once per epoch, in an order drawn anew for each."""

    def __init__(self, size: int, shuffle: bool = True, seed: int | None = None) -> None:
        """Take the number of images N, at least 1."""
        super().__init__(shuffle=shuffle, seed=seed)
        self._size = _require_size(size)

    def _get_epoch_indices(self, generator: torch.Generator) -> Tensor:
        return torch.arange(self._size)


class RandomSubsetTrainingSampler(_EndlessSampler):
    """Every image of a subset once per epoch; the subset is drawn once.

    Attributes:
        subset: Indices of its images.
        num_images: Their number.
    """

    def __init__(
        self,
        size: int,
        subset_ratio: float,
        shuffle: bool = True,
        seed_shuffle: int | None = None,
        seed_subset: int | None = None,
    ) -> None:
        """Take N and the share of the images to use, in (0, 1]; at least one image is used."""
        super().__init__(shuffle=shuffle, seed=seed_shuffle)
        if not 0 < subset_ratio <= 1:
            raise ConfigError(
                "subset_ratio (DATALOADER.RANDOM_SUBSET_RATIO) must lie in (0, 1], got"
                f" {subset_ratio}"
            )
        self._size = _require_size(size)
        self.num_images = self._size_subset = max(1, int(size * subset_ratio))
        self._draw_subset(comm.shared_random_seed() if seed_subset is None else int(seed_subset))
        logger.info("training on a random subset: %d of %d images", self.num_images, size)

    def state_dict(self) -> dict[str, int]:
        return {**super().state_dict(), "seed_subset": self._seed_subset}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        super().load_state_dict(state_dict)
        self._draw_subset(state_dict["seed_subset"])

    def _draw_subset(self, seed: int) -> None:
        self._seed_subset = seed
        generator = torch.Generator()
        generator.manual_seed(seed)
        self.subset = torch.randperm(self._size, generator=generator)[: self.num_images]
        self._indexes_subset = self.subset

    def _get_epoch_indices(self, generator: torch.Generator) -> Tensor:
        return self.subset


class RepeatFactorTrainingSampler(_EndlessSampler):
    """Images of rare classes more than once per epoch.

    Source: Gupta et al. 2019, arXiv 1908.03195, section 5.2 ("repeat factor sampling"). The
    fraction of a repeat factor is rounded up or down at random in each epoch, so that an image
    appears as often as its factor says in the mean.
    """

    def __init__(
        self,
        repeat_factors: Tensor | Sequence[float],
        *,
        shuffle: bool = True,
        seed: int | None = None,
    ) -> None:
        """Take (N,) repeat factors, each at least 1."""
        super().__init__(shuffle=shuffle, seed=seed)
        factors = torch.as_tensor(repeat_factors, dtype=torch.float32)
        _require_size(len(factors))
        if factors.dim() != 1 or float(factors.min()) < 1:
            raise ValueError(f"need a repeat factor of at least 1 for each image, got {factors}")
        self._int_part = factors.floor()
        self._frac_part = factors - self._int_part

    @staticmethod
    def repeat_factors_from_category_frequency(
        dataset_dicts: Sequence[ImageRecord], repeat_thresh: float, sqrt: bool = True
    ) -> Tensor:
        """Return repeat factors from the share of images that show each class.

        Args:
            dataset_dicts: N records.
            repeat_thresh: Share of the images, in [0, 1], below which a class is repeated.
            sqrt: Repeat a class that a share f shows `sqrt(repeat_thresh / f)` times, as published,
                not `repeat_thresh / f` times.

        Returns:
            (N,) float32: for each image the largest factor of its classes, at least 1.

        Example:
            >>> records = [{"annotations": [{"category_id": k}]} for k in (0, 0, 0, 1)]
            >>> sampler = RepeatFactorTrainingSampler
            >>> sampler.repeat_factors_from_category_frequency(records, 1.0)
            tensor([1.1547, 1.1547, 1.1547, 2.0000])
        """
        classes_per_image = []
        num_showing: Counter[int] = Counter()
        for record in dataset_dicts:
            classes = {a["category_id"] for a in record.get("annotations", [])}
            classes_per_image.append(classes)
            num_showing.update(classes)
        factors = {}
        for class_id, count in num_showing.items():
            factor = repeat_thresh / (count / len(dataset_dicts))
            factors[class_id] = max(1.0, math.sqrt(factor) if sqrt else factor)
        return torch.tensor(
            [max((factors[c] for c in classes), default=1.0) for classes in classes_per_image]
        )

    def _get_epoch_indices(self, generator: torch.Generator) -> Tensor:
        # Drawn anew in each epoch, so that the mean over epochs is the factor.
        round_up = torch.rand(len(self._frac_part), generator=generator) < self._frac_part
        return torch.arange(len(self._int_part)).repeat_interleave(
            (self._int_part + round_up).long()
        )


class ClassAwareTrainingSampler(_EndlessSampler):
    """Independent draws by weight, as many per epoch as there are images.

    Source: Shen et al. 2016, arXiv 1512.05830, section 3.2 ("class-aware sampling").
    """

    def __init__(self, weights: Tensor | Sequence[float], *, seed: int | None = None) -> None:
        """Take (N,) weights, at least 0 and not all 0."""
        super().__init__(shuffle=False, seed=seed)  # the draws have no order
        self._weights = torch.as_tensor(weights, dtype=torch.float64)
        _require_size(len(self._weights))

    @staticmethod
    def weights_from_classes(dataset_dicts: Sequence[ImageRecord]) -> Tensor:
        """Return the weights under which a class is drawn, and then an image that shows it.

        Classes are drawn equally often; images without objects count as one more class.

        Args:
            dataset_dicts: N records.

        Returns:
            (N,) float64, with a sum of 1.

        Example:
            >>> records = [{"annotations": [{"category_id": k}]} for k in (0, 0, 0, 1)]
            >>> ClassAwareTrainingSampler.weights_from_classes(records)[-1].item()
            0.5
        """
        classes = [
            {a["category_id"] for a in record.get("annotations", [])} or {None}
            for record in dataset_dicts
        ]
        num_showing = Counter(k for shown in classes for k in shown)
        weights = [sum(1 / num_showing[k] for k in shown) for shown in classes]
        return torch.tensor(weights, dtype=torch.float64) / len(num_showing)

    def _get_epoch_indices(self, generator: torch.Generator) -> Tensor:
        count = len(self._weights)
        return torch.multinomial(self._weights, count, replacement=True, generator=generator)


class InferenceSampler(Sampler[int]):
    """Every image once, in order; each process takes one contiguous part.

    The sizes of the parts differ by at most one image.
    """

    def __init__(self, size: int) -> None:
        """Take the number of images N; 0 yields nothing."""
        if size < 0:
            raise ValueError(f"the size of a data set cannot be negative, got {size}")
        # The names of Detectron2, for subclasses.
        self._size, self._rank, self._world_size = size, comm.get_rank(), comm.get_world_size()
        self._local_indices = self._get_local_indices(size, self._world_size, self._rank)

    @staticmethod
    def _get_local_indices(total_size: int, world_size: int, rank: int) -> range:
        """Return the part of a process."""
        base, left_over = divmod(total_size, world_size)
        # The first `left_over` processes take one image more.
        start = base * rank + min(rank, left_over)
        return range(start, start + base + (rank < left_over))

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this process."""
        yield from self._local_indices

    def __len__(self) -> int:
        return len(self._local_indices)


def _require_size(size: int) -> int:
    if size < 1:
        raise ValueError(f"a training sampler needs at least one image, got {size}")
    return size
