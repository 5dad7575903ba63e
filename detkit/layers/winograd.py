"""3 x 3 convolutions in a quarter of the multiplications, for inference on CPUs.

Legend: N images, C channels in, K channels out, H and W height and width; a tile is 4 x 4 output pixels, which
depend on 6 x 6 input pixels; S tile rows in a strip, T tiles in a row.

Why: a Faster R-CNN R-50-FPN takes 163 G multiply-adds for an image of 800 x 1088, and a direct convolution already runs
near what the CPU can multiply (52 G per second and core where this was measured), so only fewer multiplications help.
F(4 x 4, 3 x 3) takes 36 for a tile where the direct way takes 144. Its transforms are small matrix products whose cost
grows with C + K, that of the multiplications with C * K: hence wide layers only, and maps large enough to pay for the
transform of the weights, which is done in every call so that no second state of them could be out of date.

Milliseconds of CPU time on one core (EPYC with AVX-512, torch 2.15, float32, channels-last, best of several runs):

    C = K   map         tiles   direct   here
    256     200 x 272    3400      568    273
    256      50 x 68      221       35     20
    128     100 x 136     850       35     23
    128      50 x 68      221      9.1    6.0
    512      50 x 68      221      144     68
    512      40 x 40      100       67     37
    512      25 x 34       63       36     33   does not apply: 20 ms go into the weights; on a Xeon slower than direct
    256      25 x 34       63      9.3    7.8   does not apply: the limit is one for all widths

The model: from 3.69 to 2.82 s, in 16 convolutions. Results differ from the direct ones by about 1e-5 of the largest.

More threads than free cores undo it: a strip has several parallel regions, and threads of OpenMP spin at the end of
each. Two threads on one free core of a Xeon took 380 ms for 256 channels on 100 x 136, against 105 direct, and 67 with
``OMP_WAIT_POLICY=passive``; one thread took 50, against 95 direct.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _once(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32, device="cpu")


def _twice(rows: list[list[float]]) -> Tensor:
    """Give the matrix that applies ``rows`` down and across a flattened square patch."""
    return torch.kron(_once(rows), _once(rows))


# Polynomials at the points 0, 1, -1, 2, -2 and infinity, in this order.
_INPUT_TRANSFORM = _once(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_WEIGHT_TRANSFORM = _twice(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
_OUTPUT_TRANSFORM = _twice(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
)
# The point (1, 1), whose powers are all 1: what is added here reaches each of the 16 output pixels once.
_POINT_OF_ONES = 7

# Measured: see the table above.
_MIN_CHANNELS = 128
_MIN_TILES = 100
# About 20 MB of each intermediate at 256 channels. On a quiet machine 128 takes 3 % longer on the largest maps; where
# other processes are busy, and every parallel region waits for them, 35 %.
_TILES_PER_STRIP = 512


def winograd_applies(input: Tensor, weight: Tensor, bias: Tensor | None, geometry: nn.Conv2d) -> bool:
    """Tell whether `winograd_conv2d` gives what a layer would, and sooner.

    Args:
        input: (N, C, H, W)
        weight: (K, C, 3, 3), as it will be used: with a folded norm.
        bias: (K,), likewise.
        geometry: The layer; only its kernel size, stride, padding, dilation, groups and modes are read.
    """
    return (
        _is_plain_3x3(geometry)
        and not (geometry.training or torch.compiler.is_compiling())
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and all(_is_cpu_float32(tensor) for tensor in (input, weight, bias) if tensor is not None)
        and not torch.is_autocast_enabled("cpu")
        and input.dim() == 4
        and input.shape[1] == weight.shape[1]
        and input.is_contiguous(memory_format=torch.channels_last)
        and min(weight.shape[:2]) >= _MIN_CHANNELS
        and _num_tiles(input.shape[2]) * _num_tiles(input.shape[3]) >= _MIN_TILES
    )


def _is_plain_3x3(geometry: nn.Conv2d) -> bool:
    return (
        geometry.kernel_size == (3, 3)
        and geometry.stride == (1, 1)
        and geometry.padding == (1, 1)
        and geometry.dilation == (1, 1)
        and geometry.groups == 1
        and geometry.padding_mode == "zeros"
    )


def _is_cpu_float32(tensor: Tensor) -> bool:
    needs_gradient = tensor.requires_grad and torch.is_grad_enabled()
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and not needs_gradient


def _num_tiles(side: int) -> int:
    return -(-side // 4)


def winograd_conv2d(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Give ``F.conv2d(input, weight, bias, padding=1)`` up to rounding.

    Source: Lavin and Gray 2015, arXiv 1509.09308, F(4 x 4, 3 x 3) of section 4.3.

    Args:
        input: (N, C, H, W) float32 on the CPU, channels-last. N, H and W may be 0.
        weight: (K, C, 3, 3)
        bias: (K,)

    Returns:
        (N, K, H, W), channels-last. An infinite or NaN input pixel spoils the whole tiles that depend on it.
    """
    N, _, H, W = input.shape
    shape = (N, weight.shape[0], H, W)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=torch.channels_last)
    if output.numel() == 0:
        return output
    weight_points = _transform_weight(weight)
    for input_i, output_i in zip(input.permute(0, 2, 3, 1), output.permute(0, 2, 3, 1), strict=True):
        _convolve_image(input_i, weight_points, bias, output_i)
    return output


def _transform_weight(weight: Tensor) -> Tensor:
    """Give (36, C, K) for (K, C, 3, 3): across first, as `_transform_strip` leaves the points."""
    K, C = weight.shape[:2]
    # C stays last: channels-last weights are then moved in rows, not number by number.
    points = _WEIGHT_TRANSFORM @ weight.permute(3, 2, 0, 1).reshape(9, K * C)
    return points.view(36, K, C).transpose(1, 2)


def _convolve_image(image: Tensor, weight_points: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """Fill ``output`` (H, W, K) from ``image`` (H, W, C)."""
    H, W, _ = image.shape
    num_rows, T = _num_tiles(H), _num_tiles(W)
    padded = _pad(image, 4 * num_rows + 2, 4 * T + 2)
    # A strip stays in the cache from one transform to the next; the whole map would take 9 / 4 of its size in each.
    S = max(1, _TILES_PER_STRIP // T)
    for first in range(0, num_rows, S):
        S_i = min(S, num_rows - first)
        products = torch.bmm(_transform_strip(padded, first, S_i, T), weight_points)
        if bias is not None:
            products[_POINT_OF_ONES] += bias
        pixels = _OUTPUT_TRANSFORM @ products.view(36, -1)
        _place_tiles(pixels.view(4, 4, S_i, T, -1), output[4 * first : 4 * (first + S_i)])


def _pad(image: Tensor, height: int, width: int) -> Tensor:
    """Give ``image`` (H, W, C) with a zero to the left and above, and zeros to the right and below."""
    H, W, C = image.shape
    padded = image.new_empty((height, width, C))
    padded[1 : H + 1, 1 : W + 1] = image
    # The border alone: zeros everywhere would be a second pass over the map.
    for border in (padded[0], padded[H + 1 :], padded[:, 0], padded[:, W + 1 :]):
        border.zero_()
    return padded


def _transform_strip(padded: Tensor, first: int, S: int, T: int) -> Tensor:
    """Give the points (36, S * T, C), across first, of the S tile rows that begin with tile row ``first``."""
    y_step, C, _ = padded.stride()
    # Down before across: so the columns that two tiles share are transformed once, where they lie.
    rows = padded.as_strided((S, 6, y_step), (4 * y_step, y_step, 1), first * 4 * y_step)
    down = torch.bmm(_INPUT_TRANSFORM.expand(S, 6, 6), rows)
    patches = down.as_strided((6, 6, S, T, C), (C, y_step, 6 * y_step, 4 * C, 1))
    return (_INPUT_TRANSFORM @ patches.reshape(6, -1)).view(36, S * T, C)


def _place_tiles(tiles: Tensor, strip: Tensor) -> None:
    """Write ``tiles`` (4, 4, S, T, K), across first, into ``strip`` (up to 4 S, up to 4 T, K), less what is outside."""
    height, width, K = strip.shape
    S, T = tiles.shape[2:4]
    if (height, width) == (4 * S, 4 * T):
        strip.view(S, 4, T, 4, K).copy_(tiles.permute(2, 1, 3, 0, 4))
    else:
        strip.copy_(tiles.permute(2, 1, 3, 0, 4).reshape(4 * S, 4 * T, K)[:height, :width])
