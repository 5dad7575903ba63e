"""A sampler's stream with a number for each draw, by which the draw can be repeated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
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

    This is where a run that goes on after a stop skips what it has drawn already: the image is a
    function of the sampler's seed and the draw, its augmentation of the seed and the number, so
    `start` and `waiting` are all there is to restore. Both count the draws of this process.

    Attributes:
        start: Draws to skip.
        waiting: Draws before `start`, in rising order, that are given all the same, first.
    """

    def __init__(self, sampler: Iterable[int], start: int = 0, waiting: Sequence[int] = ()) -> None:
        """Take a sampler, and where its stream goes on."""
        self.sampler = sampler
        self.start = 0
        self.waiting: tuple[int, ...] = ()
        self.move_to(start, waiting)

    def move_to(self, start: int, waiting: Sequence[int] = ()) -> None:
        """Go on elsewhere from the next iterator on.

        Raises:
            ValueError: `start` is negative, or `waiting` is no rising sequence of numbers below it.
        """
        if start < 0:
            raise ValueError(f"the number of draws to skip cannot be negative, got {start}")
        if any(not 0 <= k < start for k in waiting) or any(a >= b for a, b in pairwise(waiting)):
            raise ValueError(
                f"draws that wait must be different ones in [0, {start}), in order; got"
                f" {list(waiting)}"
            )
        self.start, self.waiting = start, tuple(waiting)

    def __iter__(self) -> Iterator[Draw]:
        """Go through the draws of this process."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        start, waiting = self.start, frozenset(self.waiting)
        for k, index in enumerate(self.sampler):
            if k >= start or k in waiting:
                yield Draw(index, k * world_size + rank)
