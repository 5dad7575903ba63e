"""`EvalHook`: evaluates every so often and at the end."""

from collections.abc import Callable, Mapping
from typing import Any

from detkit.engine.train_loop import HookBase
from detkit.evaluation import flatten_results_dict
from detkit.utils import comm


class EvalHook(HookBase):
    """Calls an evaluation function and puts its results into the storage as `task/metric`."""

    def __init__(
        self,
        eval_period: int,
        eval_function: Callable[[], Mapping[str, Any] | None],
        eval_after_train: bool = True,
    ) -> None:
        """Remember when to evaluate and how.

        Args:
            eval_period: Iterations between evaluations; 0 evaluates at the end only.
            eval_function: Gives nested dicts of numbers, or nothing (in all processes but the main
                one).
            eval_after_train: Also evaluate once training is finished.

        Raises:
            ValueError: The period is negative.
        """
        if eval_period < 0:
            raise ValueError(f"TEST.EVAL_PERIOD must be at least 0, got {eval_period}")
        self._period = eval_period
        self._function = eval_function
        self._eval_after_train = eval_after_train

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        # The last iteration is left to after_train, so that it is not evaluated twice.
        if (
            self._period > 0
            and next_iter % self._period == 0
            and next_iter != self.trainer.max_iter
        ):
            self._evaluate()

    def after_train(self) -> None:
        # A run that stopped in the middle is not finished, and what it has learned may be broken.
        if self._eval_after_train and self.trainer.iter >= self.trainer.max_iter:
            self._evaluate()

    def _evaluate(self) -> None:
        results = self._function()
        if results:
            if not isinstance(results, Mapping):
                raise TypeError(
                    "the evaluation function must give a dict of results, got a"
                    f" {type(results).__name__}"
                )
            for name, value in _numbers(results).items():
                self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        # Evaluation takes different time in different processes; the next gradients are exchanged
        # with a time limit.
        comm.synchronize()


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """The results under their flat names."""
    flat = flatten_results_dict(results)
    for name, value in flat.items():
        try:
            flat[name] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"results of an evaluation must be numbers, got {name}={value!r}"
            ) from error
    return flat
