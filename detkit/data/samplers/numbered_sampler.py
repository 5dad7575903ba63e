"""A sampler's stream with a number for each draw, by which the draw can be repeated."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch.utils.data import Sampler

from detkit.utils import comm


class Draw(NamedTuple):
    """One draw of a training run."""

    index: int
    """Which image."""
    number: int
    """Which draw of the run, over all processes: no two draws have the same."""


class NumberedSampler(Sampler[Draw]):
    """Numbers what another sampler draws.

    This is where a run that goes on after a stop will skip what it has drawn already: the image is a function of the
    sampler's seed and the draw, its augmentation of the seed and the number, so `start` is all there is to restore.
    """

    def __init__(self, sampler: Iterable[int], start: int = 0) -> None:
        """Take a sampler, and how many of this process's draws to skip."""
        if start < 0:
            raise ValueError(f"the number of draws to skip cannot be negative, got {start}")
        self.sampler = sampler
        self.start = start

    def __iter__(self) -> Iterator[Draw]:
        """Go through the draws of this process."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        numbered = ((k * world_size + rank, index) for k, index in enumerate(self.sampler))
        for number, index in itertools.islice(numbered, self.start, None):
            yield Draw(index, number)
