"""Print a table of backbones: parameters, and the time of a forward pass relative to detkit's R-50.

    python benchmarks/backbones.py --threads 1 --rounds 5 --size 320 320

Both run in turn, round after round, on one image without gradients, with random weights; the ratio
is that of the medians. The backbone alone is timed, without a pyramid, with its maps of strides 4
to 32 as outputs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from tabulate import tabulate
from torch import Tensor

from detkit.cli.errors import run_command
from detkit.config import get_cfg
from detkit.engine import prepare
from detkit.modeling import Backbone, build_backbone
from detkit.utils.env import resolve_device
from detkit.utils.errors import ConfigError

_REFERENCE = "resnet:50"
_DEFAULT = (
    "resnet:18",
    "resnet:34",
    "resnet:101",
    "torchvision:resnet18",
    "torchvision:resnet34",
    "torchvision:resnet50",
    "torchvision:resnext50_32x4d",
    "torchvision:wide_resnet50_2",
    "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_large",
    "torchvision:efficientnet_b0",
    "torchvision:regnet_y_400mf",
    "torchvision:convnext_tiny",
    "torchvision:swin_t",
)
# What selects a backbone, by the word before the colon.
_KEYS = {
    "resnet": ("build_resnet_backbone", "MODEL.RESNETS.DEPTH"),
    "torchvision": ("build_torchvision_backbone", "MODEL.TORCHVISION.NAME"),
    "timm": ("build_timm_backbone", "MODEL.TIMM.NAME"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "names",
        nargs="*",
        metavar="resnet:DEPTH|torchvision:NAME|timm:NAME",
        help="which (default: those of README)",
    )
    add_options(parser, devices="auto, cpu, cuda, mps")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure the backbones asked for, and print them with the reference first."""
    image = image_asked_for(args)
    names = args.names or _DEFAULT
    unknown = [
        name for name in names if name.partition(":")[0] not in _KEYS or not name.partition(":")[2]
    ]
    if unknown:
        raise ConfigError(
            "a backbone is written resnet:DEPTH, torchvision:NAME or timm:NAME, got"
            f" {', '.join(unknown)}"
        )
    reference = _build(_REFERENCE, image.device)
    rows = [[_REFERENCE, _millions(reference), 1.0]]
    for name in names:
        backbone = _build(name, image.device)
        rows.append(
            [name, _millions(backbone), _relative_time(backbone, reference, image, args.rounds)]
        )
    headers = ["backbone", "parameters (millions)", "time relative to R-50"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".1f", ".2f"), tablefmt="github"))


def _build(name: str, device: torch.device) -> Backbone:
    library, _, model = name.partition(":")
    builder, key = _KEYS[library]
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", builder, key, model, "MODEL.BACKBONE.FREEZE_AT", 0])
    cfg.merge_from_list(["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]])
    cfg.merge_from_list(["MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False])
    prepare(cfg)
    return build_backbone(cfg).to(memory_format=torch.channels_last).to(device).eval()


def _millions(backbone: Backbone) -> float:
    return sum(parameter.numel() for parameter in backbone.parameters()) / 1e6


@torch.no_grad()
def _relative_time(backbone: Backbone, reference: Backbone, image: Tensor, rounds: int) -> float:
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(rounds + 1):
        for module, seconds in zip((backbone, reference), times, strict=True):
            elapsed = seconds_of(module, image)
            if index > 0:  # the first round warms up
                seconds.append(elapsed)
    return statistics.median(times[0]) / statistics.median(times[1])


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
    """Set the threads asked for, and return a random image (1, 3, height, width) on the device.

    Raises:
        ConfigError: An option is out of range.
    """
    if args.rounds < 1:
        raise ConfigError(f"--rounds must be at least 1, got {args.rounds}")
    if any(side < 32 or side % 32 for side in args.size):
        raise ConfigError(f"--size must be multiples of 32, got {args.size[0]} {args.size[1]}")
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


if __name__ == "__main__":
    sys.exit(main())
