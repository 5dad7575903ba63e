"""`PreciseBN`: statistics of batch norm layers from many batches under fixed weights."""

import itertools
import logging
from collections.abc import Iterable
from typing import Any

from torch import nn

from detkit.data import HasState
from detkit.engine.train_loop import HookBase
from detkit.utils.events import EventStorage

logger = logging.getLogger(__name__)


class PreciseBN(HookBase):
    """Recomputes the statistics of the batch norm layers that train, before each evaluation and at the end.

    Register it before the hooks that save and evaluate.

    Source: Wu and Johnson 2021, arXiv 2105.07576, section 3.
    """

    def __init__(
        self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int
    ) -> None:
        """Remember what to run through what.

        Args:
            period: Iterations between two recomputations; 0 recomputes at the end only.
            model: In training mode.
            data_loader: A training loader of its own, so that the run's own data go on undisturbed.
            num_iter: Batches per recomputation.
        """
        self._period = period
        self._model = model
        self._data_loader = data_loader
        self._num_iter = num_iter
        self._batches: Any = None

    def after_step(self) -> None:
        next_iter = self.trainer.iter + 1
        is_last = next_iter == self.trainer.max_iter
        if is_last or (self._period > 0 and next_iter % self._period == 0):
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
        # Layers log into the active storage: a storage of its own keeps these forward passes out of
        # the run's.
        with EventStorage():
            update_bn_stats(
                self._model, itertools.islice(self._batches, self._num_iter), self._num_iter
            )
