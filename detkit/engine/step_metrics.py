"""Losses and loading times of all processes, on their way into the storage of the main one."""

from collections.abc import Mapping, Sequence
from typing import Any

from detkit.utils import comm
from detkit.utils.events import EventStorage


class StepMetrics:
    """Keeps the numbers of steps until those of all processes are gathered, in one message."""

    def __init__(self) -> None:
        self._ungathered: list[tuple[int, dict[str, float]]] = []

    def put(self, iteration: int, losses: Mapping[str, float], data_time: float) -> None:
        """Keep the losses of a step, and the seconds that it waited for its data."""
        self._ungathered.append((iteration, {**losses, "data_time": data_time}))

    def gather(self, storage: EventStorage, prefix: str = "") -> None:
        """Put what was kept into the main process's storage, each iteration's numbers under its own number.

        Losses are averaged over the processes, of data times the longest counts. All processes must
        call it, at the same iterations, with a step kept for the same ones.

        Args:
            storage: Gets the sum of the losses as `total_loss`, and where there is more than one,
                each of them.
            prefix: Put before the name of the sum; the losses have it already.
        """
        per_rank = comm.gather(self._ungathered)
        self._ungathered = []
        for of_iteration in zip(*per_rank, strict=True):  # empty in all processes but the main one
            iteration = of_iteration[0][0]
            values = [dict(values) for _, values in of_iteration]
            storage.put_scalar(
                "data_time", max(v.pop("data_time") for v in values), cur_iter=iteration
            )
            losses = mean_by_name(values)
            storage.put_scalar(f"{prefix}total_loss", sum(losses.values()), cur_iter=iteration)
            if len(losses) > 1:
                for name, value in losses.items():
                    storage.put_scalar(name, value, cur_iter=iteration)

    def state(self) -> list[Any]:
        """Return what was not gathered yet."""
        return [list(item) for item in self._ungathered]

    def load_state(self, state: Sequence[Any]) -> None:
        """Take over what `state` gave in the process of the same number."""
        self._ungathered = [(iteration, values) for iteration, values in state]


def mean_by_name(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over those that have it."""
    names = dict.fromkeys(name for v in values for name in v)
    having = {name: [v[name] for v in values if name in v] for name in names}
    return {name: sum(found) / len(found) for name, found in having.items()}
