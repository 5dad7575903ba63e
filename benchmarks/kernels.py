"""Processor time of each fast layer for CPUs, beside torch's and torchvision's operators.

    python benchmarks/kernels.py
    python benchmarks/kernels.py ROIAlign --rounds 9

Both take the same layer and inputs in turn, on one thread; weights are kept, as in inference. A
fast layer whose ratio is no longer above 1 with the present torch should be removed.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detkit.evaluation.evaluator import inference_context
from detkit.layers import Conv2d, DeformConv, ROIAlign, cpu_kernels
from detkit.utils.env import reuse_freed_memory


def _features(channels: int, height: int, width: int, number: int = 1) -> Tensor:
    # In memory as in detkit's models on a CPU.
    x = torch.randn(number, channels, height, width)
    return x.contiguous(memory_format=torch.channels_last)


def _conv(
    channels: int, out: int, height: int, width: int, *, number: int = 1, backward: bool = False
) -> Callable[[], object]:
    layer = Conv2d(channels, out, 3, padding=1).train(backward)
    x = _features(channels, height, width, number).requires_grad_(backward)

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y = layer(x)
            return y.sum().backward() if backward else y

    return call


def _pool(regions: int, side: int) -> Callable[[], object]:
    layer, x = ROIAlign(side, 0.25, 0).eval(), _features(256, 200, 272)
    corners = torch.rand(regions, 2) * 500
    boxes = torch.cat([torch.zeros(regions, 1), corners, corners + 20 + 280 * corners / 500], 1)

    def call() -> object:
        with torch.no_grad():
            return layer(x, boxes)

    return call


def _deformable(*, backward: bool) -> Callable[[], object]:
    layer, x = DeformConv(256, 256, 3, padding=1), _features(256, 50, 68)
    offset = torch.randn(1, 18, 50, 68, requires_grad=backward)
    x.requires_grad_(backward)

    def call() -> object:
        with torch.set_grad_enabled(backward):
            y = layer(x, offset)
            return y.sum().backward() if backward else y

    return call


LAYERS: dict[str, Callable[[], Callable[[], object]]] = {
    "convolution 3x3, 256 channels, 200x272": lambda: _conv(256, 256, 200, 272),
    "convolution 3x3, 256 channels, 100x136": lambda: _conv(256, 256, 100, 136),
    "convolution 3x3, 256 channels, 25x34": lambda: _conv(256, 256, 25, 34),
    "convolution 3x3, 256 to 720 channels, 100x136": lambda: _conv(256, 720, 100, 136),
    "convolution 3x3, 128 channels, 50x68": lambda: _conv(128, 128, 50, 68),
    "convolution 3x3, 256 channels, 100 regions of 14x14": lambda: _conv(
        256, 256, 14, 14, number=100
    ),
    "convolution 3x3, 256 channels, 2 of 80x120, forward and backward": lambda: _conv(
        256, 256, 80, 120, number=2, backward=True
    ),
    "ROIAlign, 1,000 regions to 7x7, 256 channels, 200x272": lambda: _pool(1000, 7),
    "ROIAlign, 100 regions to 14x14, 256 channels, 200x272": lambda: _pool(100, 14),
    "deformable convolution 3x3, 256 channels, 50x68": lambda: _deformable(backward=False),
    "deformable convolution, forward and backward": lambda: _deformable(backward=True),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row per layer: milliseconds of both, and their ratio.

    Args:
        argv: Words of the command line; None takes those of this process.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only layers with one of these words")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reuse_freed_memory()  # as commands and predictors do
    print("layer | fast | torch | ratio")
    for name, build in LAYERS.items():
        if args.words and not any(word in name for word in args.words):
            continue
        call = build()
        with inference_context(call):  # convolutions keep their prepared weights
            fast, plain = _milliseconds(call, args.rounds)
        print(f"{name} | {fast:.3g} ms | {plain:.3g} ms | {plain / fast:.1f}", flush=True)


def _milliseconds(call: Callable[[], object], rounds: int) -> tuple[float, float]:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds + 1):
        for is_fast in (True, False):
            with cpu_kernels(is_fast):
                start = time.process_time()
                call()
            if number:  # the first round warms up
                seconds[is_fast].append(time.process_time() - start)
    fast, plain = (1000 * statistics.median(seconds[is_fast]) for is_fast in (True, False))
    return fast, plain


if __name__ == "__main__":
    main()
