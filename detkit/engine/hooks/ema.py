"""`EMAHook`: the running mean of the weights, after each step."""

from detkit.engine.model_ema import ModelEMA
from detkit.engine.train_loop import HookBase


class EMAHook(HookBase):
    """Takes the weights into their mean after each step but those that were skipped.

    The mean is saved as a checkpoint's `ema`, not by the hook.
    """

    def __init__(self, ema: ModelEMA) -> None:
        """Keep the mean."""
        self._ema = ema

    def before_train(self) -> None:
        if (
            self._ema.num_updates == 0
        ):  # not resumed: weights may have been loaded since the mean was made
            self._ema.restart()

    def after_step(self) -> None:
        if not self.trainer.was_skipped:
            self._ema.update()
