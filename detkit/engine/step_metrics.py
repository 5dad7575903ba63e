"""`StepMetrics`: losses and data times of all processes, gathered for the main one's storage."""

from collections import defaultdict
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
        """Move what was kept of each iteration to the main process's storage.

        Losses are averaged over the processes, of data times the longest counts. All processes must
        call it at the same iterations, and have kept the same ones.

        Args:
            storage: Gets the sum of the losses as `total_loss`, and each of several losses.
            prefix: Put before the name of the sum; the losses have it already.
        """
        per_rank = comm.gather(self._ungathered)
        self._ungathered = []
        # Empty in all processes but the main one.
        for of_iteration in zip(*per_rank, strict=True):
            iteration = of_iteration[0][0]
            values = [dict(values) for _, values in of_iteration]
            # The slowest process holds up the others, so its wait is the run's.
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
        """Load what `state` returned in the process of the same number."""
        self._ungathered = [(iteration, values) for iteration, values in state]


def mean_by_name(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each value over those that have it.

    Example:
        >>> mean_by_name([{"a": 1.0, "b": 2.0}, {"a": 3.0}])
        {'a': 2.0, 'b': 2.0}
    """
    by_name: dict[str, list[float]] = defaultdict(list)
    for of_one in values:
        for name, value in of_one.items():
            by_name[name].append(value)
    return {name: sum(found) / len(found) for name, found in by_name.items()}
