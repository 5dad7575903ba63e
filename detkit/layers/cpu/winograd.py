"""3 x 3 convolutions with a fifth of the multiplications, forward and backward, on CPUs.

Legend: N images, C channels in, K channels out, H and W height and width; a tile is 6 x 6 output
pixels, which depend on 8 x 8 input pixels; S tile rows in a strip, T tiles in a row.

Why: a Faster R-CNN R-50-FPN takes 163 G multiply-adds for an image of 800 x 1088, and a direct
convolution already runs near the peak of the CPU (52 G per second and core where measured), so only
fewer multiplications help. F(6 x 6, 3 x 3) takes 64 for a tile where the direct way takes 324. Its
transforms are small matrix products whose cost grows with C + K, that of the multiplications with
C * K: hence wide layers only. Transforming the weights pays off for large maps, and for smaller
ones where it is kept from one image to the next (`detkit.layers.cpu.prepared_weights`).

Milliseconds on two cores (EPYC with AVX-512, torch 2.15, float32, channels-last, inputs and weights
not in the cache, medians on a quiet machine), with the weights transformed in every call, and kept:

    C = K   map         tiles   direct   here   weights kept
    256     200 x 272    1564      285    140    132
    256     100 x 136     391       70     38     33
    256      50 x 68      108       18     14      9.3
    256      25 x 34       30      4.9    8.1      3.4
    128     100 x 136     391       18     13     12
    128      50 x 68      108      4.8    4.3      3.4
    512      50 x 68      108       72     58     29
    512      25 x 34       30       19     40     11

Regions of 14 x 14 or 7 x 7, as in the heads, would waste half of the work on whole tiles. They are
put together into mosaics, a pixel apart. Milliseconds of CPU time on one thread where freed memory
is reused (`detkit.utils.env.reuse_freed_memory`), weights kept, and forward and backward:

    C = K   regions         direct   here   both direct   here
    256     100 of 14 x 14     187    103           576    334
    256     20 of 14 x 14       38     21           118     92
    256     1000 of 7 x 7      429    286          1331    905
    512     100 of 14 x 14     764    318          2408   1100

Results differ from the direct ones by about 1e-5 of the largest, twice as much as with tiles of 4 x
4, which took 10 to 20 % longer. Kept weights take 64 / 9 of the memory of the layer's own.

The gradient of the input is such a convolution too; that of the weight is a sum over the tiles of
products of the same two kinds of points. Milliseconds of CPU time, forward and backward, in
alternation on a busy machine (one thread, torch 2.14):

    C = K   N and map      tiles of all   direct   here
    256     2, 80 x 120         560         682     318
    256     2, 40 x 60          140         155      97
    256     4, 32 x 48          192         195     139
    256     1, 32 x 48           48          51      59
    128     2, 60 x 90          300          89      49
    512     1, 40 x 60           70         320     429

More threads than free cores make it slower than the direct way: a strip has several parallel
regions, and threads of OpenMP spin at the end of each. Two threads on one free core of a Xeon took
380 ms for 256 channels on 100 x 136, against 105 direct, and 67 with `OMP_WAIT_POLICY=passive`; one
thread took 50, against 95 direct. (Measured with tiles of 4 x 4.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.layers.cpu.prepared_weights import are_weights_kept
from detkit.layers.cpu.switch import is_traced, may_run_on

_TILE, _PATCH = 6, 8
# Where the polynomials behind the transforms are evaluated; the last point is infinity. Of the
# numbers that floats hold exactly, those nearest to 1 in size: powers of others cost digits.
_POINTS = np.array([0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5])
# The point (1, 1), whose powers are all 1: what is added here reaches each of the 36 output pixels
# once.
_POINT_OF_ONES = 9


def _at_points(num_coefficients: int) -> np.ndarray:
    """Return the (8, n) matrix from n coefficients of a polynomial to its values at the points."""
    finite = np.vander(_POINTS, num_coefficients, increasing=True)
    # The value at infinity is the leading coefficient.
    return np.vstack([finite, np.eye(num_coefficients)[-1]])


def _transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return the transforms of input (8, 8), weights (64, 9) and output (6, 8)."""
    basis, divisors = [], []
    for i, point in enumerate(_POINTS):
        others = np.delete(_POINTS, i)
        # A Lagrange polynomial, 0 at all points but its own, without the factor that makes it 1
        # there: the weights are divided by that instead, and the input transform stays exact.
        basis.append(np.append(np.poly(others)[::-1], 0))
        divisors.append(np.prod(point - others))
    basis.append(np.poly(_POINTS)[::-1])
    divisors.append(1)
    once = _at_points(3) / np.array(divisors)[:, None]
    # Down and across a flattened 3 x 3 kernel in one product.
    matrices = (np.array(basis), np.kron(once, once), _at_points(_TILE).T)
    of_input, of_weight, of_output = (
        torch.tensor(matrix, dtype=torch.float32, device="cpu") for matrix in matrices
    )
    return of_input, of_weight, of_output


_INPUT_TRANSFORM, _WEIGHT_TRANSFORM, _OUTPUT_TRANSFORM = _transforms()

# Measured: see the table above.
_MIN_CHANNELS = 128
_MIN_TILES_OF_IMAGE = 30
# Of a batch, where its work pays for the transforms of the weights.
_MIN_TILES = 100
_MIN_TILES_WITH_GRADIENTS = 150
_MIN_TILES_OF_REGIONS = 60
_MAX_SIDE_OF_REGIONS = 16
# About 30 MB of the mosaic at 256 channels.
_MAX_PIXELS_OF_MOSAIC = 30_000
# About 17 MB of each intermediate at 256 channels.
_TILES_PER_STRIP = 256


def winograd_applies(input: Tensor, weights: Sequence[Tensor], layer: nn.Conv2d) -> bool:
    """Return whether `winograd_conv2d` computes what a layer would, and faster.

    Args:
        input: (N, C, H, W)
        weights: The layer's, and those of a norm that is folded in.
        layer: Its kernel size, stride, padding, dilation, groups and modes are read.
    """
    is_plain_3x3 = (
        layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.padding == (1, 1)
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.padding_mode == "zeros"
    )
    if not is_plain_3x3 or not may_run_on(input):
        return False
    for tensor in (input, *weights):
        if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
            return False
    may_apply = (
        not torch.is_autocast_enabled("cpu")
        and input.dim() == 4
        and input.shape[1] == layer.in_channels
        and input.is_contiguous(memory_format=torch.channels_last)
        and min(layer.in_channels, layer.out_channels) >= _MIN_CHANNELS
    )
    if not may_apply:
        return False
    if needs_gradient((input, *weights)):
        min_tiles = _MIN_TILES_WITH_GRADIENTS
    else:
        min_tiles = 0 if are_weights_kept() else _MIN_TILES
    N, _, H, W = input.shape
    if _are_regions(H, W):
        num_pixels = N * (H + 1) * (W + 1)
        return num_pixels >= _TILE**2 * max(min_tiles, _MIN_TILES_OF_REGIONS)
    num_tiles = _num_tiles(H) * _num_tiles(W)
    return num_tiles >= _MIN_TILES_OF_IMAGE and N * num_tiles >= min_tiles


def needs_gradient(tensors: Sequence[Tensor]) -> bool:
    """Return whether a result of the tensors takes part in a backward pass."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _num_tiles(side: int) -> int:
    return -(-side // _TILE)


def _are_regions(height: int, width: int) -> bool:
    """Return whether maps are so small that whole tiles would waste much of the work."""
    return max(height, width) <= _MAX_SIDE_OF_REGIONS


def transform_weight(weight: Tensor) -> Tensor:
    """Return the (64, C, K) float32 points, across first, of a weight (K, C, 3, 3)."""
    K, C = weight.shape[:2]
    # C stays last: channels-last weights are then moved in rows, not number by number.
    points = _WEIGHT_TRANSFORM @ weight.permute(3, 2, 0, 1).reshape(9, K * C)
    return points.view(_PATCH**2, K, C).transpose(1, 2).contiguous()


def winograd_conv2d(input: Tensor, weight_points: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `F.conv2d(input, weight, bias, padding=1)` up to rounding, without gradients.

    Source: Lavin and Gray 2015, arXiv 1509.09308, section 4; the points: Barabasz et al. 2018,
        arXiv 1803.10986.

    Args:
        input: (N, C, H, W) float32 on the CPU, channels-last. N, H and W may be 0.
        weight_points: (64, C, K), from `transform_weight`.
        bias: (K,)

    Returns:
        (N, K, H, W), channels-last. An infinite or NaN input pixel spoils the whole tiles that
        depend on it, also of neighbouring regions. A region's result depends on its place among
        the others in rounding.
    """
    N, _, H, W = input.shape
    K = weight_points.shape[2]
    output = torch.empty(N, K, H, W, dtype=input.dtype, memory_format=torch.channels_last)
    if output.numel() == 0:
        return output
    outputs = output.movedim(1, 3)
    for part, image in _images(input):
        if _are_regions(H, W):
            convolved = image.new_empty(*image.shape[:2], K)
            _convolve_image(image, weight_points, bias, convolved)
            for regions, row in _mosaic_rows(outputs[part], convolved):
                regions.copy_(row)
        else:
            _convolve_image(image, weight_points, bias, outputs[part][0])
    return output


class WinogradConv2d(torch.autograd.Function):
    """`F.conv2d(input, weight, bias, padding=1)` up to rounding, with its gradients."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (N, K, H, W) as `winograd_conv2d` does, of a weight (K, C, 3, 3)."""
        ctx.save_for_backward(input, weight)
        return winograd_conv2d(input, transform_weight(weight), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of input, weight and bias."""
        input, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled() or is_traced():
            # Gradients of these gradients are asked for, or a batch of them; torch knows them.
            of_conv = torch.ops.aten.convolution_backward
            sizes = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
            return of_conv(gradient, input, weight, [weight.shape[0]], *sizes, needed)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        turned = weight.flip(2, 3).transpose(0, 1)
        # In float32 as the forward pass, also where a loop calls `backward` under autocast.
        with torch.autocast("cpu", enabled=False):
            return (
                winograd_conv2d(gradient, transform_weight(turned)) if needed[0] else None,
                _weight_gradient(input, gradient) if needed[1] else None,
                gradient.sum((0, 2, 3)) if needed[2] else None,
            )


def _weight_gradient(input: Tensor, gradient: Tensor) -> Tensor:
    """Return (K, C, 3, 3) for an input (N, C, H, W) and the gradient of the output (N, K, H, W)."""
    C, K = input.shape[1], gradient.shape[1]
    of_points = input.new_zeros(_PATCH**2, C, K)
    pixels_to_points = _OUTPUT_TRANSFORM.T.contiguous()
    for (_, image), (_, gradient_i) in zip(_images(input), _images(gradient), strict=True):
        for first, S, T, points in _transformed_strips(image):
            tiles = _take_tiles(gradient_i[first : first + _TILE * S], S, T)
            across = pixels_to_points @ tiles.view(_TILE, -1)
            transform = pixels_to_points.expand(_PATCH, _PATCH, _TILE)
            gradient_points = torch.bmm(transform, across.view(_PATCH, _TILE, -1))
            of_points.baddbmm_(points.mT, gradient_points.view(_PATCH**2, S * T, K))
    of_weight = _WEIGHT_TRANSFORM.T @ of_points.view(_PATCH**2, -1)
    return of_weight.view(3, 3, C, K).permute(3, 2, 1, 0)


def _images(input: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield images (H, W, C) that hold a batch (N, C, H, W), each with the part that is in it.

    Regions are put together into mosaics, with zeros between them as at the border of an image.
    """
    N, C, H, W = input.shape
    maps = input.movedim(1, 3)
    if not _are_regions(H, W):
        for i in range(N):
            yield slice(i, i + 1), maps[i]
        return
    # As many rows as fill tiles best.
    num_rows = min(range(1, _TILE + 1), key=lambda n: _num_tiles(n * (H + 1) - 1) / n)
    num_in_row = max(1, _MAX_PIXELS_OF_MOSAIC // (num_rows * (H + 1) * (W + 1)))
    for first in range(0, N, num_rows * num_in_row):
        part = slice(first, min(first + num_rows * num_in_row, N))
        num_columns = -(-(part.stop - first) // num_rows)
        mosaic = maps.new_zeros(num_rows * (H + 1) - 1, num_columns * (W + 1), C)
        for regions, row in _mosaic_rows(maps[part], mosaic):
            row.copy_(regions)
        yield part, mosaic


def _mosaic_rows(maps: Tensor, mosaic: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the maps (N, H, W, C) of each row of a mosaic, and their places in it."""
    H, W = maps.shape[1:3]
    num_columns = mosaic.shape[1] // (W + 1)
    for i, regions in enumerate(maps.split(num_columns)):
        row = mosaic[i * (H + 1) :][:H].unflatten(1, (num_columns, W + 1))
        yield regions, row[:, : len(regions), :W].transpose(0, 1)


def _convolve_image(
    image: Tensor, weight_points: Tensor, bias: Tensor | None, output: Tensor
) -> None:
    """Fill `output` (H, W, K) from `image` (H, W, C)."""
    for first, S, T, points in _transformed_strips(image):
        products = torch.bmm(points, weight_points)
        if bias is not None:
            products[_POINT_OF_ONES] += bias
        # Points to pixels: across, then down.
        across = _OUTPUT_TRANSFORM @ products.view(_PATCH, -1)
        transform = _OUTPUT_TRANSFORM.expand(_TILE, _TILE, _PATCH)
        tiles = torch.bmm(transform, across.view(_TILE, _PATCH, -1))
        rows = output[first : first + _TILE * S]
        _place_tiles(tiles.view(_TILE, _TILE, S, T, -1), rows)


def _transformed_strips(image: Tensor) -> Iterator[tuple[int, int, int, Tensor]]:
    """Yield first output row, S, T and points (64, S * T, C) of strips of an image (H, W, C)."""
    H, W, C = image.shape
    num_rows, T = _num_tiles(H), _num_tiles(W)
    # A strip stays in the cache from one transform to the next; the whole map would take 16 / 9 of
    # its size in each.
    S = min(max(1, _TILES_PER_STRIP // T), num_rows)
    padded = image.new_zeros((_TILE * S + 2, _TILE * T + 2, C))
    for first in range(0, _TILE * num_rows, _TILE * S):
        # The rows of the image from `top` on, which is -1 in the first strip, one to the right:
        # the border of `padded` stays zero, and rows that the image lacks become zero.
        top = first - 1
        begin, end = max(top, 0), min(top + len(padded), H)
        padded[begin - top : end - top, 1 : W + 1] = image[begin:end]
        padded[end - top :].zero_()
        S_i = min(S, num_rows - first // _TILE)
        yield first, S_i, T, _transform_strip(padded, S_i, T)


def _transform_strip(padded: Tensor, S: int, T: int) -> Tensor:
    """Return the points (64, S * T, C), across first, of the first S tile rows of a strip."""
    y_step, C, _ = padded.stride()
    # Down before across: so the columns that two tiles share are transformed once, where they lie.
    # Both views overlap: a tile begins 6 pixels after the one before it, and is 8 pixels long.
    rows = padded.as_strided((S, _PATCH, y_step), (_TILE * y_step, y_step, 1))
    down = torch.bmm(_INPUT_TRANSFORM.expand(S, _PATCH, _PATCH), rows)
    patches = down.as_strided((_PATCH, _PATCH, S, T, C), (C, y_step, _PATCH * y_step, _TILE * C, 1))
    return (_INPUT_TRANSFORM @ patches.reshape(_PATCH, -1)).view(_PATCH**2, S * T, C)


def _place_tiles(tiles: Tensor, strip: Tensor) -> None:
    """Write `tiles` (6, 6, S, T, K), across first, into `strip`, cropped to its size."""
    height, width, K = strip.shape
    S, T = tiles.shape[2:4]
    by_pixel = tiles.permute(2, 1, 3, 0, 4)
    if (height, width) == (_TILE * S, _TILE * T):
        strip.view(S, _TILE, T, _TILE, K).copy_(by_pixel)
    else:
        strip.copy_(by_pixel.reshape(_TILE * S, _TILE * T, K)[:height, :width])


def _take_tiles(strip: Tensor, S: int, T: int) -> Tensor:
    """Return the tiles (6, 6, S, T, K), across first, of a strip, with zeros beyond its end."""
    height, width, K = strip.shape
    if (height, width) != (_TILE * S, _TILE * T):
        strip = F.pad(strip, (0, 0, 0, _TILE * T - width, 0, _TILE * S - height))
    return strip.view(S, _TILE, T, _TILE, K).permute(3, 1, 0, 2, 4).contiguous()
