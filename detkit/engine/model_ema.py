"""A running mean of a model's weights, which is often the better model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_FIRST_DECAY = 10


class ModelEMA:
    """The exponential moving average of the tensors of a model, its norms' statistics included; a checkpoint's `ema`.

    Whole numbers, such as counts of batches, are taken as they are. It is kept on the device of the
    model, and is the same in every process, as the weights are.

    Source: Polyak and Juditsky 1992; in the exponential form Tarvainen and Valpola 2017, arXiv
        1703.01780, section 2.
    """

    def __init__(self, model: nn.Module, *, decay: float, warmup: bool = True) -> None:
        """Start from the present weights.

        Args:
            model: Without the wrapper of DistributedDataParallel. It is followed, never changed but
                within `applied`.
            decay: Share of the mean that an update keeps, in [0, 1).
            warmup: Keep less at first, (1 + n) / (10 + n) at the n-th update, so that the weights
                that training starts from are soon forgotten.

        Raises:
            ValueError: The decay is out of range.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"MODEL_EMA.DECAY must lie in [0, 1), got {decay!r}")
        self._model = model
        self._decay = decay
        self._warmup = warmup
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Forget the mean, and start again from the present weights."""
        self.num_updates = 0
        self.weights: dict[str, Tensor] = {
            name: value.clone() for name, value in self._model.state_dict().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """Take the present weights into the mean; to be called after each step."""
        self.num_updates += 1
        warm = (1 + self.num_updates) / (_FIRST_DECAY + self.num_updates) if self._warmup else 1.0
        present = self._model.state_dict()
        means, values = [], []
        for name, value in present.items():
            mean = self.weights.get(name)
            if mean is None:  # a buffer that the model has had since its first step only
                self.weights[name] = value.clone()
            elif value.is_floating_point():
                means.append(mean)
                values.append(value)
            else:
                mean.copy_(value)
        # One launch for all tensors: a detector has hundreds, most of them small.
        torch._foreach_lerp_(means, values, 1 - min(self._decay, warm))  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the model have the mean as its weights within the block, and its own ones behind it,
        bit for bit.
        """
        own = {name: value.clone() for name, value in self._model.state_dict().items()}
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
        """Take over what `state_dict` gave, on the device of the model."""
        present = self._model.state_dict()
        missing = sorted(present.keys() - state_dict["weights"].keys())
        if missing:
            raise ValueError(
                f"the checkpoint's averaged weights lack {len(missing)} tensors:"
                f" {', '.join(missing[:3])}"
            )
        self.weights = {
            # Onto a tensor of the model's own layout in memory.
            name: torch.empty_like(present[name]).copy_(value) if name in present else value.clone()
            for name, value in state_dict["weights"].items()
        }
        self.num_updates = state_dict["num_updates"]

    @torch.no_grad()
    def _write(self, weights: Mapping[str, Tensor]) -> None:
        for name, value in self._model.state_dict().items():
            if name in weights:
                value.copy_(weights[name])
