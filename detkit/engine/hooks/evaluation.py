"""Hooks around evaluations: run them, keep the best model, stop when the score no longer rises."""

import logging
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from detkit.checkpoint import DetectionCheckpointer
from detkit.engine.train_loop import PeriodicHook
from detkit.evaluation import flatten_results_dict
from detkit.utils import comm
from detkit.utils.errors import ConfigError
from detkit.utils.events import EventStorage
from detkit.utils.text import did_you_mean

logger = logging.getLogger(__name__)


class EvalHook(PeriodicHook):
    """Calls an evaluation function and puts its results into the storage as `task/metric`."""

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
    ) -> None:
        """Set when and how to evaluate.

        Args:
            eval_period: Iterations between evaluations; 0 or less evaluates at the end only.
            eval_function: Returns nested dicts of numbers, or nothing (in all processes but the
                main one).
            eval_after_train: Also evaluate once training is finished.
        """
        super().__init__(eval_period, after_train=eval_after_train)
        self._func = eval_function

    def act(self) -> None:
        self._do_eval()

    def _do_eval(self) -> None:
        # Detectron2's name, which its users' subclasses override.
        results = self._func()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(
                    "the evaluation function must give a dict of results, got a"
                    f" {type(results).__name__}"
                )
            for name, value in flatten_results_dict(results).items():
                try:
                    number = float(value)
                except (TypeError, ValueError) as error:
                    raise TypeError(
                        f"results of an evaluation must be numbers, got {name}={value!r}"
                    ) from error
                self.trainer.storage.put_scalar(name, number, smoothing_hint=False)
        # Evaluation takes different time in different processes; the next gradients are exchanged
        # with a time limit.
        comm.synchronize()


class BestCheckpointer(PeriodicHook):
    """Saves `<file_prefix>.pth` whenever a score is the best so far; register it behind `EvalHook`.

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
        """Set what to watch.

        Args:
            eval_period: That of the `EvalHook`.
            checkpointer: Writes the file.
            val_metric: Name of the score in the storage, such as `bbox/AP`.
            mode: Whether `max` or `min` is best.
            file_prefix: Name of the file.

        Raises:
            ValueError: `mode` is unknown.
        """
        super().__init__(eval_period)
        self._checkpointer = checkpointer
        self._val_metric = val_metric
        self._mode = _checked_mode(mode)
        # What subclasses written for Detectron2 use.
        self._compare = operator.gt if mode == "max" else operator.lt
        self._logger = logger
        self._file_prefix = file_prefix
        self.best_metric: float | None = None
        self.best_iter: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best_metric": self.best_metric, "best_iter": self.best_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_metric = state_dict["best_metric"]
        self.best_iter = state_dict["best_iter"]

    def act(self) -> None:
        self._best_checking()

    # Detectron2's methods, which its users' subclasses override.

    def _update_best(self, val: float, iteration: int) -> bool:
        """Make a score the best one; return whether it may be, so that the model is saved."""
        if not math.isfinite(val):
            return False
        self.best_metric, self.best_iter = val, iteration
        return True

    def _best_checking(self) -> None:
        score = latest_score(self.trainer.storage, self._val_metric)
        if score is None:
            return
        name, (metric, iteration) = self._val_metric, score
        if not math.isfinite(metric):
            logger.warning("%s is %s at iteration %d: not compared", name, metric, iteration)
        elif is_better(metric, self.best_metric, self._mode):
            if not self._update_best(metric, iteration):
                return
            logger.info("%s is the best so far: %.5f at iteration %d", name, metric, iteration)
            self._checkpointer.save(
                self._file_prefix,
                tag_last=False,
                # The weights, their mean and the settings to use them: no run goes on from here.
                checkpointables=[
                    key for key in self._checkpointer.checkpointables if key in ("ema", "config")
                ],
                # After training, `iter` is one behind the last iteration.
                iteration=min(self.trainer.iter, self.trainer.max_iter - 1),
            )
        else:
            logger.info(
                "%s is %.5f; the best remains %.5f, of iteration %d",
                name,
                metric,
                self.best_metric,
                self.best_iter,
            )


class EarlyStop(PeriodicHook):
    """Ends the run once `patience` evaluations in a row brought no better score.

    The run ends as if it had been that long. To be registered in every process, behind the hooks
    that evaluate and before those that write.
    """

    def __init__(
        self,
        patience: int,
        eval_period: int,
        metric: str,
        checkpointer: DetectionCheckpointer,
        *,
        mode: str = "max",
    ) -> None:
        """Set what to watch.

        Args:
            patience: Evaluations without a better score, at least 1.
            eval_period: That of the `EvalHook`, at least 1.
            metric: Name of the score in the storage, such as `bbox/AP`.
            checkpointer: Writes `model_final.pth` when the run ends here.
            mode: Whether `max` or `min` is better.

        Raises:
            ConfigError: `patience` or `eval_period` is below 1.
            ValueError: `mode` is unknown.
        """
        super().__init__(eval_period, after_train=False)
        if patience < 1:
            raise ConfigError(
                f"EARLY_STOP.PATIENCE must be at least 1 to stop a run, got {patience}"
            )
        if eval_period < 1:
            raise ConfigError(
                "EARLY_STOP.PATIENCE counts evaluations: set TEST.EVAL_PERIOD above 0"
            )
        self._patience = patience
        self._metric = metric
        self._checkpointer = checkpointer
        self._mode = _checked_mode(mode)
        self.best: float | None = None
        self.num_without = 0

    def before_train(self) -> None:
        if self.num_without >= self._patience:
            logger.info("%s; raise it to go on", self._reason())
            self.trainer.max_iter = self.trainer.start_iter

    def act(self) -> None:
        score = latest_score(self.trainer.storage, self._metric)
        if score is None:
            return
        if is_better(score[0], self.best, self._mode):
            self.best, self.num_without = score[0], 0
        else:
            self.num_without += 1
        if self.num_without >= self._patience:
            end = self.trainer.iter + 1
            logger.info("%s: training ends after %d iterations", self._reason(), end)
            self.trainer.max_iter = end
            # The periodic checkpointer has been called for this iteration, as not the last one.
            self._checkpointer.save("model_final", iteration=self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "num_without": self.num_without}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self.num_without = state_dict["num_without"]

    def _reason(self) -> str:
        best = "none" if self.best is None else f"{self.best:.5f}"
        return (
            f"{self.num_without} evaluations in a row brought no {self._metric} better than {best} "
            f"(EARLY_STOP.PATIENCE={self._patience})"
        )


def is_better(score: float, best: float | None, mode: str) -> bool:
    """Return whether a score is finite, and better than the best one so far, if there is one."""
    if not math.isfinite(score):
        return False
    if best is None:
        return True
    return score > best if mode == "max" else score < best


def _checked_mode(mode: str) -> str:
    if mode not in ("max", "min"):
        raise ValueError(f"mode must be max or min, got {mode!r}")
    return mode


def latest_score(storage: EventStorage, name: str) -> tuple[float, int] | None:
    """Return the latest value of a score and its iteration, as the main process has them.

    All processes must call it. None, and a warning, if there is no such score.
    """
    latest = storage.latest()
    if comm.is_main_process() and name not in latest:
        known = sorted(known for known in latest if "/" in known)
        logger.warning(
            "no score %r to choose the best model by; scores: %s.%s",
            name,
            ", ".join(known) or "none",
            did_you_mean(name, known),
        )
    # Only the main process has results; the others follow its decision.
    return comm.all_gather(latest.get(name))[0]
