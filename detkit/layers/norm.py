"""Normalisation layers, and the names that a config uses for them.

Legend: N images, C channels, H and W height and width, L pyramid levels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detkit.layers.cpu.prepared_weights import PreparedWeights, may_be_kept
from detkit.utils import comm
from detkit.utils.logger import log_first_n
from detkit.utils.text import did_you_mean


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with everything fixed: a multiplication and an addition per channel.

    Its four numbers per channel are buffers, so that no optimizer touches them. A new one is the
    identity: `running_var` is `1 - eps`, so that weights without statistics (those of MSRA, where
    they are folded into weight and bias) are applied exactly.

    The factor and the summand of each channel are computed once, and again when a buffer was
    replaced or changed in place. What is written through `buffer.data` or NumPy is not noticed
    before the next `train()` or `eval()`.
    """

    num_batches_tracked: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        # None unless converted from a BatchNorm that had it: the state_dict keeps its names.
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        scale, shift = scale_and_shift(self)
        # One pass over x. Unlike F.batch_norm it keeps no copy of x for the backward pass.
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Set the mode, which changes no number, and compute factor and summand anew."""
        _KEPT.forget(self)
        return super().train(mode)

    def extra_repr(self) -> str:
        """Show what `nn.BatchNorm2d` shows."""
        return f"num_features={self.num_features}, eps={self.eps}"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Freeze every BatchNorm2d and SyncBatchNorm in a module.

        Those of a derived class, which may compute more (an activation, say), are kept, in eval
        mode and without gradients.

        Args:
            module: Its children are replaced in place; a module that is a plain batch norm itself
                is not changed.

        Returns:
            The module, or its frozen counterpart when it is a plain batch norm itself.

        Raises:
            ValueError: A plain batch norm keeps no running statistics.

        Example:
            >>> FrozenBatchNorm2d.convert_frozen_batchnorm(nn.Sequential(nn.BatchNorm2d(8)))
            Sequential(
              (0): FrozenBatchNorm2d(num_features=8, eps=1e-05)
            )
        """
        if _is_plain_batch_norm(module):
            return cls._from_batchnorm(module)
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            keep_in_eval_mode(module)
            return module.requires_grad_(False)
        for name, child in module.named_children():
            frozen = cls.convert_frozen_batchnorm(child)
            if frozen is not child:
                setattr(module, name, frozen)
        return module

    @classmethod
    def convert_frozenbatchnorm2d_to_batchnorm2d(cls, module: nn.Module) -> nn.Module:
        """Let every frozen batch norm of a module learn again, from where it stands.

        Args:
            module: Its children are replaced in place.

        Returns:
            The module, or its BatchNorm2d when it is a frozen batch norm itself.
        """
        if isinstance(module, FrozenBatchNorm2d):
            norm = nn.BatchNorm2d(module.num_features, module.eps).to(module.weight)
            numbers = {k: v for k, v in module.state_dict().items() if k != "num_batches_tracked"}
            norm.load_state_dict(numbers, strict=False)
            return norm.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls.convert_frozenbatchnorm2d_to_batchnorm2d(child))
        return module

    @classmethod
    def _from_batchnorm(cls, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(f"only a batch norm with running statistics can be frozen: got {norm}")
        frozen = cls(norm.num_features, norm.eps).to(norm.running_mean.device).train(norm.training)
        if norm.affine:
            frozen.weight.copy_(norm.weight.detach())
            frozen.bias.copy_(norm.bias.detach())
        frozen.running_mean.copy_(norm.running_mean)
        frozen.running_var.copy_(norm.running_var)
        if norm.num_batches_tracked is not None:
            frozen.num_batches_tracked = norm.num_batches_tracked.clone()
        return frozen


class EvalBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that stays in eval mode: weight and bias learn, statistics are fixed."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.eval()

    def train(self, mode: bool = True) -> EvalBatchNorm2d:
        """Stay in eval mode."""
        return super().train(False)


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of each pixel, (N, C, H, W) to the same.

    Not an `nn.LayerNorm`: in Detectron2, weight decay treats its weight and bias like those of
    other layers (`SOLVER.WEIGHT_DECAY_NORM` does not apply), and the recipes of ViTDet count on it.
    """

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        channels = self.weight.shape
        x = F.layer_norm(x.permute(0, 2, 3, 1), channels, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Show channels and epsilon."""
        return f"{len(self.weight)}, eps={self.eps}"


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.SyncBatchNorm` for CPUs, where torch has none. On GPUs, torch's is faster."""

    def __init__(self, num_features: int, *args: Any, stats_mode: str = "", **kwargs: Any) -> None:
        """Build the layer.

        Args:
            num_features: C
            stats_mode: Not used: statistics are those of all pixels, which are Detectron2's in mode
                "N", and in mode "" where batches are of one size.
            args: Of `nn.BatchNorm2d`.
            kwargs: Of `nn.BatchNorm2d`.
        """
        super().__init__(num_features, *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W); in training by the statistics of all processes' pixels."""
        if not self.training or comm.get_world_size() == 1:
            return super().forward(input)
        count = _all_reduce_sum(input.new_full((1,), input.numel() / input.shape[1]))
        # Two passes: E[x^2] - E[x]^2 would lose digits where the mean is large.
        mean = _all_reduce_sum(input.sum(dim=(0, 2, 3))) / count
        centred = input - mean[:, None, None]
        variance = _all_reduce_sum(centred.square().sum(dim=(0, 2, 3))) / count
        if self.track_running_stats:
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            unbiased = variance.detach() * count / (count - 1)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]


class _AllReduceSum(torch.autograd.Function):
    # Every process uses the sum, so the gradient is the sum of the processes' gradients.

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


def _all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, in all of them, with gradients."""
    return _AllReduceSum.apply(value)


class CycleBatchNormList(nn.ModuleList):
    """Batch norm for a head shared by L levels: statistics per level, one weight and bias.

    Names are Detectron2's, where the layer counts its calls to know the level. detkit's heads say
    which it is, so that a call too few or too many cannot shift the levels.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, length: int, bn_class: Callable[..., nn.Module] = nn.BatchNorm2d, **kwargs: Any
    ) -> None:
        """Build the norms.

        Args:
            length: L
            bn_class: Called L times, for one level each.
            kwargs: Its arguments: `num_features`, which is C, and `eps`, `momentum`, .... `affine`
                says whether there is a weight and bias.
        """
        is_affine = kwargs.pop("affine", True)
        super().__init__(bn_class(affine=False, **kwargs) for _ in range(length))
        channels = kwargs["num_features"]
        self.weight = nn.Parameter(torch.ones(channels)) if is_affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if is_affine else None
        self._num_calls = 0

    def forward(self, x: Tensor, level: int | None = None) -> Tensor:
        """Normalise the (N, C, H, W) map of a level; without one, of the level after the last."""
        if level is None:
            level = self._num_calls % len(self)
            self._num_calls += 1
        x = self[level](x)
        if self.weight is None or self.bias is None:
            return x
        return torch.addcmul(self.bias[:, None, None], x, self.weight[:, None, None])


# -- what can be frozen, and folded

FixedNorm = FrozenBatchNorm2d | nn.BatchNorm2d | nn.SyncBatchNorm


def _is_plain_batch_norm(norm: nn.Module | None) -> TypeGuard[nn.BatchNorm2d | nn.SyncBatchNorm]:
    # Exact types: a derived class may compute something else, as timm's do, which hold an
    # activation.
    return type(norm) in (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d, EvalBatchNorm2d)


def freeze_norm(norm: nn.Module) -> nn.Module:
    """Return what replaces a norm so that no step changes its weight, bias and statistics.

    Args:
        norm: A plain batch norm gives a FrozenBatchNorm2d. Any other is kept, in eval mode and
            without gradients.
    """
    if _is_plain_batch_norm(norm) and norm.affine and norm.running_var is not None:
        return FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    keep_in_eval_mode(norm)
    return norm.requires_grad_(False)


def keep_in_eval_mode(norm: nn.Module) -> None:
    """Keep a norm of any class in eval mode, whatever `train()` sets for the model around it."""
    if not stays_in_eval_mode(norm):
        norm.register_forward_pre_hook(_to_eval_mode)


def stays_in_eval_mode(norm: nn.Module) -> bool:
    """Return whether a norm is in eval mode in training, too."""
    return isinstance(norm, EvalBatchNorm2d) or _to_eval_mode in norm._forward_pre_hooks.values()


# A hook, at module level: a method set on the instance would be lost in a copy, and pickle does not
# find a class that is made at run time.
def _to_eval_mode(module: nn.Module, _: object) -> None:
    module.eval()


def fixed_norm(norm: nn.Module | None) -> FixedNorm | None:
    """Return the norm itself if it is, at the moment, a fixed affine map per channel; else None.

    Fixed are a FrozenBatchNorm2d, and a plain batch norm in eval mode with running statistics.
    """
    if isinstance(norm, FrozenBatchNorm2d):
        return norm if type(norm) is FrozenBatchNorm2d else None
    if _is_plain_batch_norm(norm) and norm.affine and not norm.training:
        return norm if norm.running_var is not None else None
    return None


# What frozen norms compute is kept in training, too: otherwise each of 53 norms would launch five
# small operators in every step, which a GPU executes faster than the host can queue them.
_KEPT = PreparedWeights()


def scale_and_shift(norm: FixedNorm) -> tuple[Tensor, Tensor]:
    """Return the factor (C,) and the summand (C,) that a norm with fixed statistics applies."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    sources = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if isinstance(norm, FrozenBatchNorm2d) and may_be_kept(sources):
        return _KEPT.get(norm, "scale and shift", sources, partial(_scale_and_shift, norm))
    return _scale_and_shift(norm)


def _scale_and_shift(norm: FixedNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


# -- norms by name


def _sync_batchnorm(num_channels: int) -> nn.Module:
    if comm.get_world_size() > 1:
        on_gpus = dist.get_backend() == dist.Backend.NCCL
        return nn.SyncBatchNorm(num_channels) if on_gpus else SyncBatchNorm2d(num_channels)
    message = "SyncBN in a single process: built as BN, which computes the same"
    log_first_n(logging.INFO, message, key="SyncBN as BN")
    return nn.BatchNorm2d(num_channels)


def _group_norm(num_channels: int) -> nn.Module:
    # 32 as in Detectron2, the default of Wu and He 2018, arXiv 1803.08494.
    if num_channels % 32 != 0:
        raise ValueError(
            "norm 'GN' has 32 groups: the number of channels must be a multiple of 32, got"
            f" {num_channels}"
        )
    return nn.GroupNorm(32, num_channels)


_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "FrozenBN": FrozenBatchNorm2d,
    "BN": nn.BatchNorm2d,
    "SyncBN": _sync_batchnorm,
    # Detectron2's other implementations of the same.
    "nnSyncBN": _sync_batchnorm,
    "naiveSyncBN": _sync_batchnorm,
    "naiveSyncBN_N": _sync_batchnorm,
    "GN": _group_norm,
    "LN": LayerNorm2d,
}
NORM_NAMES: tuple[str, ...] = ("", *_NORMS)
"""What `get_norm` knows by name; "" is none."""


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """Build a norm over `out_channels` channels.

    Args:
        norm: One of `NORM_NAMES`; a class or function that takes the number of channels; or None.
        out_channels: C of the maps to normalise.

    Returns:
        The norm; None for None and "".

    Raises:
        ValueError: The name is unknown.
        ValueError: The norm cannot have that many channels.

    Example:
        >>> get_norm("FrozenBN", 64)
        FrozenBatchNorm2d(num_features=64, eps=1e-05)
    """
    if norm is None or norm == "":
        return None
    if not isinstance(norm, str):
        return norm(out_channels)
    if norm not in _NORMS:
        hint = did_you_mean(norm, _NORMS)
        known = ", ".join(_NORMS)
        raise ValueError(f"unknown norm {norm!r}.{hint} Known: {known}, or '' for none")
    return _NORMS[norm](out_channels)
