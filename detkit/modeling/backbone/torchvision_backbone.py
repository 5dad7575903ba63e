"""Any classification model of torchvision as a backbone.

torchvision traces a model into a graph, and gives the part of the graph that leads to chosen nodes.
Which nodes these are is found here: a dry pass tells the stride of each, and of those that share a
stride the output of the stage is taken, not an activation within the next one.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from detkit.checkpoint import load_checkpoint_file
from detkit.config import CfgNode
from detkit.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.dry_run import dry_forward
from detkit.modeling.backbone.foreign_backbone import (
    PROBE_SIZE,
    FeatureMap,
    ForeignBackbone,
    check_chosen,
    feature_map_of,
    features_to_merge,
)
from detkit.modeling.backbone.fpn import FPN, build_fpn, build_retinanet_fpn
from detkit.modeling.backbone.pixel_settings import (
    PixelSettings,
    made_for_pixels,
    warn_of_unset_pixels,
)
from detkit.utils.near_miss import did_you_mean

_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])(\.)")


class TorchvisionBackbone(ForeignBackbone):
    """The convolutional part of a classification model, whose maps are named `s4`, `s8`, ... by their strides.

    The tensors have torchvision's names behind `body.`.
    """

    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        weights: str = "",
        norm: str = "",
        freeze_at: int = 0,
    ) -> None:
        """Build the model, with random weights.

        Args:
            name: As in `torchvision.models.get_model`.
            out_features: Which maps to give; layers that no map needs are left out.
            weights: What `load_initial_weights` loads: a name in the model's weight enum; empty for
                nothing.
            norm: See `ForeignBackbone`.
            freeze_at: See `ForeignBackbone`.

        Raises:
            ValueError: A model, weights or a feature of that name does not exist, or the model
                gives no maps.
        """
        model = _build_model(name)
        _published(name, weights)
        nodes = stage_nodes(model, name)
        maps = {f"s{feature.stride}": feature for feature in nodes.values()}
        check_chosen("MODEL.TORCHVISION.OUT_FEATURES", out_features, list(maps), name)
        coarsest = max(maps[feature].stride for feature in out_features)
        nodes = {node: feature for node, feature in nodes.items() if feature.stride <= coarsest}
        body = create_feature_extractor(
            model,
            {node: f"s{feature.stride}" for node, feature in nodes.items()},
            suppress_diff_warning=True,
        )
        super().__init__(
            body=body.train(),
            maps={f"s{feature.stride}": feature for feature in nodes.values()},
            out_features=out_features,
            freeze_at=freeze_at,
            norm=norm,
            freeze_norm=FrozenBatchNorm2d.convert_frozen_batchnorm,
            sync_norm=_sync_norm,
        )
        self.name, self.weights = name, weights

    def initial_state_dict(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return the weights that `weights` names, from torch.hub's cache or downloaded into it."""
        entry = _published(self.name, self.weights)
        if entry is None:
            return "", {}
        weights = load_checkpoint_file(f"torchvision://{self.name}/{self.weights}")["model"]
        # The files of DenseNet are older than its code: norm.1 in them is norm1.
        return f"torchvision's {entry}", {
            _DENSE_LAYER.sub(r"\1\2\3", name): weights[name] for name in weights
        }


def _sync_norm(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm2d)
    synchronised = get_norm("SyncBN", norm.num_features)
    assert isinstance(synchronised, nn.BatchNorm2d | nn.SyncBatchNorm)
    synchronised.eps, synchronised.momentum = norm.eps, norm.momentum
    synchronised.load_state_dict(norm.state_dict())
    return synchronised


def stage_nodes(model: nn.Module, name: str) -> dict[str, FeatureMap]:
    """Return the node of a model's graph that ends each stage, with its map, finest first.

    A node that halves the resolution begins a stage: its own, or that of the largest module around
    it which takes in the finer map. What goes into it is the output of the stage before. The last
    node of the coarsest stride ends the last stage.

    Raises:
        ValueError: The model gives no map whose sides are those of the image divided by a power of
            two.
    """
    maps = _maps_in_order(model, name)
    paths = [node.split(".") for node, _ in maps]
    ends = {}
    for stride in sorted({feature.stride for _, feature in maps} - {1}):
        index = next(
            (i for i, (_, feature) in enumerate(maps) if feature.stride > stride), len(maps)
        )
        if index < len(maps):
            index = _beginning(paths, [feature.stride for _, feature in maps], index, stride)
        node, feature = next(
            maps[i] for i in range(index - 1, -1, -1) if maps[i][1].stride == stride
        )
        ends[node] = feature
    if not ends:
        raise ValueError(
            f"MODEL.TORCHVISION.NAME: {name!r} gives no maps of 1/2, 1/4, ... of the image's sides,"
            " which a backbone needs: transformers without a pyramid and networks without padding"
            " do not"
        )
    return ends


def _beginning(paths: list[list[str]], strides: list[int], index: int, stride: int) -> int:
    """Return the first node of the largest module that holds the one at `index` and comes after
    maps of `stride`.
    """
    for depth in range(1, len(paths[index])):
        module = paths[index][:depth]
        first = next(i for i, path in enumerate(paths) if path[:depth] == module)
        if first > 0 and strides[first - 1] == stride:
            return first
    return index


def _maps_in_order(model: nn.Module, name: str) -> list[tuple[str, FeatureMap]]:
    """Return the nodes of the graph whose values are maps of a power-of-two stride, in the order of
    computation.
    """
    try:
        train_nodes, eval_nodes = get_graph_node_names(model, suppress_diff_warning=True)
        everything: dict[str, Any] = {
            "train_return_nodes": train_nodes[-1:],
            "eval_return_nodes": eval_nodes[1:],  # the first is the image
        }
        traced = create_feature_extractor(model, **everything, suppress_diff_warning=True)
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # a traced module that fails prints its code as well
            values = dry_forward(traced, PROBE_SIZE)
    except Exception as error:
        height, width = PROBE_SIZE
        raise ValueError(
            f"MODEL.TORCHVISION.NAME: {name!r} does not run on an image of {height}x{width}"
            f" ({error}), and so cannot be a backbone: it may be made for images of one size"
        ) from error
    found = [(node, feature_map_of(value)) for node, value in values.items()]
    return [(node, feature) for node, feature in found if feature is not None]


def _check_name(name: str) -> None:
    # Of this module only: list_models() also knows detectors, and models of videos.
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(
            f"MODEL.TORCHVISION.NAME: torchvision has no classification model {name!r}.{hint}"
        )


def _build_model(name: str) -> nn.Module:
    _check_name(name)
    arguments = (
        {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    )  # they warn otherwise
    return torchvision.models.get_model(name, weights=None, **arguments)


def _published(name: str, weights: str) -> Any:
    """Return the entry of a model's weight enum; None where no name is given."""
    if not weights:
        return None
    members = torchvision.models.get_model_weights(name).__members__
    if weights not in members:
        hint = did_you_mean(weights, members)
        raise ValueError(
            f"MODEL.TORCHVISION.WEIGHTS: {name} has {list(members)}, got {weights!r}.{hint}"
        )
    return members[weights]


def _pixel_settings(cfg: CfgNode) -> PixelSettings:
    """Return what a model's published weights were trained on; that of the default ones where it
    starts from random.
    """
    name, weights = cfg.MODEL.TORCHVISION.NAME, cfg.MODEL.TORCHVISION.WEIGHTS
    _check_name(name)
    transforms = _published(name, weights or "DEFAULT").transforms()
    return PixelSettings.from_unit_range(transforms.mean, transforms.std)


@BACKBONE_REGISTRY.register()
@made_for_pixels(_pixel_settings)
def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build the model that `MODEL.TORCHVISION` names, frozen up to `MODEL.BACKBONE.FREEZE_AT`.

    Raises:
        ValueError: A setting is out of range, or the model gives no maps; the message names the
            key.
    """
    return _build(cfg, input_shape, cfg.MODEL.TORCHVISION.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
@made_for_pixels(_pixel_settings)
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the model with the pyramid of `build_fpn`, without maps that the pyramid does not
    merge.
    """
    merged = features_to_merge(cfg.MODEL.TORCHVISION.OUT_FEATURES, cfg.MODEL.FPN.IN_FEATURES)
    return build_fpn(cfg, _build(cfg, input_shape, merged))


@BACKBONE_REGISTRY.register()
@made_for_pixels(_pixel_settings)
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the model with the pyramid of `build_retinanet_fpn`, without maps that the pyramid does
    not merge.
    """
    merged = features_to_merge(cfg.MODEL.TORCHVISION.OUT_FEATURES, cfg.MODEL.FPN.IN_FEATURES)
    return build_retinanet_fpn(cfg, _build(cfg, input_shape, merged))


def _build(
    cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str]
) -> TorchvisionBackbone:
    if input_shape.channels != 3:
        raise ValueError(
            "torchvision's models take images of 3 channels, MODEL.PIXEL_MEAN has"
            f" {input_shape.channels} numbers"
        )
    warn_of_unset_pixels(cfg)
    torchvision_cfg = cfg.MODEL.TORCHVISION
    return TorchvisionBackbone(
        name=torchvision_cfg.NAME,
        out_features=out_features,
        weights=torchvision_cfg.WEIGHTS,
        norm=torchvision_cfg.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
