"""The batches of a training run, and how far the run has come in them.

Legend: B samples in a batch of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import IterableDataset

from detkit.data.samplers import NumberedSampler
from detkit.data.wrappers import AspectRatioGroupedDataset, BatchedDataset, SeededDataset
from detkit.utils import comm


@runtime_checkable
class HasState(Protocol):
    """What can be saved and taken over."""

    def state_dict(self) -> Any:
        """Return the state."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take a state over."""
        ...


class TrainingStream(IterableDataset):
    """Batches of samples that come draw by draw, with the position of this process among its draws as state.

    The state is that after the batch last given, however many more samples worker processes have
    made by then: how many draws were taken, and which of them wait for others of their aspect
    ratio. A stream that takes it over makes the waiting samples again, which turn out the same, and
    goes on behind them; nothing else is loaded twice.
    """

    def __init__(
        self,
        batches: BatchedDataset | AspectRatioGroupedDataset,
        draws: NumberedSampler,
        records: SeededDataset,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        """Take the parts.

        Args:
            batches: Of the samples of `draws`, one sample per draw, in their order.
            draws: What the samples are made from.
            records: What makes the samples.
            collate_fn: Turns a list of B samples into a batch; None gives the list.
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
    def num_images(self) -> int:
        """Images of an epoch: all of the data set, or the part that the sampler has drawn."""
        return getattr(self._draws.sampler, "num_images", len(self._records))

    @property
    def skipped(self) -> Mapping[str, int]:
        """Why images were left out, and how often each."""
        return self._batches.skipped

    def __iter__(self) -> Iterator[Any]:
        self._rewind()
        for batch in self._batches:
            yield batch if self._collate_fn is None else self._collate_fn(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, what was skipped on the way, and the seeds, which may have been drawn.

        `taken` is the number of draws, `waiting` those of them that are in no batch yet.
        """
        came_first, num_taken = self._draws.waiting, self._batches.num_taken
        taken = self._draws.start + max(0, num_taken - len(came_first))
        waiting = [self._draw_of(k) for k in self._batches.waiting] + list(came_first[num_taken:])
        sampler = self._draws.sampler
        seeds = sampler.state_dict() if isinstance(sampler, HasState) else {}
        position = {"taken": taken, "waiting": waiting, "world_size": comm.get_world_size()}
        return {
            **position,
            "skipped": dict(self.skipped),
            "seed": self._records.seed,
            "sampler": seeds,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on at a position that `state_dict` gave, from the next iterator on.

        Raises:
            ValueError: It is one of a run with another number of processes: see `move_to_share`.
        """
        world_size = state_dict["world_size"]
        if world_size != comm.get_world_size():
            raise ValueError(
                f"the position is one of {world_size} processes, this run has"
                f" {comm.get_world_size()}"
            )
        self._draws.move_to(state_dict["taken"], state_dict["waiting"])
        self._batches.skipped = Counter(state_dict.get("skipped", {}))
        self._take_seeds(state_dict)

    def move_to_share(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on about where the processes of a run stopped, which were more or fewer than this run has.

        The processes take turns in one stream of draws, and had come to different places in it:
        some images around those places are seen twice, or not in this epoch.
        """
        given = sum(state["taken"] - len(state["waiting"]) for state in states)
        self._draws.move_to(given // comm.get_world_size())
        if comm.is_main_process():  # one must know of them all; which one does not matter
            self._batches.skipped = sum(
                (Counter(state.get("skipped", {})) for state in states), Counter[str]()
            )
        self._take_seeds(states[0])

    def _draw_of(self, number: int) -> int:
        """The draw behind the sample that came as this one, from 0."""
        came_first = self._draws.waiting
        return (
            came_first[number]
            if number < len(came_first)
            else self._draws.start + number - len(came_first)
        )

    def _take_seeds(self, state: Mapping[str, Any]) -> None:
        self._records.seed = state["seed"]
        if isinstance(self._draws.sampler, HasState) and state["sampler"]:
            self._draws.sampler.load_state_dict(state["sampler"])
        self._rewind()

    def _rewind(self) -> None:
        self._batches.num_taken = 0
        self._batches.waiting = []
