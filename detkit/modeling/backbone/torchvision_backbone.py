"""Any classification model of torchvision as a backbone.

torchvision traces a model into a graph, and extracts the part that leads to chosen nodes. Which
nodes these are is found here: a dry run tells the stride of each, and among those that share a
stride the output of the stage is taken, not an activation within the next one.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from detkit.checkpoint import load_checkpoint_file
from detkit.config import CfgNode, configurable
from detkit.layers import FrozenBatchNorm2d, ShapeSpec, get_norm
from detkit.modeling.backbone.backbone import check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.dry_run import dry_forward
from detkit.modeling.backbone.foreign_backbone import (
    PROBE_SIZE,
    FeatureMap,
    ForeignBackbone,
    feature_map_of,
    features_to_merge,
    nearly_feature_map_of,
)
from detkit.modeling.backbone.fpn import FPN, build_fpn, build_retinanet_fpn
from detkit.modeling.backbone.pixel_settings import (
    PixelSettings,
    made_for_pixels,
    warn_of_unset_pixels,
)
from detkit.utils.errors import ConfigError
from detkit.utils.text import did_you_mean

# The published files of DenseNet are older than torchvision's code: norm.1 in them is norm1.
_DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])(\.)")


class TorchvisionBackbone(ForeignBackbone):
    """The convolutional part of a classification model; maps are named `s4`, `s8`, ... by stride.

    With `nodes`, the maps are those of any modules, under any names. The tensors have torchvision's
    names behind `body.`.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        weights: str = "",
        norm: str = "",
        freeze_at: int = 0,
        nodes: Sequence[Sequence[str]] = (),
    ) -> None:
        """Build the model, with random weights.

        Args:
            name: As in `torchvision.models.get_model`.
            out_features: Names of the maps to return; layers that no map needs are left out.
            weights: Name in the model's weight enum, for `load_initial_weights`; "" for none.
            norm: See `ForeignBackbone`.
            freeze_at: Likewise.
            nodes: Pairs of a module or node of the model's graph, such as "layer1" or
                "features.12", and the name of its map. They take the place of the ends of stages.

        Raises:
            ValueError: A model, weights, a node or a feature of that name does not exist.
            ValueError: The model has no maps.
        """
        _check_name("name", name)
        # Without the argument they warn that a later version will not initialise their weights.
        arguments = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **arguments)
        _published("weights", name, weights)
        if nodes:
            maps, return_nodes = _named_maps(model, name, nodes)
        else:
            found = stage_nodes(model, name)
            maps = {f"s{feature.stride}": feature for feature in found.values()}
            return_nodes = {node: f"s{feature.stride}" for node, feature in found.items()}
        check_features("out_features", out_features, maps)
        coarsest = max(maps[feature].stride for feature in out_features)
        # Finer maps are kept even if they are not returned: freezing counts from the stem.
        maps = {feature: found for feature, found in maps.items() if found.stride <= coarsest}
        return_nodes = {node: feature for node, feature in return_nodes.items() if feature in maps}
        # The graphs of training and evaluation may differ, as by dropout: no reason for a warning.
        body = create_feature_extractor(model, return_nodes, suppress_diff_warning=True)
        super().__init__(
            body=body.train(),
            maps=maps,
            out_features=out_features,
            freeze_at=freeze_at,
            norm=norm,
            freeze_norm=FrozenBatchNorm2d.convert_frozen_batchnorm,
            sync_norm=_sync_norm,
        )
        self.name, self.weights = name, weights

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, merged: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the arguments that `MODEL.TORCHVISION` sets; see `TimmBackbone` for `merged`."""
        if input_shape.channels != 3:
            raise ConfigError(
                "torchvision's models take images of 3 channels, MODEL.PIXEL_MEAN has"
                f" {input_shape.channels} numbers"
            )
        settings = cfg.MODEL.TORCHVISION
        for pair in settings.NODES:
            if not isinstance(pair, list | tuple) or [type(x) for x in pair] != [str, str]:
                raise ConfigError(
                    f"MODEL.TORCHVISION.NODES must be pairs [node of the model, name]: got {pair!r}"
                )
        out_features = [name for _, name in settings.NODES] or settings.OUT_FEATURES
        return {
            "name": settings.NAME,
            "nodes": settings.NODES,
            "out_features": features_to_merge(out_features, merged),
            "weights": settings.WEIGHTS,
            "norm": settings.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
        }

    def initial_state_dict(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return the weights that `weights` names, from torch.hub's cache or downloaded into it."""
        entry = _published("weights", self.name, self.weights)
        if entry is None:
            return "", {}
        weights = load_checkpoint_file(f"torchvision://{self.name}/{self.weights}")["model"]
        renamed = {_DENSE_LAYER.sub(r"\1\2\3", name): weights[name] for name in weights}
        return f"torchvision's {entry}", renamed


def _named_maps(
    model: nn.Module, name: str, nodes: Sequence[Sequence[str]]
) -> tuple[dict[str, FeatureMap], dict[str, str]]:
    """Return the maps of the nodes by their names, in order of computation, and node -> name."""
    return_nodes: dict[str, str] = {}
    for node, feature in nodes:
        return_nodes[node] = feature
    features = set(return_nodes.values())
    if "" in features or not len(features) == len(return_nodes) == len(nodes):
        raise ValueError(f"nodes: each needs a name, and neither may appear twice: got {nodes}")
    with _tried_on_an_image(name):
        known = get_graph_node_names(model, suppress_diff_warning=True)[1][1:]  # without the image
    for node in return_nodes:
        # The name of a module stands for its last node.
        if not any(other == node or other.startswith(f"{node}.") for other in known):
            hint = did_you_mean(node, [*known, *(part for part, _ in model.named_modules())])
            raise ValueError(f"nodes: the model has no node {node!r}.{hint}")
    with _tried_on_an_image(name):
        body = create_feature_extractor(model, return_nodes, suppress_diff_warning=True)
        values = dry_forward(body, PROBE_SIZE)
    maps = {}
    for feature, value in values.items():
        found = feature_map_of(value) or nearly_feature_map_of(value)
        if found is None:
            raise ValueError(
                f"nodes: {feature!r} is no map of 1/2, 1/4, ... of the image's sides: it has shape"
                f" {tuple(value.shape)} for an image of {PROBE_SIZE[0]}x{PROBE_SIZE[1]}"
            )
        maps[feature] = found
    return maps, return_nodes


def _sync_norm(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, nn.BatchNorm2d)
    synchronised = get_norm("SyncBN", norm.num_features)
    assert isinstance(synchronised, nn.BatchNorm2d | nn.SyncBatchNorm)
    # MobileNetV3 and some EfficientNets have others than the default, such as an eps of 1e-3.
    synchronised.eps, synchronised.momentum = norm.eps, norm.momentum
    synchronised.load_state_dict(norm.state_dict())
    return synchronised


def stage_nodes(model: nn.Module, name: str) -> dict[str, FeatureMap]:
    """Return the node of a model's graph that ends each stage, with its map, finest first.

    Raises:
        ValueError: The model has no map whose sides are those of the image divided by a power of
            two.
    """
    # A node that halves the resolution begins a stage: its own, or that of the largest module
    # around it whose input is the finer map. What goes into it is the output of the stage before.
    # The last node of the coarsest stride ends the last stage.
    maps = _maps_in_order(model, name)
    strides = [feature.stride for _, feature in maps]
    paths = [node.split(".") for node, _ in maps]
    ends = {}
    # Stride 1 is the image.
    for stride in sorted(set(strides) - {1}):
        coarser = [index for index, other in enumerate(strides) if other > stride]
        end = _beginning(paths, strides, coarser[0], stride) if coarser else len(maps)
        index = max(index for index in range(end) if strides[index] == stride)
        node, feature = maps[index]
        ends[node] = feature
    if not ends:
        raise ValueError(
            f"name: {name!r} gives no maps of 1/2, 1/4, ... of the image's sides, which a backbone"
            " needs: transformers without a pyramid and networks without padding do not"
        )
    return ends


def _beginning(paths: list[list[str]], strides: list[int], index: int, stride: int) -> int:
    """Return the first node of the largest module around a node that follows a map of `stride`."""
    for depth in range(1, len(paths[index])):
        module = paths[index][:depth]
        first = next(i for i, path in enumerate(paths) if path[:depth] == module)
        if first > 0 and strides[first - 1] == stride:
            return first
    return index


def _maps_in_order(model: nn.Module, name: str) -> list[tuple[str, FeatureMap]]:
    """Return the nodes whose values are maps of a power-of-two stride, in order of computation."""
    with _tried_on_an_image(name):
        train_nodes, eval_nodes = get_graph_node_names(model, suppress_diff_warning=True)
        # Every node in evaluation, in which the dry run is; training has to name some node as well.
        traced = create_feature_extractor(
            model,
            train_return_nodes=train_nodes[-1:],
            eval_return_nodes=eval_nodes[1:],  # the first is the image
            suppress_diff_warning=True,
        )
        values = dry_forward(traced, PROBE_SIZE)
    found = [(node, feature_map_of(value)) for node, value in values.items()]
    return [(node, feature) for node, feature in found if feature is not None]


@contextlib.contextmanager
def _tried_on_an_image(name: str) -> Iterator[None]:
    """Raise a ValueError that names the model for any error of it on an image of `PROBE_SIZE`."""
    try:
        # A traced module that fails prints its code as well.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except Exception as error:
        height, width = PROBE_SIZE
        raise ValueError(
            f"name: {name!r} does not run on an image of {height}x{width} ({error}), and so cannot"
            " be a backbone: it may be made for images of one size"
        ) from error


def _check_name(where: str, name: str) -> None:
    # Of this module only: list_models() also knows detectors, and models of videos.
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        hint = did_you_mean(name, known)
        raise ValueError(f"{where}: torchvision has no classification model {name!r}.{hint}")


def _published(where: str, name: str, weights: str) -> Any:
    """Return the entry of a model's weight enum; None for ""."""
    if not weights:
        return None
    members = torchvision.models.get_model_weights(name).__members__
    if weights not in members:
        hint = did_you_mean(weights, members)
        raise ValueError(f"{where}: {name} has {list(members)}, got {weights!r}.{hint}")
    return members[weights]


def _pixel_settings(cfg: CfgNode) -> PixelSettings:
    """Return the pixel statistics of a model's weights; of its default ones if it has none."""
    name, weights = cfg.MODEL.TORCHVISION.NAME, cfg.MODEL.TORCHVISION.WEIGHTS
    _check_name("MODEL.TORCHVISION.NAME", name)
    entry = _published("MODEL.TORCHVISION.WEIGHTS", name, weights or "DEFAULT")
    # An entry holds the preprocessing that its weights were evaluated with.
    transforms = entry.transforms()
    return PixelSettings.from_unit_range(transforms.mean, transforms.std)


@BACKBONE_REGISTRY.register()
@made_for_pixels(_pixel_settings)
def build_torchvision_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    """Build the model that `MODEL.TORCHVISION` names, frozen up to `MODEL.BACKBONE.FREEZE_AT`."""
    warn_of_unset_pixels(cfg)
    return TorchvisionBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
@made_for_pixels(_pixel_settings)
def build_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the model with the pyramid of `build_fpn`, without maps that it does not merge."""
    return build_fpn(cfg, _body_of_pyramid(cfg, input_shape))


@BACKBONE_REGISTRY.register()
@made_for_pixels(_pixel_settings)
def build_retinanet_torchvision_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the model with the pyramid of `build_retinanet_fpn`, without maps it does not merge."""
    return build_retinanet_fpn(cfg, _body_of_pyramid(cfg, input_shape))


def _body_of_pyramid(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionBackbone:
    warn_of_unset_pixels(cfg)
    return TorchvisionBackbone(cfg, input_shape, merged=cfg.MODEL.FPN.IN_FEATURES)
