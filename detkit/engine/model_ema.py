"""A running mean of a model's weights, which is often the better model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from detkit.utils.errors import ConfigError, WeightsError
from detkit.utils.text import listed

# Of the warm-up's (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage.
_WARMUP = 10


class ModelEMA:
    """The exponential moving average of a model's weights and norm statistics.

    Integers, such as counts of batches, are copied. The mean is on the device of the model, and the
    same in every process, as the weights are. Checkpoints have it as `ema`.

    Source: Polyak and Juditsky 1992; in the exponential form Tarvainen and Valpola 2017, arXiv
        1703.01780, section 2.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> ema = ModelEMA(model, decay=0.5, warmup=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> ema.update()
        >>> with ema.applied():
        ...     print(model.weight.item())
        0.5
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool = True) -> None:
        """Start from the present weights.

        Args:
            model: Without the wrapper of DistributedDataParallel. Changed only within `applied`.
            decay: Share of the mean that an update keeps, in [0, 1).
            warmup: Keep less at first, (1 + n) / (10 + n) at the n-th update, so that the weights
                that training starts from are soon forgotten.

        Raises:
            ConfigError: `decay` is out of range.
        """
        if not 0 <= decay < 1:
            raise ConfigError(f"MODEL_EMA.DECAY must lie in [0, 1), got {decay!r}")
        self._model = model
        self._decay = decay
        self._warmup = warmup
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the mean, and start again from the present weights."""
        self.num_updates = 0
        self.weights = self._copied()

    @torch.no_grad()
    def update(self) -> None:
        """Add the present weights to the mean; to be called after each step."""
        self.num_updates += 1
        warm = (1 + self.num_updates) / (_WARMUP + self.num_updates) if self._warmup else 1.0
        present = self._model.state_dict()
        means, values = [], []
        for name, value in present.items():
            mean = self.weights.get(name)
            if mean is None:  # a buffer that appeared with the model's first step
                self.weights[name] = value.clone()
            elif value.is_floating_point():
                means.append(mean)
                values.append(value)
            else:
                mean.copy_(value)
        # One launch for all tensors: a detector has hundreds, most of them small.
        get_ema_multi_avg_fn(min(self._decay, warm))(means, values, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the block with the mean as the model's weights; they are restored bit for bit."""
        own = self._copied()
        self._write(self.weights)
        try:
            yield
        finally:
            self._write(own)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean by the names of the model's tensors, and the number of updates."""
        return {"weights": dict(self.weights), "num_updates": self.num_updates}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state returned by `state_dict`, onto the device of the model."""
        present = self._model.state_dict()
        missing = sorted(present.keys() - state_dict["weights"].keys())
        if missing:
            raise WeightsError(
                f"the checkpoint's averaged weights lack {len(missing)} tensors:"
                f" {listed(missing, 3)}"
            )
        self.weights = {}
        for name, value in state_dict["weights"].items():
            # Of the model's memory layout, such as channels_last, for the fused update.
            target = torch.empty_like(present.get(name, value))
            self.weights[name] = target.copy_(value)
        self.num_updates = state_dict["num_updates"]

    def _copied(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._model.state_dict().items():
            if name in weights:
                value.copy_(weights[name])
