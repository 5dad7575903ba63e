"""What backbones from other libraries have in common: features named by stride, found by a look at what comes out.

Legend: N images, C channels, H and W height and width.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.layers import ShapeSpec
from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.dry_run import parameters_behind
from detkit.utils.near_miss import did_you_mean

logger = logging.getLogger(__name__)

PROBE_SIZE = (256, 384)
"""Height and width of the image that strides are measured on. Their ratio is no power of two, so that no map can be
mistaken for one whose channels come last."""

FOREIGN_NORMS = ("", "FrozenBN", "SyncBN")


@dataclass(frozen=True)
class FeatureMap:
    """Channels and stride of a map, and whether it comes as (N, H, W, C)."""

    channels: int
    stride: int
    is_channels_last: bool = False


def feature_map_of(value: Any) -> FeatureMap | None:
    """Return what map of an image of `PROBE_SIZE` a value is; None where it has no power of two as
    its stride.
    """
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    for first, is_channels_last in ((2, False), (1, True)):
        height, width = value.shape[first : first + 2]
        if 0 < height <= PROBE_SIZE[0]:
            stride = PROBE_SIZE[0] // height
            if (height * stride, width * stride) == PROBE_SIZE and stride & (stride - 1) == 0:
                return FeatureMap(
                    value.shape[3 if is_channels_last else 1], stride, is_channels_last
                )
    return None


def check_chosen(key: str, chosen: Sequence[str], known: Sequence[str], model: str) -> None:
    """Refuse features that a model does not have, or none.

    Raises:
        ValueError: Names the key, and near misses.
    """
    if len(chosen) == 0:
        raise ValueError(f"{key} needs at least one of {list(known)}: got none")
    for name in chosen:
        if name not in known:
            hint = did_you_mean(name, known)
            raise ValueError(
                f"{key} must be of {list(known)}, the strides of {model}: got {name!r}.{hint}"
            )


def features_to_merge(out_features: Sequence[str], in_features: Sequence[str]) -> list[str]:
    """Return those of the features that a pyramid merges: layers behind others would be without a
    gradient.
    """
    merged = [name for name in out_features if name in in_features]
    # A pyramid that asks for more is refused by its builder, which then has all names to list.
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
            body: Gives a map per entry of `maps`, in that order, in a list or dict.
            maps: By the names they get, finest first.
            out_features: Which of them to give.
            in_channels: C of the images.
            freeze_at: Stops training what the maps of strides up to 2^freeze_at are made of; their
                batch norms keep their statistics. For a ResNet 1 is the stem and 2 is res2, as for
                detkit's own. 0 freezes nothing.
            norm: "FrozenBN" fixes the statistics and parameters of every batch norm, "SyncBN"
                computes statistics over all processes; empty leaves the norms as they are.
            freeze_norm: Gives the frozen counterpart of a batch norm.
            sync_norm: Gives the counterpart of a batch norm over all processes.

        Raises:
            ValueError: If `norm` is not known, or names a batch norm and there is none.
        """
        super().__init__()
        if norm not in FOREIGN_NORMS:
            hint = did_you_mean(norm, FOREIGN_NORMS)
            raise ValueError(f"NORM must be one of {list(FOREIGN_NORMS)}: got {norm!r}.{hint}")
        if norm and not any(_is_batch_norm(module) for module in body.modules()):
            raise ValueError(
                f"NORM {norm!r} is for batch norms, which this model has none of: leave it empty"
            )
        self.body = body
        self._maps = dict(maps)
        self._out_features = list(out_features)
        self._out_feature_channels = {name: feature.channels for name, feature in maps.items()}
        self._out_feature_strides = {name: feature.stride for name, feature in maps.items()}
        behind = dict(zip(maps, parameters_behind(body, PROBE_SIZE, in_channels), strict=True))
        frozen = set().union(
            *(behind[name] for name in maps if maps[name].stride <= 2**freeze_at and freeze_at > 0)
        )
        # A parameter that no map depends on gets no gradient, which DistributedDataParallel waits
        # for.
        used = set().union(*(behind[name] for name in out_features))
        # From the coarsest map to the finest, so that what is behind several maps belongs to the
        # finest.
        self._stages = {
            name: i for i, of in reversed(list(enumerate(behind.values()))) for name in of & used
        }
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name in used and name not in frozen)
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
        """Return the maps (N, C, H / stride, W / stride) of `out_features` for images (N, C, H, W),
        by name.
        """
        outputs = self.body(x)
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        by_name = dict(zip(self._maps, values, strict=True))
        return {
            name: (
                by_name[name].permute(0, 3, 1, 2)
                if self._maps[name].is_channels_last
                else by_name[name]
            )
            for name in self._out_features
        }

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return channels and stride of each feature map, by name."""
        return {
            name: ShapeSpec(channels=self._maps[name].channels, stride=self._maps[name].stride)
            for name in self._out_features
        }

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter by its name: the position of the finest map that
        depends on it.
        """
        return {
            f"body.{name}": self._stages[name]
            for name, _ in self.body.named_parameters()
            if name in self._stages
        }

    @abstractmethod
    def initial_state_dict(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return the weights that training starts from, with what to call them; none where it
        starts from random ones.
        """

    @torch.no_grad()
    def load_initial_weights(self) -> str:
        """Take the published weights; give what they are, or nothing where random ones are wanted.

        The checkpointer calls it when a run starts, and not where a checkpoint brings weights of
        its own.
        """
        source, weights = self.initial_state_dict()
        if not source:
            self._warn_of_frozen_random_weights()
            return ""
        # Names of the classifier are left over. Old files have no counters of batches.
        own = self.body.state_dict()
        missing = [
            name for name in own if name not in weights and not name.endswith("num_batches_tracked")
        ]
        if missing:
            raise ValueError(
                f"{source} lacks {len(missing)} of {len(own)} tensors:"
                f" {', '.join(missing[:3])}, ..."
            )
        self.body.load_state_dict(
            {name: weights[name] for name in own if name in weights}, strict=False
        )
        return source

    def _warn_of_frozen_random_weights(self) -> None:
        frozen = sum(not parameter.requires_grad for parameter in self.body.parameters())
        if frozen:
            logger.warning(
                "%s starts from random weights, and %d of its parameters never train: set"
                " MODEL.BACKBONE.FREEZE_AT to 0, or name weights",
                type(self).__name__,
                frozen,
            )


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
