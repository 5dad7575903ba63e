"""Plain vision transformers, and a pyramid from their only map.

Papers: Alexey Dosovitskiy et al.: An Image is Worth 16x16 Words: Transformers for Image Recognition
at Scale, 2020, arXiv 2010.11929; as a backbone of detectors: Yanghao Li, Hanzi Mao, Ross Girshick,
Kaiming He: Exploring Plain Vision Transformer Backbones for Object Detection, 2022, arXiv
2203.16527 (ViTDet). Names of the tensors are those of Detectron2, which are MAE's and timm's, too.

Legend: N images, C channels, H and W height and width in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import Conv2d, ShapeSpec, c2_msra_fill, get_norm
from detkit.modeling.backbone.backbone import Backbone, check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.fpn import build_top_block
from detkit.modeling.backbone.transformer.attention import (
    DropPath,
    Mlp,
    PatchEmbed,
    absolute_positions,
    attention,
    drop_rates,
    freeze,
    from_windows,
    init_linear_layers,
    padded_to_windows,
    run_blocks,
    side_in_tokens,
    to_windows,
)
from detkit.utils.errors import ConfigError

LAYER_NORM: Callable[[int], nn.Module] = partial(nn.LayerNorm, eps=1e-6)


class Attention(nn.Module):
    """Self-attention over all tokens of a map, or within windows of it."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool = True,
        window_size: int = 0,
        position_size: tuple[int, int] | None = None,
    ) -> None:
        """Build the layers.

        Args:
            dim: C, a multiple of `num_heads`.
            num_heads: Heads, of C / heads channels each.
            qkv_bias: Whether queries, keys and values have a bias.
            window_size: Side of the windows, in tokens; 0 attends globally.
            position_size: (H, W) that the tables of relative positions are for; None has none.
        """
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = self.rel_pos_w = None
        if position_size is not None:
            # They start at 0, as attention without positions.
            head_dim = dim // num_heads
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * position_size[0] - 1, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * position_size[1] - 1, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H, W, C) for the same."""
        size = (x.shape[1], x.shape[2])
        qkv = self.qkv(x)
        padded_size = size
        if self.window_size:
            # Detectron2 pads before this layer, with zeros, of which it makes its bias.
            qkv = padded_to_windows(qkv, self.window_size, self.qkv.bias)
            padded_size = (qkv.shape[1], qkv.shape[2])
            qkv = to_windows(qkv, self.window_size)
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        positions = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            positions = (self.rel_pos_h, self.rel_pos_w)
        x = attention(query, key, value, positions).permute(0, 2, 3, 1, 4).flatten(3)
        if self.window_size:
            x = from_windows(x, padded_size, size)
        return self.proj(x)


class ResidualConvs(nn.Module):
    """A bottleneck of convolutions that starts as the identity, to let windows communicate.

    Source: arXiv 2203.16527, section 3, "convolutional propagation".
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = dim // 2
        self.conv1 = Conv2d(dim, inner, 1, bias=False)
        self.norm1 = get_norm("LN", inner)
        self.conv2 = Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = get_norm("LN", inner)
        self.conv3 = Conv2d(inner, dim, 1, bias=False)
        self.norm3 = get_norm("LN", dim)
        for conv in (self.conv1, self.conv2, self.conv3):
            c2_msra_fill(conv)
        assert isinstance(self.norm3, nn.Module)
        assert isinstance(self.norm3.weight, Tensor)
        nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H, W, C) for the same."""
        assert self.norm1 is not None
        assert self.norm2 is not None
        assert self.norm3 is not None
        y = F.gelu(self.norm1(self.conv1(x.permute(0, 3, 1, 2))))
        y = self.norm3(self.conv3(F.gelu(self.norm2(self.conv2(y)))))
        return x + y.permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention and an MLP, each behind a norm and beside a shortcut."""

    def __init__(
        self,
        dim: int,
        attn: Attention,
        *,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        use_residual_block: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.residual = ResidualConvs(dim) if use_residual_block else None

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H, W, C) for the same."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x if self.residual is None else self.residual(x)


class ViT(Backbone):
    """A plain vision transformer: one map, of the patches' stride.

    Example:
        >>> vit = ViT(img_size=64, embed_dim=32, depth=2, num_heads=2, use_rel_pos=True)
        >>> vit(torch.zeros(1, 3, 64, 96))["last_feat"].shape
        torch.Size([1, 32, 4, 6])
    """

    @configurable
    def __init__(
        self,
        img_size: int = 1024,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        use_abs_pos: bool = True,
        use_rel_pos: bool = False,
        window_size: int = 0,
        window_block_indexes: Sequence[int] = (),
        residual_block_indexes: Sequence[int] = (),
        use_act_checkpoint: bool = False,
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_feature: str = "last_feat",
        trained_blocks: int = -1,
    ) -> None:
        """Build the transformer, with random weights.

        Args:
            img_size: Side of the images in pixels that the tables of relative positions of global
                blocks are for; they are interpolated for others.
            patch_size: Side of a patch in pixels, the stride of the map.
            in_chans: Channels of the images.
            embed_dim: C, a multiple of `num_heads`.
            depth: Blocks.
            num_heads: Heads of the attention.
            mlp_ratio: Hidden channels of the MLP, in C.
            qkv_bias: Whether queries, keys and values have a bias.
            drop_path_rate: Probability to drop the branches of the last block, in [0, 1); less
                before it, see `drop_rates`.
            norm_layer: Makes a norm over C channels.
            use_abs_pos: Whether to add learnt positions to the tokens.
            use_rel_pos: Whether attention has decomposed relative positions.
            window_size: Side of the windows in tokens.
            window_block_indexes: Blocks that attend within windows, from 0; the others globally.
            residual_block_indexes: Blocks that are followed by a bottleneck of convolutions.
            use_act_checkpoint: Keep only the inputs of blocks for the backward pass.
            pretrain_img_size: Side of the images that the learnt positions are for.
            pretrain_use_cls_token: Whether these have a row for a class token.
            out_feature: Name of the map.
            trained_blocks: How many of the last blocks train; -1 trains everything. Otherwise the
                first blocks, patches and positions are frozen, and take no memory for gradients.

        Raises:
            ValueError: Channels do not divide into heads.
            ValueError: A number is out of range; the message names it.
        """
        super().__init__()
        _check_blocks("window_block_indexes", window_block_indexes, depth)
        _check_blocks("residual_block_indexes", residual_block_indexes, depth)
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads: got {embed_dim} and {num_heads}"
            )
        if window_block_indexes and window_size < 1:
            raise ValueError(f"window_size must be at least 1 for windows: got {window_size}")
        if not -1 <= trained_blocks <= depth:
            raise ValueError(
                f"trained_blocks must lie between 0 and depth ({depth}), or be -1 for all: got"
                f" {trained_blocks}"
            )
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, patch_size)
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.pos_embed = None
        if use_abs_pos:
            side = side_in_tokens("pretrain_img_size", pretrain_img_size, patch_size)
            count = side**2 + pretrain_use_cls_token
            self.pos_embed = nn.Parameter(torch.zeros(1, count, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList()
        for index, rate in enumerate(drop_rates(drop_path_rate, depth)):
            window = window_size if index in window_block_indexes else 0
            position_size = None
            if use_rel_pos:
                side = window or side_in_tokens("img_size", img_size, patch_size)
                position_size = (side, side)
            self.blocks.append(
                Block(
                    embed_dim,
                    Attention(embed_dim, num_heads, qkv_bias, window, position_size),
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    norm_layer=norm_layer,
                    use_residual_block=index in residual_block_indexes,
                )
            )
        self._is_checkpointed = use_act_checkpoint
        self._out_features = [out_feature]
        self._out_feature_channels = {out_feature: embed_dim}
        self._out_feature_strides = {out_feature: patch_size}
        init_linear_layers(self)
        if trained_blocks >= 0:
            self._freeze(depth - trained_blocks)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read `MODEL.VIT`."""
        vit = cfg.MODEL.VIT
        windows = []
        if vit.WINDOW_SIZE:
            _check_blocks("MODEL.VIT.GLOBAL_BLOCKS", vit.GLOBAL_BLOCKS, vit.DEPTH)
            windows = [k for k in range(vit.DEPTH) if k not in vit.GLOBAL_BLOCKS]
        return {
            "img_size": vit.IMAGE_SIZE,
            "patch_size": vit.PATCH_SIZE,
            "in_chans": input_shape.channels or 3,
            "embed_dim": vit.EMBED_DIM,
            "depth": vit.DEPTH,
            "num_heads": vit.NUM_HEADS,
            "mlp_ratio": vit.MLP_RATIO,
            "qkv_bias": vit.QKV_BIAS,
            "drop_path_rate": vit.DROP_PATH_RATE,
            "use_abs_pos": vit.ABSOLUTE_POSITIONS,
            "use_rel_pos": vit.RELATIVE_POSITIONS,
            "window_size": vit.WINDOW_SIZE,
            "window_block_indexes": windows,
            "residual_block_indexes": vit.RESIDUAL_BLOCKS,
            "use_act_checkpoint": vit.CHECKPOINT,
            "pretrain_img_size": vit.PRETRAIN_IMAGE_SIZE,
            "pretrain_use_cls_token": vit.PRETRAIN_CLS_TOKEN,
            "trained_blocks": vit.TRAINED_BLOCKS,
        }

    def _freeze(self, num_blocks: int) -> None:
        if self.pos_embed is not None:
            self.pos_embed.requires_grad_(False)
        self.patch_embed.requires_grad_(False)
        for block in self.blocks[:num_blocks]:
            freeze(block)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the map (N, C, H, W) of images; an image is padded to whole patches."""
        side = self.patch_size
        x = self.patch_embed(F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side)))
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + absolute_positions(self.pos_embed, self.pretrain_use_cls_token, size)
        x = run_blocks(self.blocks, x, self._is_checkpointed)
        return {self._out_features[0]: x.permute(0, 3, 1, 2)}

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter: 0 for patches and positions, then a stage per block.

        As in Detectron2's layer decay, the bottlenecks of convolutions, which no pre-training has,
        are in no stage.
        """
        stages = {}
        for name, _ in self.named_parameters():
            if not name.startswith("blocks."):
                stages[name] = 0
            elif ".residual." not in name:
                stages[name] = int(name.split(".")[1]) + 1
        return stages


def _check_blocks(name: str, indexes: Sequence[int], depth: int) -> None:
    wrong = [index for index in indexes if not 0 <= index < depth]
    if wrong:
        raise ValueError(f"{name} must lie between 0 and {depth - 1}: got {wrong}")


class SimpleFeaturePyramid(Backbone):
    """A pyramid from a single map: each level is the map, scaled, behind two convolutions.

    The levels are named by their stride, as in `FPN`. A map whose stride is no power of two, as of
    patches of 14 pixels, is resampled to the nearest one first.

    Source: arXiv 2203.16527, section 3.
    """

    def __init__(
        self,
        net: Backbone,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: Any = None,
        norm: str = "LN",
        square_pad: int = 0,
    ) -> None:
        """Build the pyramid.

        Args:
            net: The network with the map.
            in_feature: Name of the map.
            out_channels: C of every level.
            scale_factors: Size of each level relative to the map, of 4, 2, 1 and 0.5; finest first.
            top_block: See `FPN`.
            norm: See `FPN`.
            square_pad: See `FPN`.

        Raises:
            ValueError: The feature is unknown, or the factors are not among those above, halved
                from level to level and with strides of 1 and more.
        """
        super().__init__()
        shapes = net.output_shape()
        check_features("in_feature", [in_feature], shapes)
        dim, stride = shapes[in_feature].channels or 0, shapes[in_feature].stride or 0
        base = 2 ** round(math.log2(stride))
        self._resampling, self._base = stride / base, base
        numbers = _level_numbers(base, scale_factors)
        for number, factor in zip(numbers, scale_factors, strict=True):
            self.add_module(f"simfp_{number}", _level(dim, out_channels, factor, norm))
        self.net = net
        self.in_feature = in_feature
        self.top_block: Any = top_block
        self._square_pad = square_pad
        self._numbers = numbers
        if top_block is not None:
            numbers = [*numbers, *range(numbers[-1] + 1, numbers[-1] + 1 + top_block.num_levels)]
        self._size_divisibility = 2 ** self._numbers[-1]
        self._out_features = [f"p{number}" for number in numbers]
        self._out_feature_strides = {f"p{number}": 2**number for number in numbers}
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        """The stride of the coarsest level that is made of the map."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The square that images are padded to, if any."""
        return {"square_size": self._square_pad}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the levels (N, C, H / stride, W / stride) of images (N, 3, H, W), finest first."""
        height, width = x.shape[2] // self._base, x.shape[3] // self._base
        maps = self.net(x)
        source = maps[self.in_feature]
        if self._resampling != 1:
            # The exact factor, not the ratio of sizes: the last patches may reach over the border.
            source = F.interpolate(source, scale_factor=self._resampling, mode="bilinear")
            source = source[..., :height, :width]
        levels = {}
        for number in self._numbers:
            levels[f"p{number}"] = self.get_submodule(f"simfp_{number}")(source)
        if self.top_block is not None:
            top_in = self.top_block.in_feature
            further = self.top_block(maps[top_in] if top_in in maps else levels[top_in])
            levels.update(zip(self._out_features[len(levels) :], further, strict=True))
        return levels


def _level_numbers(base: int, scale_factors: Sequence[float]) -> list[int]:
    """Return the log of the stride of each level, from the stride of the map.

    Raises:
        ValueError: See `SimpleFeaturePyramid`.
    """
    known, factors = [4.0, 2.0, 1.0, 0.5], list(scale_factors)
    if not factors or factors not in [known[k : k + len(factors)] for k in range(len(known))]:
        raise ValueError(f"scale_factors must be neighbours in {known}: got {factors}")
    if base < factors[0]:
        raise ValueError(f"scale_factors must be at most the map's stride, {base}: got {factors}")
    return [int(math.log2(base / factor)) for factor in factors]


def _level(dim: int, out_channels: int, factor: float, norm: str) -> nn.Sequential:
    """Return the layers of a level; their positions are part of their names."""
    layers: list[nn.Module] = []
    if factor == 4:
        between = get_norm(norm, dim // 2)
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, 2), between or nn.Identity(), nn.GELU()]
        layers += [nn.ConvTranspose2d(dim // 2, dim // 4, 2, 2)]
        dim //= 4
    elif factor == 2:
        layers += [nn.ConvTranspose2d(dim, dim // 2, 2, 2)]
        dim //= 2
    elif factor == 0.5:
        layers += [nn.MaxPool2d(2, 2)]
    for channels, size in ((dim, 1), (out_channels, 3)):
        layers.append(
            Conv2d(
                channels,
                out_channels,
                size,
                padding=size // 2,
                bias=not norm,
                norm=get_norm(norm, out_channels),
            )
        )
    return nn.Sequential(*layers)


def build_simple_pyramid(cfg: CfgNode, net: Backbone) -> SimpleFeaturePyramid:
    """Build the pyramid of `MODEL.FPN` over the first map of a network, with its top block.

    That is a level by max-pooling, unless `TOP_BLOCK` names another; P6 is made of the pyramid.

    Raises:
        ConfigError: A setting of `MODEL.FPN` is out of range.
    """
    fpn = cfg.MODEL.FPN
    (in_feature, shape), *_ = net.output_shape().items()
    base = 2 ** round(math.log2(shape.stride or 1))
    try:
        coarsest_level = f"p{_level_numbers(base, fpn.SCALE_FACTORS)[-1]}"
        kind = fpn.TOP_BLOCK or "LastLevelMaxPool"
        top_block = build_top_block(kind, fpn.OUT_CHANNELS, coarsest_level)
        return SimpleFeaturePyramid(
            net,
            in_feature,
            fpn.OUT_CHANNELS,
            fpn.SCALE_FACTORS,
            top_block,
            fpn.NORM,
            fpn.SQUARE_PAD,
        )
    except ValueError as error:
        raise ConfigError(f"MODEL.FPN: {error}") from error


@BACKBONE_REGISTRY.register()
def build_vit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ViT:
    """Build the transformer that `MODEL.VIT` describes."""
    return ViT(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_vit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SimpleFeaturePyramid:
    """Build the transformer that `MODEL.VIT` describes, with a simple pyramid."""
    return build_simple_pyramid(cfg, ViT(cfg, input_shape))
