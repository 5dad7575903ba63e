"""Any plain vision transformer of timm as a backbone: one map, for a simple pyramid.

timm, by Ross Wightman, is an optional dependency: it is imported when such a backbone is built.

Legend: N images, C channels, H and W height and width in pixels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.backbone.backbone import Backbone
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.foreign_backbone import load_published
from detkit.modeling.backbone.pixel_settings import made_for_pixels, warn_of_unset_pixels
from detkit.modeling.backbone.timm_backbone import (
    check_timm_name,
    import_timm,
    published_weights,
    timm_pixel_settings,
)
from detkit.modeling.backbone.transformer.vit import SimpleFeaturePyramid, build_simple_pyramid


class TimmViT(Backbone):
    """The patches of a vision transformer of timm behind its last norm, as one map `last_feat`.

    Positions, learnt or rotary, follow the size of the image; class and register tokens take part
    in the attention and are left out of the map. The tensors have timm's names, behind `body.`.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        pretrained: bool = False,
        trained_blocks: int = -1,
        drop_path_rate: float = 0.0,
        use_act_checkpoint: bool = False,
        in_channels: int = 3,
    ) -> None:
        """Build the model, with random weights.

        Args:
            name: As in `timm.create_model`, with or without the tag of its weights.
            pretrained: Whether `load_initial_weights` loads the published weights.
            trained_blocks: How many of the last blocks train, and the norm behind them; 0 freezes
                everything, -1 trains everything. What is frozen takes no memory for gradients.
            drop_path_rate: Probability to drop the branches of the last block; less before it.
            use_act_checkpoint: Keep only the inputs of blocks for the backward pass.
            in_channels: Channels of the images.

        Raises:
            MissingTimmError: timm is not installed; the message says how to install it.
            ValueError: timm has no such model, or it is no plain transformer of images of any size.
            ValueError: `trained_blocks` is out of range.
        """
        super().__init__()
        timm = import_timm()
        check_timm_name(timm, "name", name)
        self.name, self.pretrained = name, pretrained
        self._arguments = {
            "model_name": name,
            "in_chans": in_channels,
            "drop_path_rate": drop_path_rate,
            "dynamic_img_size": True,
        }
        try:
            # Weights come later, from `load_initial_weights`: a resumed run downloads nothing.
            body = timm.create_model(**self._arguments, pretrained=False)
            self._last = len(body.blocks) - 1
            # Without the classifier, whose parameters would never get a gradient.
            body.prune_intermediate_layers([self._last], prune_norm=False, prune_head=True)
            self._patch_size: int = body.patch_embed.patch_size[0]
            channels: int = body.embed_dim
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"name: {name!r} is no plain vision transformer that takes images of any size"
                f" ({error}); build_timm_fpn_backbone is for models of several stages"
            ) from error
        self.body: Any = body
        self.body.set_grad_checkpointing(use_act_checkpoint)
        if not -1 <= trained_blocks <= len(body.blocks):
            raise ValueError(
                f"trained_blocks must lie between 0 and {len(body.blocks)}, the blocks of {name},"
                f" or be -1 for all: got {trained_blocks}"
            )
        if trained_blocks >= 0:
            _freeze(body, trained_blocks)
        self._out_features = ["last_feat"]
        self._out_feature_channels = {"last_feat": channels}
        self._out_feature_strides = {"last_feat": self._patch_size}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read `MODEL.TIMM`."""
        settings = cfg.MODEL.TIMM
        return {
            "name": settings.NAME,
            "pretrained": settings.PRETRAINED,
            "trained_blocks": settings.TRAINED_BLOCKS,
            "drop_path_rate": settings.DROP_PATH_RATE,
            "use_act_checkpoint": settings.CHECKPOINT,
            "in_channels": input_shape.channels or 3,
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the map (N, C, H / patch, W / patch), rounded up, of images padded by zeros."""
        side = self._patch_size
        x = F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side))
        (last,) = self.body.forward_intermediates(
            x, indices=[self._last], norm=True, output_fmt="NCHW", intermediates_only=True
        )
        return {"last_feat": last}

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter: 0 for patches, tokens and positions, then the blocks.

        The last norm is in no stage: it learns at the full rate, as what follows it.
        """
        stages = {}
        for name, _ in self.body.named_parameters():
            if name.startswith("blocks."):
                stages[f"body.{name}"] = int(name.split(".")[1]) + 1
            elif not name.startswith("norm."):
                stages[f"body.{name}"] = 0
        return stages

    def load_initial_weights(self) -> str:
        """Load the published weights and return their name, or "" for random weights.

        Raises:
            MissingFileError: They would have to be downloaded, and DETKIT_OFFLINE is set.
            WeightsError: The weights lack tensors.
        """
        source, weights = published_weights(self._arguments) if self.pretrained else ("", {})
        return load_published(self.body, source, weights, "MODEL.TIMM.TRAINED_BLOCKS to -1")


def _freeze(body: Any, trained_blocks: int) -> None:
    body.requires_grad_(False)
    trained = list(body.blocks)[len(body.blocks) - trained_blocks :]
    for block in trained:
        block.requires_grad_(True)
    if trained:
        body.norm.requires_grad_(True)
    for block in list(body.blocks)[: len(body.blocks) - trained_blocks]:
        for module in block.modules():
            # Noise on features that cannot adapt to it.
            if type(module).__name__ == "DropPath":
                module.drop_prob = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0


@BACKBONE_REGISTRY.register()
@made_for_pixels(timm_pixel_settings)
def build_timm_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build the transformer that `MODEL.TIMM` names, with a simple pyramid."""
    warn_of_unset_pixels(cfg)
    return build_simple_pyramid(cfg, TimmViT(cfg, input_shape))
