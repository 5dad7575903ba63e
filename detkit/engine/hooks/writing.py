"""`PeriodicWriter`: brings what the storage holds to files and to the console."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from detkit.engine.train_loop import HookBase, call_all
from detkit.utils.events import EventWriter


class PeriodicWriter(HookBase):
    """Calls the writers every `period` iterations, after the last one, and once more when
    everything is done.
    """

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        """Keep the writers.

        Args:
            writers: Called in this order.
            period: Iterations between two calls, at least 1.

        Raises:
            TypeError: One is not an `EventWriter`.
            ValueError: The period is below 1.
        """
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(
                    f"a writer must derive from EventWriter, got {type(writer).__name__}"
                )
        if period < 1:
            raise ValueError(f"a writer's period must be at least 1, got {period}")
        self._writers = writers
        self._period = period

    def state_dict(self) -> dict[str, Any]:
        states = {key: writer.state_dict() for key, writer in self._by_key().items()}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key, writer in self._by_key().items():
            if key in state_dict:
                writer.load_state_dict(state_dict[key])

    def _by_key(self) -> dict[str, EventWriter]:
        """By class and number within it: a run may be resumed with more writers, or in another
        order.
        """
        counts: Counter[str] = Counter()
        by_key: dict[str, EventWriter] = {}
        for writer in self._writers:
            name = type(writer).__qualname__
            counts[name] += 1
            by_key[f"{name}#{counts[name]}"] = writer
        return by_key

    def before_train(self) -> None:
        for writer in self._writers:
            writer.open()

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period == 0 or next_iter == self.trainer.max_iter:
            for writer in self._writers:
                writer.write()

    def after_train(self) -> None:
        # Hooks that ran before may have put results; and a writer that fails must not keep the
        # others open.
        call_all(call for writer in self._writers for call in (writer.write, writer.close))
