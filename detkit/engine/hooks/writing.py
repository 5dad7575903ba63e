"""Hooks that tell: metrics to files and the console, and which images were skipped."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from detkit.engine.train_loop import HookBase, PeriodicHook, call_all
from detkit.utils import comm
from detkit.utils.events import CommonMetricPrinter, EventWriter

logger = logging.getLogger(__name__)

_MAX_LISTED = 100


class PeriodicWriter(PeriodicHook):
    """Calls the writers every `period` iterations, after the last one, and after training."""

    def __init__(self, writers: Sequence[EventWriter], period: int = 20) -> None:
        """Keep the writers.

        Args:
            writers: Called in this order.
            period: Iterations between two calls, at least 1.

        Raises:
            TypeError: A writer is not an `EventWriter`.
            ValueError: `period` is below 1.
        """
        for writer in writers:
            if not isinstance(writer, EventWriter):
                raise TypeError(
                    f"a writer must derive from EventWriter, got {type(writer).__name__}"
                )
        if period < 1:
            raise ValueError(f"a writer's period must be at least 1, got {period}")
        super().__init__(period, after_train=False, after_last_step=True)
        self._writers = writers
        self._has_begun = False

    def state_dict(self) -> dict[str, Any]:
        states = {key: writer.state_dict() for key, writer in self._by_key().items()}
        return {key: state for key, state in states.items() if state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A run that goes back to its best checkpoint in the end, as early stopping does, is not
        # resumed: its files keep what was measured since.
        if self._has_begun:
            return
        for key, writer in self._by_key().items():
            if key in state_dict:
                writer.load_state_dict(state_dict[key])

    def _by_key(self) -> dict[str, EventWriter]:
        # By class and number within it: a run may be resumed with more writers, or in another
        # order.
        counts: Counter[str] = Counter()
        by_key: dict[str, EventWriter] = {}
        for writer in self._writers:
            name = type(writer).__qualname__
            counts[name] += 1
            by_key[f"{name}#{counts[name]}"] = writer
        return by_key

    def before_train(self) -> None:
        self._has_begun = True
        for writer in self._writers:
            writer.open()

    def after_step(self) -> None:
        super().after_step()
        # A line at once, to see that it runs; the files keep their period.
        is_first = self.trainer.iter == self.trainer.start_iter < self.trainer.max_iter - 1
        if is_first and self._period > 1 and "total_loss" in self.trainer.storage.latest():
            for writer in self._writers:
                if isinstance(writer, CommonMetricPrinter):
                    writer.write()

    def act(self) -> None:
        for writer in self._writers:
            writer.write()

    def after_train(self) -> None:
        # Hooks that ran before may have put results; lines of the console are of whole steps, and
        # have been written. A writer that fails must not keep the others open.
        late = [w.write for w in self._writers if not isinstance(w, CommonMetricPrinter)]
        call_all([*late, *(writer.close for writer in self._writers)])


class SkippedImages(HookBase):
    """Logs at the end of training which images DATALOADER.ON_BAD_IMAGE has skipped.

    Counted over all processes and resumes. To be registered in every process.
    """

    def __init__(self, data_loader: Any) -> None:
        """Keep the training data, whose `skipped` counts images by what is wrong with them."""
        self._data_loader = data_loader

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return
        # A loader of the user's own may count nothing.
        shares = comm.gather(dict(getattr(self._data_loader, "skipped", {})))
        if not comm.is_main_process():
            return
        skipped = sum(map(Counter, shares), Counter[str]())
        if not skipped:
            logger.info("no image was skipped (DATALOADER.ON_BAD_IMAGE)")
            return
        listed = sorted(skipped.items())[:_MAX_LISTED]
        lines = [f"{count} times: {reason}" for reason, count in listed]
        if len(skipped) > len(listed):
            others = len(skipped) - len(listed)
            lines.append(f"... and {others} others, which were named when they first came")
        logger.warning(
            "%d images were skipped in training, %d times in all (DATALOADER.ON_BAD_IMAGE):\n%s",
            len(skipped),
            skipped.total(),
            "\n".join(lines),
        )
