"""What the transformers of images share: attention with positions, windows, the parts of a block.

Legend: N images or windows, C channels, D channels of a head, H and W height and width in tokens, S
    side of a window.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.layers.checkpointing import checkpointed


class PatchEmbed(nn.Module):
    """One token per patch of the image, by a convolution."""

    def __init__(
        self, in_channels: int, channels: int, kernel_size: int, stride: int, padding: int = 0
    ) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, kernel_size, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (N, H, W, C) of images."""
        # Contiguous, or every later norm and sum would go through memory in the order of channels.
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, for each token by itself."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Drops the branch of a residual block, for each image by itself, in training.

    Source: Huang et al. 2016, arXiv 1603.09382; what is kept is scaled to keep the mean.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch, zero for the images where it is dropped."""
        if self.drop_prob == 0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        kept = x.new_empty((x.shape[0], *[1] * (x.dim() - 1))).bernoulli_(keep_prob)
        return x * kept.div_(keep_prob)

    def extra_repr(self) -> str:
        """Show the probability."""
        return f"{self.drop_prob:g}"


def freeze(module: nn.Module) -> None:
    """Freeze a part of a transformer, without noise on its features, which cannot adapt to it."""
    module.requires_grad_(False)
    for child in module.modules():
        if isinstance(child, DropPath):
            child.drop_prob = 0.0


def drop_rates(highest: float, depth: int) -> list[float]:
    """Return the probability for each block, growing linearly from 0.

    Raises:
        ValueError: `highest` is not in [0, 1).
    """
    if not 0 <= highest < 1:
        raise ValueError(f"drop_path_rate must lie in [0, 1), got {highest}")
    return [highest * k / max(depth - 1, 1) for k in range(depth)]


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, is_checkpointed: bool) -> Tensor:
    """Return the output of blocks in sequence, which keep only their inputs if checkpointed."""
    for block in blocks:
        x = checkpointed(block, x) if is_checkpointed else block(x)
    return x


def init_linear_layers(module: nn.Module) -> None:
    """Draw the weights of linear layers from a normal distribution cut at two deviations, of 0.02.

    Source: as in the code of ViT, Swin and MViT; biases are 0.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


# -- windows


def num_windows(x: Tensor, side: int) -> tuple[int, int]:
    """Return how many windows, begun ones too, lie along the height and the width of (N, H, W, C).

    Args:
        x: Tokens.
        side: S
    """
    return (x.shape[1] + side - 1) // side, (x.shape[2] + side - 1) // side


def padded_to_windows(
    x: Tensor, side: int, fill: Tensor | None = None, count: tuple[int, int] | None = None
) -> Tensor:
    """Pad (N, H, W, C) at the bottom and the right to whole windows.

    Args:
        x: Returned itself if its sides are multiples of `side`.
        side: S
        fill: (C,) value of the added tokens; None is zero.
        count: `num_windows`, if it is known.
    """
    height, width = x.shape[1:3]
    # Of the number of windows, from which `torch.export` sees that the sides are multiples.
    rows, columns = count or num_windows(x, side)
    below, right = rows * side - height, columns * side - width
    if not isinstance(below, torch.SymInt) and not below and not right:
        return x
    if fill is None:
        return F.pad(x, (0, 0, 0, right, 0, below))
    fill = fill.to(x.dtype)
    x = torch.cat([x, fill.expand(x.shape[0], height, right, -1)], dim=2)
    return torch.cat([x, fill.expand(x.shape[0], below, columns * side, -1)], dim=1)


def to_windows(x: Tensor, side: int) -> Tensor:
    """Return (N * windows, S, S, C) of whole windows in (N, H, W, C), row by row."""
    count, height, width, channels = x.shape
    x = x.view(count, height // side, side, width // side, side, channels)
    return x.transpose(2, 3).reshape(-1, side, side, channels)


def from_windows(windows: Tensor, padded_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return (N, H, W, C) of `size` from the windows of the padded size: undoes `to_windows`."""
    (height, width), (side, _, channels) = padded_size, windows.shape[1:]
    x = windows.view(-1, height // side, width // side, side, side, channels)
    x = x.transpose(2, 3).reshape(-1, height, width, channels)
    return x[:, : size[0], : size[1]]


# -- positions


def side_in_tokens(name: str, image_size: int, stride: int) -> int:
    """Return how many tokens lie along the side of an image that positions are learnt on.

    Args:
        name: Of the argument with `image_size`, for the message.
        image_size: Side of the image in pixels.
        stride: Of the tokens, in pixels.

    Raises:
        ValueError: The image is smaller than a token.
    """
    if image_size < stride:
        raise ValueError(f"{name} must be at least {stride} for positions, got {image_size}")
    return image_size // stride


def absolute_positions(table: Tensor, has_cls_token: bool, size: tuple[int, int]) -> Tensor:
    """Return (1, H, W, C) of positions that were learnt on a square, interpolated to `size`.

    Args:
        table: (1, tokens, C)
        has_cls_token: Whether the first row belongs to the class token, which is left out.
        size: (H, W)
    """
    if has_cls_token:
        table = table[:, 1:]
    side = round(table.shape[1] ** 0.5)
    grid = table.reshape(1, side, side, -1)
    if not isinstance(size[0], torch.SymInt) and size == (side, side):
        return grid
    resized = F.interpolate(
        grid.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def relative_positions(table: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Return (queries, keys, D) rows of a table of distances along one axis.

    Args:
        table: (distances, D); interpolated if it was made for another number of tokens.
        num_queries: H or W of the queries.
        num_keys: H or W of the keys; if one is a multiple of the other, coordinates are scaled to
            the finer one.
    """
    finer = torch.sym_max(num_queries, num_keys)
    count: Any = 2 * finer - 1
    if isinstance(finer, torch.SymInt) or len(table) != count:
        table = F.interpolate(table.T[None], size=count, mode="linear")[0].T
    device = table.device
    queries = torch.arange(num_queries, device=device)[:, None] * finer // num_queries
    keys = torch.arange(num_keys, device=device).flip(0)[None] * finer // num_keys
    return table[queries + keys]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return scaled dot-product attention, with decomposed relative positions if there are any.

    Args:
        query: (N, heads, H, W, D)
        key: (N, heads, H', W', D)
        value: As the keys.
        positions: Tables for `relative_positions` of rows and of columns. Li et al. 2021, arXiv
            2112.01526, section 4.1: the logits of a query q and a key get q * (its row's distance)
            + q * (its column's distance).

    Returns:
        (N, heads, H, W, D)
    """
    (height, width), (key_height, key_width) = query.shape[2:4], key.shape[2:4]
    channels = query.shape[-1]
    scale = channels**-0.5
    if positions is not None:
        # A bias for each pair of 64 x 64 tokens and 12 heads takes 800 MB in float32. But a sum of
        # a number per (query, row) and one per (query, column) is a dot product with the row and
        # the column in one-hot form, so that it fits into longer queries and keys, and the kernels
        # without a matrix of logits apply.
        of_rows = relative_positions(positions[0], height, key_height).to(query.dtype)
        of_columns = relative_positions(positions[1], width, key_width).to(query.dtype)
        row_logits = torch.einsum("nhyxd,yrd->nhyxr", query, of_rows)
        column_logits = torch.einsum("nhyxd,xcd->nhyxc", query, of_columns)
        # The kernel's own scale would apply to the positions, too.
        query, scale = torch.cat([query * scale, row_logits, column_logits], dim=-1), 1.0
        rows = torch.eye(key_height, dtype=key.dtype, device=key.device)[:, None]
        columns = torch.eye(key_width, dtype=key.dtype, device=key.device)
        key = torch.cat([key, *(x.expand(*key.shape[:4], -1) for x in (rows, columns))], dim=-1)
        # The fast kernels want one number of channels; zeros are cheaper than the plain kernel
        # (training, 32 x 32 tokens on a CPU: 0.9 s for 1.6 s).
        value = F.pad(value, (0, key.shape[-1] - channels))
    query, key, value = (x.flatten(2, 3) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return attended[..., :channels].unflatten(2, (height, width))
