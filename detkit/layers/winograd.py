"""3 x 3 convolutions in a quarter of the multiplications, for inference on CPUs.

Legend: N images, C channels in, K channels out, H and W height and width; a tile is 4 x 4 output pixels, which
depend on 6 x 6 input pixels; S tile rows in a strip, T tiles in a row.

Why: a Faster R-CNN R-50-FPN takes 163 G multiply-adds for an image of 800 x 1088, and a direct convolution already runs
near what the CPU can multiply (76 G per second and core where this was measured), so only fewer multiplications help.
F(4 x 4, 3 x 3) takes 36 for a tile where the direct way takes 144. Its transforms are small matrix products whose cost
grows with C + K, that of the multiplications with C * K: hence wide layers only, and maps large enough to pay for the
transform of the weights, which is done in every call so that no second state of them could be out of date.

Milliseconds of CPU time on one core (Xeon with AVX-512, torch 2.15, float32, channels-last, best of several runs):

    C = K   map         tiles   direct   here
    256     200 x 272    3400      420    251
    256      50 x 68      221     24.4   12.9
    128     100 x 136     850     27.7   16.1
    128      50 x 68      221      7.3    5.2
    512      50 x 68      221      102     51
    512      40 x 40      100       46     42
    512      25 x 34       63       25     41   does not apply: 19 to 26 ms go into the weights
    256      25 x 34       63      8.4    4.5   does not apply: the limit is one for all widths

The model: from 2.52 to 1.97 s, in 16 convolutions. Results differ from the direct ones by about 1e-5 of the largest.

More threads than free cores undo it: a strip has several parallel regions, and threads of OpenMP spin at the end of
each. Two threads on one free core took 380 ms for 256 channels on 100 x 136, against 105 direct, and 67 with
``OMP_WAIT_POLICY=passive``; one thread takes 50, against 95 direct.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def _twice(rows: list[list[float]]) -> Tensor:
    """Give the matrix that applies ``rows`` down and then across a flattened square patch."""
    matrix = torch.tensor(rows, dtype=torch.float32, device="cpu")
    return torch.kron(matrix, matrix)


# Polynomials at the points 0, 1, -1, 2, -2 and infinity, in this order.
_INPUT_TRANSFORM = _twice(
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
# About 5 MB of each intermediate at 256 channels. 64 and 256 were slower on the largest maps.
_TILES_PER_STRIP = 128


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
    """Give (36, C, K) for (K, C, 3, 3)."""
    K, C = weight.shape[:2]
    # C stays last: channels-last weights are then moved in rows, not number by number.
    points = _WEIGHT_TRANSFORM @ weight.permute(2, 3, 0, 1).reshape(9, K * C)
    return points.view(36, K, C).transpose(1, 2)


def _convolve_image(image: Tensor, weight_points: Tensor, bias: Tensor | None, output: Tensor) -> None:
    """Fill ``output`` (H, W, K) from ``image`` (H, W, C)."""
    H, W, C = image.shape
    num_rows, T = _num_tiles(H), _num_tiles(W)
    padded = image.new_zeros((4 * num_rows + 2, 4 * T + 2, C))
    padded[1 : H + 1, 1 : W + 1] = image
    y_step, x_step, _ = padded.stride()
    # A strip stays in the cache from one transform to the next; the whole map would take 9 / 4 of its size in each.
    S = max(1, _TILES_PER_STRIP // T)
    for first in range(0, num_rows, S):
        S_i = min(S, num_rows - first)
        patches = padded.as_strided((6, 6, S_i, T, C), (y_step, x_step, 4 * y_step, 4 * x_step, 1), first * 4 * y_step)
        points = _INPUT_TRANSFORM @ patches.reshape(36, S_i * T * C)
        products = torch.bmm(points.view(36, S_i * T, C), weight_points)
        if bias is not None:
            products[_POINT_OF_ONES] += bias
        pixels = _OUTPUT_TRANSFORM @ products.view(36, -1)
        _place_tiles(pixels.view(4, 4, S_i, T, -1), output[4 * first : 4 * (first + S_i)])


def _place_tiles(tiles: Tensor, strip: Tensor) -> None:
    """Write ``tiles`` (4, 4, S, T, K) into ``strip`` (up to 4 S, up to 4 T, K), less what lies outside."""
    height, width, K = strip.shape
    S, T = tiles.shape[2:4]
    if (height, width) == (4 * S, 4 * T):
        strip.view(S, 4, T, 4, K).copy_(tiles.permute(2, 0, 3, 1, 4))
    else:
        strip.copy_(tiles.permute(2, 0, 3, 1, 4).reshape(4 * S, 4 * T, K)[:height, :width])
