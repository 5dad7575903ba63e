"""What the benchmarks of backbones share: options, the image that they ask for, and the clock."""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from detkit.utils.env import resolve_device


def add_options(parser: argparse.ArgumentParser, *, devices: str) -> None:
    """Add `--rounds`, `--size`, `--device` and `--threads`.

    Args:
        parser: Takes the options.
        devices: Those that the command works on, for its help.
    """
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="rounds that are counted (default: %(default)s)")
    add(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="(default: 480 640)",
    )
    add("--device", default="cpu", help=f"{devices} (default: %(default)s)")
    add("--threads", type=int, help="(default: torch's own choice)")


def image_asked_for(args: argparse.Namespace) -> Tensor:
    """Return a random image (1, 3, height, width) on the device, and have torch use as many threads as asked for.

    Raises:
        ValueError: An option is out of range.
    """
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    if any(side < 32 or side % 32 for side in args.size):
        raise ValueError(f"--size must be multiples of 32, got {args.size[0]} {args.size[1]}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    image = torch.rand(1, 3, *args.size, device=resolve_device(args.device))
    return image.to(memory_format=torch.channels_last)


def seconds_of(run: Callable[[Tensor], object], image: Tensor) -> float:
    """Return the time of a run over the image, until the device is done."""
    start = time.perf_counter()
    run(image)
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
