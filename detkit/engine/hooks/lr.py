"""`LRScheduler`: logs the learning rate and moves the schedule on."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler

from detkit.engine.train_loop import HookBase


class LRScheduler(HookBase):
    """After each step, puts the learning rate it was taken with into the storage as `lr`, and steps
    the scheduler.
    """

    def __init__(
        self, optimizer: Optimizer | None = None, scheduler: TorchScheduler | None = None
    ) -> None:
        """Keep optimizer and scheduler.

        Args:
            optimizer: None takes the trainer's `optimizer` when training begins.
            scheduler: None takes the trainer's `scheduler`. It steps once per iteration.
        """
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._group = 0

    @property
    def scheduler(self) -> Any:
        """The scheduler given, or the trainer's."""
        return self._scheduler if self._scheduler is not None else self.trainer.scheduler  # pyright: ignore

    def before_train(self) -> None:
        self._optimizer = self._optimizer or self.trainer.optimizer  # pyright: ignore
        self._group = _common_group(self._optimizer)  # pyright: ignore[reportArgumentType]

    def after_step(self) -> None:
        lr = self._optimizer.param_groups[self._group]["lr"]  # pyright: ignore[reportOptionalMemberAccess]
        self.trainer.storage.put_scalar("lr", lr, smoothing_hint=False)
        # Only there, since to filter warnings makes Python show again all that it has shown.
        is_first = self.trainer.iter == self.trainer.start_iter
        with _without_warning_of_order() if is_first else nullcontext():
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state_dict)


@contextmanager
def _without_warning_of_order() -> Iterator[None]:
    """Silence torch, which takes a first step that was left out for a schedule that comes before the optimizer.

    A trainer leaves out a step with numbers that are not finite, a loss scaler one whose gradients
    overflow.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"Detected call of `lr_scheduler\.step\(\)` before", UserWarning
        )
        yield


def _common_group(optimizer: Optimizer) -> int:
    """The parameter group whose learning rate stands for all: the first with the rate that most parameters have.

    Groups are compared by their base rate, since all rates may be zero when a warm-up begins.
    """
    counts: Counter[float] = Counter()
    bases = [_number(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    for base, group in zip(bases, optimizer.param_groups, strict=True):
        counts[base] += len(group["params"])
    return bases.index(counts.most_common(1)[0][0])


def _number(lr: float | Tensor) -> float:
    return float(lr)
