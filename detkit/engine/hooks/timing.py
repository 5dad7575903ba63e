"""`IterationTimer`: how long an iteration takes."""

import datetime
import logging
import time

from detkit.engine.train_loop import HookBase

logger = logging.getLogger(__name__)


class IterationTimer(HookBase):
    """Puts the seconds of each iteration into the storage as `time`, and logs the speed of the whole run at its end.

    `time` covers the step with its data, and not what hooks do after it. On a GPU it is right on
    average only, since a step returns before the device has done all of its work.
    """

    def __init__(self, warmup_iter: int = 3) -> None:
        """Remember how many iterations to leave out of the speed.

        Args:
            warmup_iter: The first iterations, which start workers and fill caches.
        """
        self._warmup_iter = warmup_iter
        self._train_start = self._step_start = time.perf_counter()
        self._durations: list[float] = []

    def before_train(self) -> None:
        self._train_start = time.perf_counter()
        self._durations = []

    def before_step(self) -> None:
        self._step_start = time.perf_counter()

    def after_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        if self.trainer.iter - self.trainer.start_iter >= self._warmup_iter:
            self.trainer.storage.put_scalar("time", seconds)
            self._durations.append(seconds)

    def after_train(self) -> None:
        if not self._durations:
            return
        total, count = sum(self._durations), len(self._durations)
        whole = time.perf_counter() - self._train_start
        logger.info(
            "trained %d iterations in %s, %.4f s each; %s went into everything else",
            count,
            _clock(total),
            total / count,
            _clock(whole - total),
        )


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
