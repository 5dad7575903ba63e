"""`EarlyStop`: ends a run whose score does not rise any more."""

import logging
import math
import operator
from typing import Any

from detkit.checkpoint import DetectionCheckpointer
from detkit.engine.hooks.checkpointing import latest_score
from detkit.engine.train_loop import HookBase

logger = logging.getLogger(__name__)


class EarlyStop(HookBase):
    """Ends the run, as if it had been that long, once so many evaluations in a row brought no better score.

    To be registered in every process, behind the hooks that evaluate and before those that write.
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
        """Remember what to watch.

        Args:
            patience: Evaluations without a better score, at least 1.
            eval_period: That of the `EvalHook`.
            metric: Name of the score in the storage, such as `bbox/AP`.
            checkpointer: Writes `model_final.pth` when the run ends here.
            mode: Whether `max` or `min` is better.

        Raises:
            ValueError: A number or the mode is out of range.
        """
        if patience < 1:
            raise ValueError(
                f"EARLY_STOP.PATIENCE must be at least 1 to stop a run, got {patience}"
            )
        if eval_period < 1:
            raise ValueError("EARLY_STOP.PATIENCE counts evaluations: set TEST.EVAL_PERIOD above 0")
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be max or min, got {mode!r}")
        self._patience = patience
        self._period = eval_period
        self._metric = metric
        self._checkpointer = checkpointer
        self._is_better = operator.gt if mode == "max" else operator.lt
        self.best: float | None = None
        self.num_without = 0

    def before_train(self) -> None:
        if self.num_without >= self._patience:
            logger.info("%s; raise it to go on", self._reason())
            self.trainer.max_iter = self.trainer.start_iter

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        if next_iter % self._period or next_iter >= self.trainer.max_iter:
            return
        score = latest_score(self.trainer.storage, self._metric)
        if score is None:
            return
        value = score[0]
        if math.isfinite(value) and (self.best is None or self._is_better(value, self.best)):
            self.best, self.num_without = value, 0
        else:
            self.num_without += 1
        if self.num_without >= self._patience:
            logger.info("%s: training ends after %d iterations", self._reason(), next_iter)
            self.trainer.max_iter = next_iter
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
