"""`LRScheduler`: logs the learning rate and steps the schedule."""

import warnings
from collections import Counter
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler

from detkit.engine.train_loop import HookBase
from detkit.solver.lr_scheduler import LRMultiplier, ParamScheduler


class LRScheduler(HookBase):
    """Stores the learning rate of each step as `lr`, and steps the scheduler after it."""

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        scheduler: TorchScheduler | ParamScheduler | None = None,
    ) -> None:
        """Keep optimizer and scheduler.

        Args:
            optimizer: None takes the trainer's `optimizer`.
            scheduler: None takes the trainer's `scheduler`. It steps once per iteration. A
                `ParamScheduler`, also fvcore's, is the factor to the learning rates of the
                optimizer.
        """
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._best_param_group_id = 0

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer given, or the trainer's."""
        return self._optimizer if self._optimizer is not None else self.trainer.optimizer

    @property
    def scheduler(self) -> Any:
        """The scheduler given, or the trainer's."""
        return self._scheduler if self._scheduler is not None else self.trainer.scheduler

    def before_train(self) -> None:
        # The names of Detectron2, for subclasses.
        self._optimizer = self.optimizer
        if not hasattr(self.scheduler, "step"):
            last_iter = self.trainer.iter - 1
            self._scheduler = LRMultiplier(
                self._optimizer, self.scheduler, self.trainer.max_iter, last_iter
            )
        # The group whose rate stands for all: the first with the rate that most parameters have.
        # Groups are compared by their base rate, since all rates may be zero when a warm-up begins.
        groups = self.optimizer.param_groups
        bases = [float(group.get("initial_lr", group["lr"])) for group in groups]
        counts: Counter[float] = Counter()
        for base, group in zip(bases, groups, strict=True):
            counts[base] += len(group["params"])
        self._best_param_group_id = bases.index(counts.most_common(1)[0][0])

    def after_step(self) -> None:
        lr = self.optimizer.param_groups[self._best_param_group_id]["lr"]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        if self.trainer.iter != self.trainer.start_iter:
            self.scheduler.step()
            return
        # If the trainer or a loss scaler skips the first step, torch warns that the schedule steps
        # before the optimizer. Filtered in the first step only, since each filter makes Python
        # repeat warnings that it has shown already.
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning
            )
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if hasattr(self.scheduler, "state_dict") else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if hasattr(self.scheduler, "load_state_dict"):
            self.scheduler.load_state_dict(state_dict)
