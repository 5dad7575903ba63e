"""Multiscale vision transformers, version 2: attention over pooled queries, keys and values.

Papers: Haoqi Fan et al.: Multiscale Vision Transformers, 2021, arXiv 2104.11227; Yanghao Li,
Chao-Yuan Wu, Haoqi Fan, Karttikeya Mangalam, Bo Xiong, Jitendra Malik, Christoph Feichtenhofer:
MViTv2: Improved Multiscale Vision Transformers for Classification and Detection, 2021, arXiv
2112.01526. Names of the tensors are those of Detectron2.

Legend: N images, C channels, D channels of a head, H and W height and width in tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
    attention,
    drop_rates,
    freeze,
    from_windows,
    init_linear_layers,
    num_windows,
    padded_to_windows,
    run_blocks,
    side_in_tokens,
    to_windows,
)
from detkit.modeling.backbone.transformer.vit import LAYER_NORM


class MultiScaleAttention(nn.Module):
    """Attention of pooled queries over pooled keys and values, globally or within windows."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        stride_q: int = 1,
        stride_kv: int = 1,
        residual_pooling: bool = True,
        window_size: int = 0,
        position_size: int | None = None,
    ) -> None:
        """Build the layers.

        Args:
            dim: C of the input.
            dim_out: C of the output, a multiple of `num_heads`.
            num_heads: Heads, of D = C / heads channels each.
            qkv_bias: Whether queries, keys and values have a bias.
            norm_layer: Makes a norm over channels.
            stride_q: Stride of the queries, and of the output.
            stride_kv: Stride of keys and values.
            residual_pooling: Whether to add the pooled queries to the output.
            window_size: Side of the windows in tokens of the input, before pooling; 0 for none.
            position_size: Side of the input in tokens that the tables of relative positions are
                for; None has none.
        """
        super().__init__()
        self.num_heads, self.residual_pooling = num_heads, residual_pooling
        self.query_window, self.key_window = window_size // stride_q, window_size // stride_kv
        self.qkv = nn.Linear(dim, 3 * dim_out, bias=qkv_bias)
        self.proj = nn.Linear(dim_out, dim_out)
        head_dim = dim_out // num_heads
        for name, stride in (("q", stride_q), ("k", stride_kv), ("v", stride_kv)):
            pool = nn.Conv2d(head_dim, head_dim, 3, stride, 1, groups=head_dim, bias=False)
            self.add_module(f"pool_{name}", pool)
            self.add_module(f"norm_{name}", norm_layer(head_dim))
        self.rel_pos_h = self.rel_pos_w = None
        if position_size is not None:
            # Of the finer of the two.
            count = 2 * max(position_size // stride_q, position_size // stride_kv) - 1
            self.rel_pos_h = nn.Parameter(torch.zeros(count, head_dim))
            self.rel_pos_w = nn.Parameter(torch.zeros(count, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H / stride_q, W / stride_q, C out) of (N, H, W, C)."""
        count = x.shape[0]
        # (3, N * heads, H, W, D): every head is pooled as an image of its own.
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        query, key, value = (
            self._pooled(name, part.flatten(0, 1)) for name, part in zip("qkv", qkv, strict=True)
        )
        pooled_query, size = query, (query.shape[1], query.shape[2])
        padded_size = size
        if self.query_window:
            # As many of keys as of queries.
            windows = num_windows(query, self.query_window)
            query = padded_to_windows(query, self.query_window, count=windows)
            padded_size = (query.shape[1], query.shape[2])
            query = to_windows(query, self.query_window)
            key, value = (
                to_windows(padded_to_windows(part, self.key_window, count=windows), self.key_window)
                for part in (key, value)
            )
        positions = None
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            positions = (self.rel_pos_h, self.rel_pos_w)
        # Heads are in the first axis already.
        x = attention(query[:, None], key[:, None], value[:, None], positions)[:, 0]
        if self.query_window:
            x = from_windows(x, padded_size, size)
        if self.residual_pooling:
            x = x + pooled_query
        x = x.unflatten(0, (count, self.num_heads)).permute(0, 2, 3, 1, 4).flatten(3)
        return self.proj(x)

    def _pooled(self, name: str, x: Tensor) -> Tensor:
        pool, norm = self.get_submodule(f"pool_{name}"), self.get_submodule(f"norm_{name}")
        return norm(pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MultiScaleBlock(nn.Module):
    """Attention and an MLP; where resolution or channels change, the shortcut does, too."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        attn: MultiScaleAttention,
        *,
        stride: int = 1,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn
        self.norm2 = norm_layer(dim_out)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        self.pool_skip = None
        if stride > 1:
            self.pool_skip = nn.MaxPool2d(stride + 1, stride, (stride + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, H / stride, W / stride, C out) of (N, H, W, C)."""
        normed = self.norm1(x)
        if self.proj is not None:
            x = self.proj(normed)  # of the normed tokens, as in the paper's code
        if self.pool_skip is not None:
            x = self.pool_skip(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(normed))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MViT(Backbone):
    """A multiscale vision transformer: maps of strides 4 to 32, called `scale2` to `scale5`.

    Example:
        >>> mvit = MViT(embed_dim=8, depth=4, last_block_indexes=[0, 1, 2, 3])
        >>> {name: tuple(x.shape[1:]) for name, x in mvit(torch.zeros(1, 3, 64, 96)).items()}
        {'scale2': (8, 16, 24), 'scale3': (16, 8, 12), 'scale4': (32, 4, 6), 'scale5': (64, 2, 3)}
    """

    @configurable
    def __init__(
        self,
        img_size: int = 224,
        patch_kernel: tuple[int, int] = (7, 7),
        patch_stride: tuple[int, int] = (4, 4),
        patch_padding: tuple[int, int] = (3, 3),
        in_chans: int = 3,
        embed_dim: int = 96,
        depth: int = 16,
        num_heads: int = 1,
        last_block_indexes: Sequence[int] = (0, 2, 11, 15),
        adaptive_kv_stride: int = 4,
        adaptive_window_size: int = 56,
        residual_pooling: bool = True,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = LAYER_NORM,
        use_abs_pos: bool = False,
        use_rel_pos: bool = True,
        use_act_checkpoint: bool = False,
        pretrain_img_size: int = 224,
        pretrain_use_cls_token: bool = True,
        out_features: Sequence[str] = ("scale2", "scale3", "scale4", "scale5"),
        frozen_stages: int = -1,
    ) -> None:
        """Build the transformer, with random weights.

        Args:
            img_size: Side of the images in pixels that the tables of relative positions are for.
            patch_kernel: Kernel of the convolution that makes patches.
            patch_stride: Its stride.
            patch_padding: Its padding.
            in_chans: Channels of the images.
            embed_dim: C of the first stage; doubles with each stage, as the heads do.
            depth: Blocks of all stages.
            num_heads: Heads of the first stage.
            last_block_indexes: Last block of each stage, from 0; the last is `depth - 1`.
            adaptive_kv_stride: Stride of keys and values in the first stage; halved with each.
            adaptive_window_size: Side of the windows in tokens of the first stage; halved with
                each. The last block of each stage but the first attends globally.
            residual_pooling: See `MultiScaleAttention`.
            mlp_ratio: Hidden channels of the MLPs, in C.
            qkv_bias: Whether queries, keys and values have a bias.
            drop_path_rate: Probability to drop the branches of the last block, in [0, 1); less
                before it, see `drop_rates`.
            norm_layer: Makes a norm over channels.
            use_abs_pos: Whether to add learnt positions to the patches.
            use_rel_pos: Whether attention has decomposed relative positions.
            use_act_checkpoint: Keep only the inputs of blocks for the backward pass.
            pretrain_img_size: Side of the images that the learnt positions are for.
            pretrain_use_cls_token: Whether these have a row for a class token.
            out_features: Maps to return.
            frozen_stages: -1 trains all, 0 freezes the patches, 1 also the first stage, ...

        Raises:
            ValueError: A map does not exist, the last blocks do not grow up to `depth - 1`,
                channels do not divide into heads, or windows by strides.
        """
        super().__init__()
        last = list(last_block_indexes)
        if any(b <= a for a, b in itertools.pairwise([-1, *last])) or last[-1:] != [depth - 1]:
            raise ValueError(
                f"last_block_indexes must grow, up to depth - 1 = {depth - 1}: got {last}"
            )
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads: got {embed_dim} and {num_heads}"
            )
        names = [f"scale{stage + 2}" for stage in range(len(last))]
        check_features("out_features", out_features, names)
        self._out_features = list(out_features)
        self._out_feature_channels = {n: embed_dim * 2**k for k, n in enumerate(names)}
        self._out_feature_strides = {n: patch_stride[0] * 2**k for k, n in enumerate(names)}
        self._last_blocks = last

        self.patch_embed = PatchEmbed(
            in_chans, embed_dim, patch_kernel[0], patch_stride[0], patch_padding[0]
        )
        self.pretrain_use_cls_token = pretrain_use_cls_token
        self.pos_embed = None
        if use_abs_pos:
            side = side_in_tokens("pretrain_img_size", pretrain_img_size, patch_stride[0])
            count = side**2 + pretrain_use_cls_token
            self.pos_embed = nn.Parameter(torch.zeros(1, count, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList()
        for index, rate in enumerate(drop_rates(drop_path_rate, depth)):
            # The first block of a stage changes resolution and channels, so that it still sees
            # windows and positions of the stage before it.
            stage = sum(index > block for block in last)
            source = sum(index - 1 > block for block in last)
            stride_kv = max(adaptive_kv_stride // 2**stage, 1)
            if index in last[1:3]:
                # Global attention over a fine map: keys are pooled once more.
                stride_kv *= 2
            stride_q = 1 + (stage > source)
            window = 0 if index in last[1:] else adaptive_window_size / 2**source
            if window % stride_q or window % stride_kv:
                raise ValueError(
                    "adaptive_window_size must be a multiple of the strides of queries and keys: in"
                    f" block {index} it is {window:g}, they are {stride_q} and {stride_kv}"
                )
            if use_rel_pos:  # of queries or keys, whichever are finer
                finer = patch_stride[0] * 2**source * min(stride_q, stride_kv)
                side_in_tokens("img_size", img_size, finer)
            attn = MultiScaleAttention(
                embed_dim * 2**source,
                embed_dim * 2**stage,
                num_heads * 2**stage,
                qkv_bias=qkv_bias,
                norm_layer=norm_layer,
                stride_q=stride_q,
                stride_kv=stride_kv,
                residual_pooling=residual_pooling,
                window_size=int(window),
                position_size=img_size // patch_stride[0] // 2**source if use_rel_pos else None,
            )
            self.blocks.append(
                MultiScaleBlock(
                    embed_dim * 2**source,
                    embed_dim * 2**stage,
                    attn,
                    stride=stride_q,
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    norm_layer=norm_layer,
                )
            )
        for name in self._out_features:
            self.add_module(f"{name}_norm", norm_layer(self._out_feature_channels[name]))
        self._is_checkpointed = use_act_checkpoint
        init_linear_layers(self)
        self._freeze(frozen_stages)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        """Read `MODEL.MVIT`."""
        mvit = cfg.MODEL.MVIT
        return {
            "img_size": mvit.IMAGE_SIZE,
            "in_chans": input_shape.channels or 3,
            "embed_dim": mvit.EMBED_DIM,
            "depth": mvit.DEPTH,
            "num_heads": mvit.NUM_HEADS,
            "last_block_indexes": mvit.LAST_BLOCKS,
            "adaptive_kv_stride": mvit.KV_STRIDE,
            "adaptive_window_size": mvit.WINDOW_SIZE,
            "residual_pooling": mvit.RESIDUAL_POOLING,
            "mlp_ratio": mvit.MLP_RATIO,
            "qkv_bias": mvit.QKV_BIAS,
            "drop_path_rate": mvit.DROP_PATH_RATE,
            "use_rel_pos": mvit.RELATIVE_POSITIONS,
            "use_abs_pos": mvit.ABSOLUTE_POSITIONS,
            "use_act_checkpoint": mvit.CHECKPOINT,
            "out_features": mvit.OUT_FEATURES,
            "frozen_stages": cfg.MODEL.BACKBONE.FREEZE_AT - 1,
        }

    def _freeze(self, frozen_stages: int) -> None:
        if frozen_stages >= 0:
            self.patch_embed.requires_grad_(False)
            if self.pos_embed is not None:
                self.pos_embed.requires_grad_(False)
        if frozen_stages < 1:
            return
        for block in self.blocks[: self._last_blocks[:frozen_stages][-1] + 1]:
            freeze(block)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the maps (N, C, H, W) of images, by name."""
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            size = (x.shape[1], x.shape[2])
            x = x + absolute_positions(self.pos_embed, self.pretrain_use_cls_token, size)
        outputs, start = {}, 0
        for stage, end in enumerate(self._last_blocks):
            x = run_blocks(self.blocks[start : end + 1], x, self._is_checkpointed)
            name, start = f"scale{stage + 2}", end + 1
            if name in self._out_features:
                outputs[name] = self.get_submodule(f"{name}_norm")(x).permute(0, 3, 1, 2)
        return outputs

    def parameter_stages(self) -> dict[str, int]:
        """Return the stage of each parameter: 0 for patches and positions, then one per block."""
        stages = {}
        for name, _ in self.named_parameters():
            if name.startswith("blocks."):
                stages[name] = int(name.split(".")[1]) + 1
            elif not name.startswith("scale"):
                stages[name] = 0
        return stages


@BACKBONE_REGISTRY.register()
def build_mvit_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MViT:
    """Build the transformer that `MODEL.MVIT` describes, frozen up to `BACKBONE.FREEZE_AT`."""
    return MViT(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_mvit_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build the transformer that `MODEL.MVIT` describes, with the pyramid of `build_fpn`."""
    return build_fpn(cfg, MViT(cfg, input_shape))
