"""Any model of timm (PyTorch Image Models, by Ross Wightman) that returns features, as a backbone.

timm is an optional dependency: it is imported when such a backbone is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.backbone.backbone import check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.dry_run import dry_forward
from detkit.modeling.backbone.foreign_backbone import (
    PROBE_SIZE,
    FeatureMap,
    ForeignBackbone,
    feature_map_of,
    features_to_merge,
)
from detkit.modeling.backbone.fpn import FPN, build_fpn, build_retinanet_fpn
from detkit.modeling.backbone.pixel_settings import (
    PixelSettings,
    made_for_pixels,
    warn_of_unset_pixels,
)
from detkit.utils import comm
from detkit.utils.download import is_offline
from detkit.utils.errors import MissingFileError, UserError
from detkit.utils.text import did_you_mean

# Transformers are built for images of one size unless one of these is passed; which one depends on
# the family.
_SIZE_ARGUMENTS = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})


class MissingTimmError(UserError, ModuleNotFoundError):
    """timm is not installed."""


class TimmBackbone(ForeignBackbone):
    """The features of a model of timm, named `s4`, `s8`, ... by their strides.

    The tensors have timm's names, those of `features_only=True`, behind `body.`.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        out_features: Sequence[str],
        pretrained: bool = False,
        norm: str = "",
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        """Build the model, with random weights.

        Args:
            name: As in `timm.create_model`, with or without the tag of its weights.
            out_features: Names of the maps to return; stages that no map needs are left out.
            pretrained: Whether `load_initial_weights` loads the published weights.
            norm: See `ForeignBackbone`.
            freeze_at: Likewise.
            in_channels: Likewise.

        Raises:
            MissingTimmError: timm is not installed; the message says how to install it.
            ValueError: A model or a feature of that name does not exist.
            ValueError: The model has no maps.
        """
        timm = import_timm()
        check_timm_name(timm, "name", name)
        arguments = {"model_name": name, "features_only": True, "in_chans": in_channels}
        size_arguments, maps = _probe(timm, arguments, name, in_channels)
        by_name = {f"s{feature.stride}": index for index, feature in maps.items()}
        check_features("out_features", out_features, by_name)
        # Finer maps are kept even if they are not returned: freezing counts from the stem.
        last = max(by_name[feature] for feature in out_features)
        kept = {feature: index for feature, index in by_name.items() if index <= last}
        arguments |= {"out_indices": tuple(kept.values()), **size_arguments}
        # Weights come later, from `load_initial_weights`: a run that resumes downloads nothing.
        body = timm.create_model(**arguments, pretrained=False)
        _cut_off_blocks(timm, body, after=body.feature_info.module_name(last))
        is_alone = comm.get_world_size() == 1
        super().__init__(
            body=body.train(),
            maps={feature: maps[index] for feature, index in kept.items()},
            out_features=out_features,
            in_channels=in_channels,
            freeze_at=freeze_at,
            norm=norm,
            # timm's own functions, which keep the activation that its norms may hold.
            freeze_norm=timm.layers.freeze_batch_norm_2d,
            # nn.SyncBatchNorm needs a process group; alone, a batch norm computes the same.
            sync_norm=(lambda norm: norm) if is_alone else timm.layers.convert_sync_batchnorm,
        )
        self.name, self.pretrained = name, pretrained
        self._arguments = arguments

    @classmethod
    def from_config(
        cls, cfg: CfgNode, input_shape: ShapeSpec, merged: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the arguments that `MODEL.TIMM` sets, for a pyramid only the `merged` features."""
        settings = cfg.MODEL.TIMM
        return {
            "name": settings.NAME,
            "out_features": features_to_merge(settings.OUT_FEATURES, merged),
            "pretrained": settings.PRETRAINED,
            "norm": settings.NORM,
            "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
            "in_channels": input_shape.channels or 3,
        }

    def initial_state_dict(self) -> tuple[str, Mapping[str, Tensor]]:
        """Return the published weights, from the cache of timm's source or downloaded into it."""
        return published_weights(self._arguments) if self.pretrained else ("", {})


def published_weights(arguments: dict[str, Any]) -> tuple[str, Mapping[str, Tensor]]:
    """Return the name and the tensors of a model's published weights.

    They come from the cache of timm's source, or are downloaded into it.

    Args:
        arguments: Of `timm.create_model`, with `model_name`.

    Raises:
        MissingFileError: They would have to be downloaded, and DETKIT_OFFLINE is set.
    """
    timm = import_timm()
    name = arguments["model_name"]
    overlay: dict[str, Any] = {}
    placed = placed_weights(name)
    if placed.is_file():
        overlay = {"pretrained_cfg_overlay": {"file": str(placed)}}
    elif is_offline():
        published = timm.get_pretrained_cfg(name)
        source = published.url
        if published.hf_hub_id:
            source = f"https://huggingface.co/{published.hf_hub_id}"
        raise MissingFileError(
            f"DETKIT_OFFLINE is set: download the .safetensors file of {source} on a machine"
            f" with network, and place it as {placed}"
        )
    # Loaded by timm into a model of its own, which handles old names and other numbers of
    # channels.
    loaded = timm.create_model(**arguments, pretrained=True, **overlay)
    return f"timm's {name}", loaded.state_dict()


def placed_weights(name: str) -> Path:
    """Return the path where weights are looked for before anything is downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints" / "timm" / f"{name}.safetensors"


def import_timm() -> ModuleType:
    """Return the package timm.

    Raises:
        MissingTimmError: It is not installed; the message says how to install it.
    """
    try:
        import timm
        import timm.data
        import timm.layers
        import timm.models
    except ModuleNotFoundError as error:
        raise MissingTimmError(
            "build_timm_backbone needs timm, which is not installed: pip install timm"
        ) from error
    return timm


def check_timm_name(timm: ModuleType, where: str, name: str) -> None:
    """Check that timm has a model, and weights of that tag if the name has one.

    Raises:
        ValueError: It does not; the message starts with `where` and has near misses.
    """
    architecture, _, tag = name.partition(".")
    known = timm.list_models()
    if architecture not in known:
        hint = did_you_mean(architecture, known)
        raise ValueError(f"{where}: timm has no model {architecture!r}.{hint}")
    tagged = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tagged:
        raise ValueError(f"{where}: timm has {tagged}, got {name!r}.{did_you_mean(name, tagged)}")


def _cut_off_blocks(timm: ModuleType, body: nn.Module, after: str) -> None:
    """Remove the blocks after a module, which timm's MobileNets and EfficientNets keep and run."""
    with_blocks = (
        timm.models.efficientnet.EfficientNetFeatures,
        timm.models.mobilenetv3.MobileNetV3Features,
    )
    if isinstance(body, with_blocks):
        assert isinstance(body.blocks, nn.Sequential)
        group, *number = after.split(".")  # "blocks.3", or the stem: "bn1"
        del body.blocks[int(number[0]) + 1 if group == "blocks" else 0 :]


def _probe(
    timm: ModuleType, arguments: dict[str, Any], name: str, in_channels: int
) -> tuple[dict[str, bool], dict[int, FeatureMap]]:
    """Return arguments that let a model take any image size, and its maps by index, finest first.

    Where several maps share a stride, only the last of them is returned.
    """
    failures = []
    for size_arguments in _SIZE_ARGUMENTS:
        try:
            model = timm.create_model(**arguments, **size_arguments)
            outputs = dry_forward(model, PROBE_SIZE, in_channels)
        except Exception as error:
            # Any kind: most families refuse arguments that they do not have by a TypeError, images
            # of another size by an assertion.
            failures.append(error)
            continue
        # The last map of a stride has passed through all layers of its resolution.
        last_of_stride = {}
        for index, value in enumerate(outputs):
            feature = feature_map_of(value)
            if feature is not None:
                last_of_stride[feature.stride] = (index, feature)
        if not last_of_stride:
            shapes = [tuple(value.shape) for value in outputs]
            raise ValueError(
                f"name: {name!r} gives no maps of 1/2, 1/4, ... of the image's sides, which a"
                f" backbone needs: for images of (height, width) {PROBE_SIZE} it gives {shapes}"
            )
        return size_arguments, dict(last_of_stride[stride] for stride in sorted(last_of_stride))
    height, width = PROBE_SIZE
    # The first failure is that of the model as it is; the others may only refuse an argument.
    raise ValueError(
        f"name: {name!r} does not give features of an image of {height}x{width} ({failures[0]}),"
        " and so cannot be a backbone: it may be made for images of one size, or not give features"
    ) from failures[0]


def timm_pixel_settings(cfg: CfgNode) -> PixelSettings:
    """Return the pixel statistics of a model's published weights; ImageNet's if it has none."""
    timm = import_timm()
    check_timm_name(timm, "MODEL.TIMM.NAME", cfg.MODEL.TIMM.NAME)
    published = timm.get_pretrained_cfg(cfg.MODEL.TIMM.NAME)
    if published is None:
        mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
        return PixelSettings.from_unit_range(mean, std)
    return PixelSettings.from_unit_range(published.mean, published.std)


@BACKBONE_REGISTRY.register()
@made_for_pixels(timm_pixel_settings)
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """Build the model that `MODEL.TIMM` names, frozen up to `MODEL.BACKBONE.FREEZE_AT`."""
    warn_of_unset_pixels(cfg)
    return TimmBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
@made_for_pixels(timm_pixel_settings)
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the model with the pyramid of `build_fpn`, without maps that it does not merge."""
    return build_fpn(cfg, _body_of_pyramid(cfg, input_shape))


@BACKBONE_REGISTRY.register()
@made_for_pixels(timm_pixel_settings)
def build_retinanet_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the model with the pyramid of `build_retinanet_fpn`, without maps it does not merge."""
    return build_retinanet_fpn(cfg, _body_of_pyramid(cfg, input_shape))


def _body_of_pyramid(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    warn_of_unset_pixels(cfg)
    return TimmBackbone(cfg, input_shape, merged=cfg.MODEL.FPN.IN_FEATURES)
