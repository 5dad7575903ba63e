"""Base of the backbones from other libraries: features are named by stride, found by a dry run.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.dry_run import parameters_behind
from detkit.utils.errors import WeightsError
from detkit.utils.text import did_you_mean, listed

logger = logging.getLogger(__name__)

PROBE_SIZE = (256, 384)
"""Height and width of the image that strides are measured on.

Their ratio is no power of two, so that no map can be mistaken for one whose channels come last.
"""

FOREIGN_NORMS = ("", "FrozenBN", "SyncBN")


@dataclass(frozen=True)
class FeatureMap:
    """Channels and stride of a map, and whether it comes as (N, H, W, C)."""

    channels: int
    stride: int
    is_channels_last: bool = False


def feature_map_of(value: Any) -> FeatureMap | None:
    """Return the map that an output for `PROBE_SIZE` is; None if its stride is no power of two."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    # Swin and its like return (N, H, W, C).
    for first, is_channels_last in ((2, False), (1, True)):
        height, width = value.shape[first : first + 2]
        if 0 < height <= PROBE_SIZE[0]:
            stride = PROBE_SIZE[0] // height
            is_power_of_two = stride & (stride - 1) == 0
            # Both sides: a global pooling to 1x1 has a power of two along the height, too.
            if is_power_of_two and (height * stride, width * stride) == PROBE_SIZE:
                channels = value.shape[3 if is_channels_last else 1]
                return FeatureMap(channels, stride, is_channels_last)
    return None


def nearly_feature_map_of(value: Any) -> FeatureMap | None:
    """Return the map (N, C, H, W) whose sides miss those of a power-of-two stride by a quarter.

    Convolutions and pools without padding leave out what is at the border.
    """
    if not isinstance(value, Tensor) or value.dim() != 4 or min(value.shape[2:]) < 1:
        return None
    stride = 2 ** round(math.log2(PROBE_SIZE[0] / value.shape[2]))
    wanted = (PROBE_SIZE[0] / stride, PROBE_SIZE[1] / stride)
    if any(abs(side - want) > want / 4 for side, want in zip(value.shape[2:], wanted, strict=True)):
        return None
    return FeatureMap(value.shape[1], stride)


def features_to_merge(out_features: Sequence[str], in_features: Sequence[str] | None) -> list[str]:
    """Return those of the features that a pyramid merges; None for no pyramid returns all."""
    if in_features is None:
        return list(out_features)
    # Parameters of other features would get no gradient.
    merged = [name for name in out_features if name in in_features]
    # If the pyramid needs more, its builder raises an error that lists all features.
    return merged if len(merged) == len(in_features) > 0 else list(out_features)


class ForeignBackbone(Backbone):
    """A network of another library as a backbone. A subclass brings `initial_state_dict`."""

    def __init__(
        self,
        *,
        body: nn.Module,
        maps: Mapping[str, FeatureMap],
        out_features: Sequence[str],
        in_channels: int = 3,
        freeze_at: int = 0,
        norm: str = "",
        freeze_norm: Callable[[nn.Module], nn.Module],
        sync_norm: Callable[[nn.Module], nn.Module],
    ) -> None:
        """Wrap a network.

        Args:
            body: Returns a map per entry of `maps`, in that order, in a list or dict.
            maps: The maps by name, finest first.
            out_features: Names of the maps to return.
            in_channels: C of the images.
            freeze_at: Freeze what maps of strides up to 2^freeze_at are computed from, and the
                statistics of batch norms there: 1 is the stem of a ResNet, 2 its res2. 0 freezes
                nothing.
            norm: "FrozenBN" fixes the statistics and parameters of every batch norm, "SyncBN"
                computes statistics over all processes; "" leaves the norms as they are.
            freeze_norm: Returns the frozen counterpart of a batch norm.
            sync_norm: Returns the counterpart of a batch norm over all processes.

        Raises:
            ValueError: `norm` is unknown, or names a batch norm and there is none.
        """
        super().__init__()
        if norm not in FOREIGN_NORMS:
            hint = did_you_mean(norm, FOREIGN_NORMS)
            raise ValueError(f"norm must be one of {list(FOREIGN_NORMS)}: got {norm!r}.{hint}")
        if norm and not any(_is_batch_norm(module) for module in body.modules()):
            raise ValueError(
                f"norm {norm!r} is for batch norms, which this model has none of: leave it empty"
            )
        self.body = body
        self._maps = dict(maps)
        self._out_features = list(out_features)
        self._out_feature_channels = {name: feature.channels for name, feature in maps.items()}
        self._out_feature_strides = {name: feature.stride for name, feature in maps.items()}

        behind = dict(zip(maps, parameters_behind(body, PROBE_SIZE, in_channels), strict=True))
        used: set[str] = set()
        for name in out_features:
            used |= behind[name]
        frozen: set[str] = set()
        self._stages: dict[str, int] = {}
        for stage, (name, feature) in enumerate(maps.items()):
            if freeze_at > 0 and feature.stride <= 2**freeze_at:
                frozen |= behind[name]
            for parameter_name in behind[name] & used:
                # The finest map comes first, and keeps the parameters that coarser ones share.
                self._stages.setdefault(parameter_name, stage)
        for name, parameter in body.named_parameters():
            # DistributedDataParallel waits for a gradient of each parameter that trains, which one
            # that no map depends on never gets.
            parameter.requires_grad_(name in used and name not in frozen)
        # A list: modules are replaced on the way.
        for name, module in list(body.named_modules()):
            if _is_batch_norm(module) and (norm == "FrozenBN" or f"{name}.weight" in frozen):
                body.set_submodule(name, freeze_norm(module))
            elif _is_batch_norm(module) and norm == "SyncBN":
                body.set_submodule(name, sync_norm(module))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copy of a traced graph is in training mode, whatever mode the original was in.
        self.body.train(self.training)

    @property
    def size_divisibility(self) -> int:
        """The coarsest stride: only then are the maps as large as their strides say."""
        return max(self._out_feature_strides.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps (N, C, H / stride, W / stride) of images (N, C, H, W), by name."""
        outputs = self.body(x)
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        by_name = dict(zip(self._maps, values, strict=True))
        for name, feature in self._maps.items():
            if feature.is_channels_last:
                by_name[name] = by_name[name].permute(0, 3, 1, 2)
        return {name: by_name[name] for name in self._out_features}

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter: the position of the finest map that depends on it."""
        names = [name for name, _ in self.body.named_parameters()]
        return {f"body.{name}": self._stages[name] for name in names if name in self._stages}

    @abstractmethod
    def initial_state_dict(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return the name and the tensors of the weights to start from; "" and none for random."""

    def load_initial_weights(self) -> str:
        """Load the published weights and return their name, or "" for random weights.

        The checkpointer calls it when a run starts without a checkpoint.

        Raises:
            WeightsError: The weights lack tensors.
        """
        source, weights = self.initial_state_dict()
        return load_published(self.body, source, weights, "MODEL.BACKBONE.FREEZE_AT to 0")


@torch.no_grad()
def load_published(body: nn.Module, source: str, weights: Mapping[str, Tensor], remedy: str) -> str:
    """Load published weights into a network, and return `source`.

    Args:
        body: With the names of the weights; it may lack some, such as those of the classifier.
        source: Name of the weights; "" keeps the random ones, with a warning if some are frozen.
        weights: By name.
        remedy: The setting that freezes nothing, for the warning.

    Raises:
        WeightsError: The weights lack tensors.
    """
    if not source:
        frozen = sum(not parameter.requires_grad for parameter in body.parameters())
        if frozen:
            logger.warning(
                "%s starts from random weights, and %d of its parameters never train: set %s, or"
                " name weights",
                type(body).__name__,
                frozen,
                remedy,
            )
        return ""
    # Names of the classifier are left over. Old files have no counters of batches.
    own = body.state_dict()
    present = {name: weights[name] for name in own if name in weights}
    counter = "num_batches_tracked"
    missing = [name for name in own if name not in present and not name.endswith(counter)]
    if missing:
        names = listed(missing, 3)
        raise WeightsError(f"{source} lacks {len(missing)} of {len(own)} tensors: {names}")
    # Not strict: counters that are missing keep their 0.
    body.load_state_dict(present, strict=False)
    return source


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
