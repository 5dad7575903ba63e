"""Normalisation layers, and the names that a config gives them.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detkit.layers.sync_batch_norm import SyncBatchNorm2d
from detkit.utils import comm
from detkit.utils.logger import log_first_n
from detkit.utils.near_miss import did_you_mean


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with everything fixed: a multiplication and an addition per channel.

    Its four numbers per channel are buffers, so that no optimizer touches them. As built it changes
    nothing: `running_var` is `1 - eps`, so that weights which come without statistics (those of
    MSRA, where they are folded into weight and bias) mean exactly what they say.
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
        # Absent, unless this layer was made from a BatchNorm that had it: the state_dict keeps its
        # names.
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        scale, shift = scale_and_shift(self)
        # One pass over x. Unlike F.batch_norm it keeps no copy of x for the backward pass.
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    def extra_repr(self) -> str:
        """Show what `nn.BatchNorm2d` shows."""
        return f"num_features={self.num_features}, eps={self.eps}"

    @classmethod
    def convert_frozen_batchnorm(cls, module: nn.Module) -> nn.Module:
        """Freeze every BatchNorm2d and SyncBatchNorm in a module.

        Those of a class derived from them, which may compute more (an activation, say), stay: in
        eval mode, and without gradients.

        Args:
            module: Its children are replaced in place; a module that is a plain batch norm itself
                is not changed.

        Returns:
            The module, or its frozen counterpart when it is a plain batch norm itself.

        Raises:
            ValueError: A plain batch norm keeps no running statistics.
        """
        if type(module) in _BATCH_NORMS:
            return cls._from_batchnorm(module)  # type: ignore[arg-type]
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            return _fix(module)
        for name, child in module.named_children():
            frozen = cls.convert_frozen_batchnorm(child)
            if frozen is not child:
                setattr(module, name, frozen)
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
    """Batch normalisation that stays in eval mode: weight and bias may learn, the running
    statistics are fixed.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.eval()

    def train(self, mode: bool = True) -> EvalBatchNorm2d:
        """Stay in eval mode."""
        return super().train(False)


class LayerNorm2d(nn.LayerNorm):
    """Layer normalisation over the channels of each pixel, (N, C, H, W) to the same."""

    def __init__(self, num_channels: int, eps: float = 1e-6) -> None:
        super().__init__(num_channels, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, H, W)."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# Those that compute batch norm and nothing else, which other subclasses may: timm's have an
# activation.
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm2d, EvalBatchNorm2d)


def freeze_norm(norm: nn.Module) -> nn.Module:
    """Return what takes the place of a norm so that no step changes it: weight, bias and statistics stay, for ever.

    Args:
        norm: A plain batch norm gives a FrozenBatchNorm2d. Any other is kept, in eval mode and
            without gradients.
    """
    if type(norm) in _BATCH_NORMS and norm.affine and norm.running_var is not None:
        return FrozenBatchNorm2d.convert_frozen_batchnorm(norm)
    return _fix(norm)


def _fix(norm: nn.Module) -> nn.Module:
    keep_in_eval_mode(norm)
    return norm.requires_grad_(False)


def keep_in_eval_mode(norm: nn.Module) -> None:
    """Make a norm of any class work in eval mode, whatever `train()` says to the model that it is a
    part of.
    """
    if not stays_in_eval_mode(norm):
        norm.register_forward_pre_hook(_to_eval_mode)


def stays_in_eval_mode(norm: nn.Module) -> bool:
    """Tell whether a norm is in eval mode in training, too."""
    return isinstance(norm, EvalBatchNorm2d) or _to_eval_mode in norm._forward_pre_hooks.values()


# A hook: a method of the instance would be lost in a copy, and a class of its own is not known to
# pickle.
def _to_eval_mode(module: nn.Module, _: object) -> None:
    module.eval()


FixedNorm = FrozenBatchNorm2d | nn.BatchNorm2d | nn.SyncBatchNorm


def fixed_norm(norm: nn.Module | None) -> FixedNorm | None:
    """Return the norm back if it is, at the moment, a fixed affine map per channel; else None.

    That is a FrozenBatchNorm2d, and a batch norm in eval mode with running statistics. Exact types
    only: another subclass may compute something else.
    """
    if type(norm) is FrozenBatchNorm2d:
        return norm
    if type(norm) in _BATCH_NORMS:
        assert isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
        if norm.affine and not norm.training and norm.running_var is not None:
            return norm
    return None


def scale_and_shift(norm: FixedNorm) -> tuple[Tensor, Tensor]:
    """Return the (C,) factor and the (C,) summand that a norm with fixed statistics applies."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


def _sync_batchnorm(num_channels: int) -> nn.Module:
    if comm.get_world_size() > 1:
        on_gpus = dist.get_backend() == dist.Backend.NCCL
        return nn.SyncBatchNorm(num_channels) if on_gpus else SyncBatchNorm2d(num_channels)
    log_first_n(
        logging.INFO,
        "SyncBN in a single process: built as BN, which computes the same",
        key="SyncBN as BN",
    )
    return nn.BatchNorm2d(num_channels)


def _group_norm(num_channels: int) -> nn.Module:
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
    "GN": _group_norm,
    "LN": LayerNorm2d,
}
NORM_NAMES: tuple[str, ...] = ("", *_NORMS)
"""What `get_norm` knows by name; "" is none."""


def get_norm(norm: str | Callable[[int], nn.Module] | None, out_channels: int) -> nn.Module | None:
    """Build a norm over `out_channels` channels.

    Args:
        norm: One of `NORM_NAMES`; a class or function that takes the number of channels; or None.
        out_channels: C of the maps that it normalises.

    Returns:
        None for None and "".

    Raises:
        ValueError: The name is not known, or the norm cannot have that many channels.
    """
    if norm is None or norm == "":
        return None
    if not isinstance(norm, str):
        return norm(out_channels)
    if norm not in _NORMS:
        raise ValueError(
            f"unknown norm {norm!r}.{did_you_mean(norm, _NORMS)} Known: {', '.join(_NORMS)}, or ''"
            " for none"
        )
    return _NORMS[norm](out_channels)
