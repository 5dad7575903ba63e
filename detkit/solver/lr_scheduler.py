"""Learning rate schedules, with a warm-up, as factors on the base learning rates.

A `ParamScheduler` of fvcore maps progress (iteration / max_iter, in [0, 1]) to a factor;
`LRMultiplier` applies it to the learning rates of an optimizer.
"""

import bisect
import logging
import math
from collections.abc import Sequence
from typing import Any

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    LinearParamScheduler,
    ParamScheduler,
)
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from detkit.utils.errors import ConfigError

logger = logging.getLogger(__name__)


class WarmupParamScheduler(CompositeParamScheduler):
    """A warm-up followed by another schedule.

    Source: Goyal et al. 2017, arXiv 1706.02677, section 2.2.
    """

    def __init__(
        self,
        scheduler: ParamScheduler,
        warmup_factor: float,
        warmup_length: float,
        warmup_method: str = "linear",
        rescale_interval: bool = False,
    ) -> None:
        """Combine a warm-up with `scheduler`.

        Args:
            scheduler: Schedule of the factor over the whole run.
            warmup_factor: Factor at the first iteration, relative to that of `scheduler`.
            warmup_length: Fraction of the run for the warm-up, in [0, 1].
            warmup_method: `linear` increases to the value of `scheduler` at the end of the warm-up;
                `constant` keeps the first value.
            rescale_interval: Start `scheduler` after the warm-up and rescale it to the rest of the
                run. Otherwise the warm-up replaces the start of `scheduler`.

        Raises:
            ValueError: `warmup_method` is unknown, or `warmup_length` is not in [0, 1].
        """
        if not 0.0 <= warmup_length <= 1.0:
            raise ValueError(f"warmup_length must lie in [0, 1], got {warmup_length}")
        first = warmup_factor * scheduler(0.0)
        after = scheduler(0.0) if rescale_interval else scheduler(warmup_length)
        if warmup_method == "linear":
            warmup: ParamScheduler = LinearParamScheduler(first, after)
        elif warmup_method == "constant":
            warmup = ConstantParamScheduler(first)
        else:
            raise ValueError(f"warmup_method must be linear or constant, got {warmup_method!r}")
        # "rescaled" maps the interval of a part to [0, 1]; "fixed" passes on the progress of the
        # run, so that a warm-up does not move the milestones.
        super().__init__(
            [warmup, scheduler],
            lengths=[warmup_length, 1.0 - warmup_length],
            interval_scaling=["rescaled", "rescaled" if rescale_interval else "fixed"],
        )


class StepWithFixedGamma(ParamScheduler):
    """Multiplies the factor by `gamma` at `num_decays` equally spaced points of the run.

    Unlike fvcore's StepWithFixedGammaParamScheduler, it does not raise an IndexError at progress 1.
    """

    def __init__(self, num_decays: int, gamma: float) -> None:
        self._num_decays = num_decays
        self._gamma = gamma

    def __call__(self, where: float) -> float:
        # N decays divide the run into N + 1 intervals. The epsilon compensates rounding errors of
        # iteration / max_iter, which may be just below the start of an interval.
        decays = int((where + self.WHERE_EPSILON) * (self._num_decays + 1))
        return self._gamma ** min(decays, self._num_decays)


class LRMultiplier(LRScheduler):
    """Sets each learning rate of an optimizer to its base value times a factor of the progress."""

    def __init__(
        self, optimizer: Optimizer, multiplier: ParamScheduler, max_iter: int, last_iter: int = -1
    ) -> None:
        """Attach to an optimizer and set the learning rates of the first iteration.

        Args:
            optimizer: Its current learning rates are the base values.
            multiplier: Maps progress in [0, 1) to a factor.
            max_iter: Iterations of the whole run, at least 1.
            last_iter: The last iteration that is done; -1 at the start.

        Raises:
            ValueError: `max_iter` is below 1.
        """
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        self._multiplier = multiplier
        self._max_iter = max_iter
        super().__init__(optimizer, last_epoch=last_iter)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group for the coming iteration."""
        # torch asks once more after the last iteration: for the end of the schedule, which some
        # define below 1 only. No step uses that value.
        progress = min(self.last_epoch / self._max_iter, math.nextafter(1.0, 0.0))
        factor = self._multiplier(progress)
        return [base_lr * factor for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return position and base learning rates; the schedule itself is in the config."""
        return {"base_lrs": self.base_lrs, "last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a position; the saved base learning rates replace those of the config.

        Raises:
            ConfigError: The number of parameter groups differs.
        """
        saved = state_dict["base_lrs"]
        if len(saved) != len(self.base_lrs):
            raise ConfigError(
                f"the saved schedule has {len(saved)} parameter groups, this one"
                f" {len(self.base_lrs)}: SOLVER.WEIGHT_DECAY*, BIAS_LR_FACTOR, LR_MULT, LAYER_DECAY"
                " or the frozen layers differ from those of the resumed run"
            )
        if saved != self.base_lrs:
            logger.warning(
                "resuming with base learning rates %s of the checkpoint, not %s of the config",
                sorted(set(saved)),
                sorted(set(self.base_lrs)),
            )
        super().load_state_dict(state_dict)


def warmup_factor_at(method: str, iteration: int, warmup_iters: int, warmup_factor: float) -> float:
    """Return the factor on the learning rate at an iteration of a warm-up; 1 behind it.

    Args:
        method: "constant" or "linear".
        iteration: From 0.
        warmup_iters: Length of the warm-up.
        warmup_factor: Factor at its start.

    Raises:
        ValueError: The method is unknown.
    """
    if iteration >= warmup_iters:
        return 1.0
    if method == "constant":
        return warmup_factor
    if method == "linear":
        share = iteration / warmup_iters
        return warmup_factor * (1 - share) + share
    raise ValueError(f"the method of a warm-up must be linear or constant, got {method!r}")


class _WithWarmup(LRScheduler):
    """A schedule of torch's kind with a warm-up. A subclass gives the factor without it."""

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_factor: float,
        warmup_iters: int,
        warmup_method: str,
        last_epoch: int,
    ) -> None:
        self.warmup_factor = warmup_factor
        self.warmup_iters = warmup_iters
        self.warmup_method = warmup_method
        super().__init__(optimizer, last_epoch)

    def factor(self, iteration: int) -> float:
        """Return the factor on the learning rate without the warm-up."""
        raise NotImplementedError

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group."""
        warmup = warmup_factor_at(
            self.warmup_method, self.last_epoch, self.warmup_iters, self.warmup_factor
        )
        return [base_lr * warmup * self.factor(self.last_epoch) for base_lr in self.base_lrs]


class WarmupMultiStepLR(_WithWarmup):
    """Multiplies the learning rate by `gamma` at each milestone, after a warm-up.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = WarmupMultiStepLR(optimizer, milestones=[3], warmup_iters=0)
        >>> schedule.factor(2), schedule.factor(3)
        (1.0, 0.1)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        """Attach to an optimizer.

        Args:
            optimizer: Its learning rates are the base values.
            milestones: Rising iterations.
            gamma: The factor.
            warmup_factor: Factor at the start of the warm-up.
            warmup_iters: Its length.
            warmup_method: "linear" or "constant".
            last_epoch: The last iteration that is done.

        Raises:
            ValueError: The milestones do not rise.
        """
        if list(milestones) != sorted(milestones):
            raise ValueError(f"milestones must rise, got {list(milestones)}")
        self.milestones, self.gamma = list(milestones), gamma
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def factor(self, iteration: int) -> float:
        """Return `gamma` to the power of the milestones that are reached."""
        return self.gamma ** bisect.bisect_right(self.milestones, iteration)


class WarmupCosineLR(_WithWarmup):
    """Lowers the learning rate to 0 by half a wave of the cosine, after a warm-up."""

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        warmup_factor: float = 0.001,
        warmup_iters: int = 1000,
        warmup_method: str = "linear",
        last_epoch: int = -1,
    ) -> None:
        """Attach to an optimizer; see `WarmupMultiStepLR`. `max_iters` is the length of the run."""
        self.max_iters = max_iters
        super().__init__(optimizer, warmup_factor, warmup_iters, warmup_method, last_epoch)

    def factor(self, iteration: int) -> float:
        """Return the cosine's share of the run."""
        return 0.5 * (1 + math.cos(math.pi * iteration / self.max_iters))
