"""Hooks that average: the weights over the steps, batch norm statistics over many batches."""

import itertools
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from detkit.data import HasState
from detkit.engine.model_ema import ModelEMA
from detkit.engine.train_loop import HookBase, PeriodicHook
from detkit.utils.events import EventStorage

logger = logging.getLogger(__name__)


class EMAHook(HookBase):
    """Updates the running mean of the weights after each step that was not skipped.

    The mean is saved as a checkpoint's `ema`, not by the hook.
    """

    def __init__(self, ema: ModelEMA) -> None:
        """Keep the mean."""
        self._ema = ema

    def before_train(self) -> None:
        # Not resumed: weights may have been loaded since the mean was built.
        if self._ema.num_updates == 0:
            self._ema.restart()

    def after_step(self) -> None:
        if not self.trainer.was_skipped:
            self._ema.update()


class PreciseBN(PeriodicHook):
    """Recomputes the statistics of trained batch norm layers before evaluations and at the end.

    Register it before the hooks that save and evaluate.

    Source: Wu and Johnson 2021, arXiv 2105.07576, section 3.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int
    ) -> None:
        """Set what runs through which model.

        Args:
            period: Iterations between two recomputations; 0 recomputes at the end only.
            model: In training mode.
            data_loader: A training loader of its own, so that the run's own data go on undisturbed.
            num_iter: Batches per recomputation.
        """
        # In the last step rather than after training, so that the final checkpoint has them.
        super().__init__(period, after_train=False, after_last_step=True)
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._batches: Any = None

    def act(self) -> None:
        self.update_stats()

    def rank_state_dict(self) -> dict[str, Any]:
        if self._batches is None or not isinstance(self._data_loader, HasState):
            return {}
        return {"data": self._data_loader.state_dict()}

    def load_rank_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(self._data_loader, HasState):
            self._data_loader.load_state_dict(state_dict["data"])
            self._batches = None

    def update_stats(self) -> None:
        """Recompute the statistics now."""
        # Imported here because fvcore.nn compiles with torch.jit.script on import, which today's
        # torch warns about: runs that use none of it should not show that.
        from fvcore.nn.precise_bn import get_bn_modules, update_bn_stats

        if not get_bn_modules(self._model):
            logger.warning(
                "TEST.PRECISE_BN.ENABLED has no effect: no batch norm layer of the model trains"
            )
            return
        if self._batches is None:
            self._batches = iter(self._data_loader)
        batches = itertools.islice(self._batches, self._num_iter)
        # Layers log into the active storage: a storage of its own keeps these forward passes out of
        # the run's.
        with EventStorage():
            update_bn_stats(self._model, batches, self._num_iter)
