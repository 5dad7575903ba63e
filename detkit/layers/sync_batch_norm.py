"""Batch norm over the batches of all processes.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detkit.utils import comm


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for CPUs, where torch has none. On GPUs, torch's is the faster."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W); in training, by mean and variance over the pixels of all
        processes.
        """
        if not self.training or comm.get_world_size() == 1:
            return super().forward(input)
        count = _sum_over_processes(input.new_full((1,), input.numel() / input.shape[1]))
        # Two passes: the mean of squares less the square of the mean would lose digits.
        mean = _sum_over_processes(input.sum(dim=(0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _sum_over_processes(centred.square().sum(dim=(0, 2, 3))) / count
        if self.track_running_stats:
            self._update_running_statistics(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes. Each gets it, so the gradient is the sum of the
    processes' gradients.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _sum_over_processes(value: Tensor) -> Tensor:
    return _SumOverProcesses.apply(value)  # type: ignore[return-value]
