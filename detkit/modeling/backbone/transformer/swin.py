"""Swin transformers: attention within windows that are shifted in every second block.

Paper: Ze Liu, Yutong Lin, Yue Cao, Han Hu, Yixuan Wei, Zheng Zhang, Stephen Lin, Baining Guo: Swin
Transformer: Hierarchical Vision Transformer using Shifted Windows, 2021, arXiv 2103.14030. Names of
the tensors are those of the authors' code and of Detectron2.

Legend: N images or windows, C channels, H and W height and width in tokens, S side of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.config import CfgNode, configurable
from detkit.layers import ShapeSpec
from detkit.modeling.backbone.backbone import Backbone, check_features
from detkit.modeling.backbone.build import BACKBONE_REGISTRY
from detkit.modeling.backbone.fpn import FPN, build_fpn
from detkit.modeling.backbone.transformer.attention import (
    DropPath,
    Mlp,
    PatchEmbed,
    absolute_positions,
    drop_rates,
    freeze,
    from_windows,
    init_linear_layers,
    padded_to_windows,
    run_blocks,
    side_in_tokens,
    to_windows,
)


class NormedPatchEmbed(PatchEmbed):
    """Patches, padded to whole ones, with a norm behind them."""

    def __init__(self, in_channels: int, channels: int, patch_size: int, has_norm: bool) -> None:
        super().__init__(in_channels, channels, patch_size, patch_size)
        self.patch_size = patch_size
        self.norm = nn.LayerNorm(channels) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (N, H, W, C) of images."""
        side = self.patch_size
        x = super().forward(F.pad(x, (0, -x.shape[3] % side, 0, -x.shape[2] % side)))
        return x if self.norm is None else self.norm(x)


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learnt bias for each relative position and head."""

    relative_position_index: Tensor

    def __init__(self, dim: int, window_size: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        count = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(count * count, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        places = torch.cartesian_prod(torch.arange(window_size), torch.arange(window_size))
        distances = places[:, None] - places[None] + window_size - 1
        self.register_buffer(
            "relative_position_index", distances[..., 0] * count + distances[..., 1]
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, shift: int) -> Tensor:
        """Return (N, H, W, C) for the same, with windows shifted to the bottom right.

        Args:
            x: Tokens.
            shift: By how many tokens; 0 leaves the windows in place.
        """
        size, side = (x.shape[1], x.shape[2]), self.window_size
        # The paper's code pads before this layer, with zeros, of which it makes its bias.
        qkv = padded_to_windows(self.qkv(x), side, self.qkv.bias)
        padded_size = (qkv.shape[1], qkv.shape[2])
        # (heads, S * S, S * S)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if shift:
            qkv = qkv.roll((-shift, -shift), dims=(1, 2))
            apart = _apart(padded_size, side, shift, x.device)
            bias = (bias + apart.to(bias.dtype)[:, None] * -100.0).flatten(0, 1)
        windows = to_windows(qkv, side).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = windows.permute(2, 0, 3, 1, 4)
        # The biases of a shifted image's windows are broadcast over the images.
        images = (x.shape[0], -1, *query.shape[2:]) if shift else query.shape
        attended = F.scaled_dot_product_attention(
            query.reshape(images), key.reshape(images), value.reshape(images), bias.to(query.dtype)
        ).reshape(query.shape)
        attended = attended.transpose(1, 2).flatten(2).unflatten(1, (side, side))
        if not shift:
            return self.proj(from_windows(attended, padded_size, size))
        x = from_windows(attended, padded_size, padded_size).roll((shift, shift), dims=(1, 2))
        return self.proj(x[:, : size[0], : size[1]])


def _apart(size: tuple[int, int], side: int, shift: int, device: torch.device) -> Tensor:
    """Return (windows, S * S, S * S): which tokens of a window are no neighbours in the image.

    Rolling the image brings its first rows and columns behind its last ones.
    """
    bounds = []
    for length in size:
        place = torch.arange(length, device=device)
        bounds.append((place >= length - side).long() + (place >= length - shift))
    regions = (bounds[0][:, None] * 3 + bounds[1])[None, ..., None]
    of_window = to_windows(regions, side).flatten(1)
    return of_window[:, None] != of_window[:, :, None]


class SwinBlock(nn.Module):
    """Attention within windows and an MLP, each behind a norm and beside a shortcut."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window_size: int,
        shift: int,
        mlp_ratio: float,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window_size, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H, W, C) for the same."""
        x = x + self.drop_path(self.attn(self.norm1(x), self.shift))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Merges 2x2 tokens into one of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H / 2, W / 2, 2 C), rounded up, of (N, H, W, C)."""
        x = padded_to_windows(x, 2)
        # Columns before rows, an order that weights depend on.
        parts = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(parts.flatten(3)))


class SwinStage(nn.Module):
    """Blocks at one stride; `downsample` leads to the next stage."""

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformer(Backbone):
    """A Swin transformer: maps of strides 4 to 32, called `p0` to `p3`.

    Example:
        >>> swin = SwinTransformer(embed_dim=24, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
        >>> {name: tuple(x.shape[1:]) for name, x in swin(torch.zeros(1, 3, 64, 96)).items()}
        {'p0': (24, 16, 24), 'p1': (48, 8, 12), 'p2': (96, 4, 6), 'p3': (192, 2, 3)}
    """

    @configurable
    def __init__(
        self,
        pretrain_img_size: int = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.2,
        ape: bool = False,
        patch_norm: bool = True,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        use_checkpoint: bool = False,
    ) -> None:
        """Build the transformer, with random weights.

        Args:
            pretrain_img_size: Side of the images in pixels that absolute positions are for.
            patch_size: Side of a patch in pixels.
            in_chans: Channels of the images.
            embed_dim: C of the first stage; doubles with each stage.
            depths: Blocks of each stage.
            num_heads: Heads of each stage.
            window_size: S
            mlp_ratio: Hidden channels of the MLPs, in C.
            qkv_bias: Whether queries, keys and values have a bias.
            drop_path_rate: Probability to drop the branches of the last block, in [0, 1); less
                before it, see `drop_rates`.
            ape: Whether to add learnt positions to the patches.
            patch_norm: Whether a norm follows the patches.
            out_indices: Stages to return, from 0.
            frozen_stages: -1 trains all, 0 freezes the patches, 1 also the first stage, ...
            use_checkpoint: Keep only the inputs of blocks for the backward pass.

        Raises:
            ValueError: `depths` and `num_heads` differ in number, channels do not divide into
                heads, or a stage to return does not exist.
        """
        super().__init__()
        if len(depths) != len(num_heads):
            raise ValueError(
                f"depths and num_heads need a number per stage: got {list(depths)},"
                f" {list(num_heads)}"
            )
        dims = [embed_dim * 2**stage for stage in range(len(depths))]
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(
                    f"num_heads must divide the channels {dims}: got {list(num_heads)}"
                )
        names = [f"p{stage}" for stage in range(len(depths))]
        self._out_features = [f"p{stage}" for stage in out_indices]
        check_features("out_indices", self._out_features, names)
        self._out_feature_channels = dict(zip(names, dims, strict=True))
        self._out_feature_strides = {n: patch_size * 2**k for k, n in enumerate(names)}

        self.patch_embed = NormedPatchEmbed(in_chans, embed_dim, patch_size, patch_norm)
        self.absolute_pos_embed = None
        if ape:
            side = side_in_tokens("pretrain_img_size", pretrain_img_size, patch_size)
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, embed_dim, side, side))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        rates = iter(drop_rates(drop_path_rate, sum(depths)))
        self.layers = nn.ModuleList()
        for stage, (dim, depth, heads) in enumerate(zip(dims, depths, num_heads, strict=True)):
            blocks = [
                SwinBlock(
                    dim,
                    heads,
                    window_size=window_size,
                    shift=window_size // 2 if index % 2 else 0,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    drop_path=next(rates),
                )
                for index in range(depth)
            ]
            is_last = stage == len(depths) - 1
            self.layers.append(SwinStage(blocks, None if is_last else PatchMerging(dim)))
        for stage in out_indices:
            self.add_module(f"norm{stage}", nn.LayerNorm(dims[stage]))
        self._is_checkpointed = use_checkpoint
        init_linear_layers(self)
        self._freeze(frozen_stages)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read `MODEL.SWIN`."""
        swin = cfg.MODEL.SWIN
        return {
            "pretrain_img_size": swin.PRETRAIN_IMAGE_SIZE,
            "patch_size": swin.PATCH_SIZE,
            "in_chans": input_shape.channels or 3,
            "embed_dim": swin.EMBED_DIM,
            "depths": swin.DEPTHS,
            "num_heads": swin.NUM_HEADS,
            "window_size": swin.WINDOW_SIZE,
            "mlp_ratio": swin.MLP_RATIO,
            "qkv_bias": swin.QKV_BIAS,
            "drop_path_rate": swin.DROP_PATH_RATE,
            "ape": swin.ABSOLUTE_POSITIONS,
            "out_indices": swin.OUT_STAGES,
            "frozen_stages": cfg.MODEL.BACKBONE.FREEZE_AT - 1,
            "use_checkpoint": swin.CHECKPOINT,
        }

    def _freeze(self, frozen_stages: int) -> None:
        if frozen_stages >= 0:
            self.patch_embed.requires_grad_(False)
            if self.absolute_pos_embed is not None:
                self.absolute_pos_embed.requires_grad_(False)
        for stage in self.layers[: max(frozen_stages, 0)]:
            freeze(stage)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps (N, C, H, W) of images, by name."""
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            table = self.absolute_pos_embed.flatten(2).transpose(1, 2)
            x = x + absolute_positions(table, False, (x.shape[1], x.shape[2]))
        outputs = {}
        for index, stage in enumerate(self.layers):
            assert isinstance(stage, SwinStage)
            x = run_blocks(stage.blocks, x, self._is_checkpointed)
            if f"p{index}" in self._out_features:
                normed = self.get_submodule(f"norm{index}")(x)
                outputs[f"p{index}"] = normed.permute(0, 3, 1, 2)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter: 0 for the patches, then a stage per block."""
        stages, count = {}, 0
        for index, stage in enumerate(self.layers):
            assert isinstance(stage, SwinStage)
            for name, _ in stage.named_parameters():
                part = name.split(".")
                number = int(part[1]) if part[0] == "blocks" else len(stage.blocks) - 1
                stages[f"layers.{index}.{name}"] = count + number + 1
            count += len(stage.blocks)
        for name, _ in self.named_parameters():
            if name.startswith(("patch_embed", "absolute_pos_embed")):
                stages[name] = 0
        return stages


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinTransformer:
    """Build the transformer that `MODEL.SWIN` describes, frozen up to `BACKBONE.FREEZE_AT`."""
    return SwinTransformer(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the transformer that `MODEL.SWIN` describes, with the pyramid of `build_fpn`."""
    return build_fpn(cfg, SwinTransformer(cfg, input_shape))
