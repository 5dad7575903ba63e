"""Hooks that save: every so often, and whenever a score is the best so far."""

import logging
import math
import operator
from typing import Any

from detkit.checkpoint import DetectionCheckpointer
from detkit.checkpoint import PeriodicCheckpointer as _PeriodicCheckpointer
from detkit.engine.train_loop import HookBase
from detkit.utils import comm
from detkit.utils.events import EventStorage
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)


class PeriodicCheckpointer(_PeriodicCheckpointer, HookBase):
    """`detkit.checkpoint.PeriodicCheckpointer` as a hook: saves every `period` iterations and after the last one.

    To be registered in every process, which all contribute states; the main process writes.
    """

    def before_train(self) -> None:
        self.max_iter = self.trainer.max_iter

    def after_step(self) -> None:
        self.step(self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        return {}


class BestCheckpointer(HookBase):
    """Saves `<file_prefix>.pth` whenever a score of the evaluation is the best so far; register it behind `EvalHook`.

    The file does not become the one to resume from. To be registered in every process: they agree
    on the score.
    """

    def __init__(
        self,
        eval_period: int,
        checkpointer: DetectionCheckpointer,
        val_metric: str,
        mode: str = "max",
        file_prefix: str = "model_best",
    ) -> None:
        """Remember what to watch.

        Args:
            eval_period: That of the `EvalHook`.
            checkpointer: Writes the file.
            val_metric: Name of the score in the storage, such as `bbox/AP`.
            mode: Whether `max` or `min` is best.
            file_prefix: Name of the file.

        Raises:
            ValueError: Unknown mode.
        """
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be max or min, got {mode!r}")
        self._period = eval_period
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._is_better = operator.gt if mode == "max" else operator.lt
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if (
            self._period > 0
            and next_iter % self._period == 0
            and next_iter != self.trainer.max_iter
        ):
            self._check()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._check()

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]

    def _check(self) -> None:
        score = latest_score(self.trainer.storage, self._val_metric)
        if score is None:
            return
        metric, iteration = score
        if not math.isfinite(metric):
            logger.warning(
                "%s is %s at iteration %d: not compared", self._val_metric, metric, iteration
            )
        elif self.best_metric is None or self._is_better(metric, self.best_metric):
            self._save(metric, iteration)
        else:
            logger.info(
                "%s is %.5f; the best remains %.5f, of iteration %d",
                self._val_metric,
                metric,
                self.best_metric,
                self.best_iter,
            )

    def _save(self, metric: float, iteration: int) -> None:
        logger.info(
            "%s is the best so far: %.5f at iteration %d", self._val_metric, metric, iteration
        )
        self.best_metric, self.best_iter = metric, iteration
        last_trained = min(self.trainer.iter, self.trainer.max_iter - 1)
        # The weights, and their mean: no run goes on from this file.
        kept = [key for key in self._checkpointer.checkpointables if key == "ema"]
        self._checkpointer.save(
            self._file_prefix, tag_last=False, checkpointables=kept, iteration=last_trained
        )


def latest_score(storage: EventStorage, name: str) -> tuple[float, int] | None:
    """Return a score that the main process has, and its iteration, in all processes; None and a
    warning without one.
    """
    latest = storage.latest()
    if comm.is_main_process() and name not in latest:
        known = [known for known in latest if "/" in known]
        logger.warning(
            "no score %r to choose the best model by; scores: %s.%s",
            name,
            ", ".join(sorted(known)) or "none",
            did_you_mean(name, known),
        )
    return comm.all_gather(latest.get(name))[0]
