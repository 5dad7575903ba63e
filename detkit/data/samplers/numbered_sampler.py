"""A sampler's stream with a number for each draw, by which the draw can be repeated."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch.utils.data import Sampler

from detkit.utils import comm


class Draw(NamedTuple):
    """One draw of a training run."""

    index: int
    """Index of the image."""
    number: int
    """Number of the draw in the run, over all processes: no two draws have the same."""


class NumberedSampler(Sampler[Draw]):
    """Numbers the draws of another sampler.

    A resumed run skips here the draws that it has taken already. The image is a function of the
    sampler's seed and the draw, its augmentation of the seed and the number, so nothing but `start`
    and `waiting` has to be restored. Both count the draws of this process.

    Attributes:
        start: Number of draws to skip.
        waiting: Draws before `start`, in rising order, that are not skipped.

    Example:
        >>> [draw.index for draw in NumberedSampler("abcdef", start=4, waiting=[1])]
        ['b', 'e', 'f']
    """

    def __init__(self, sampler: Iterable[int], start: int = 0, waiting: Sequence[int] = ()) -> None:
        """Take a sampler and the position in its stream."""
        self.sampler = sampler
        self.start = 0
        self.waiting: tuple[int, ...] = ()
        self.move_to(start, waiting)

    def move_to(self, start: int, waiting: Sequence[int] = ()) -> None:
        """Continue elsewhere from the next iterator on.

        Raises:
            ValueError: `start` is negative, or `waiting` is not a rising sequence in [0, start).
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
        """Yield the draws of this process."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        start, waiting = self.start, frozenset(self.waiting)
        # The stream is drawn from its beginning: skipping a million indices takes half a second,
        # and no sampler needs a way to start in the middle.
        for k, index in enumerate(self.sampler):
            if k >= start or k in waiting:
                yield Draw(index, k * world_size + rank)
