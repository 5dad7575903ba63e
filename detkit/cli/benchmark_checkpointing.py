"""Measure what `MODEL.RESNETS.CHECKPOINT_PER_STAGE` saves, and what it costs, in training steps of R50-FPN.

Memory is what a forward pass leaves allocated for the backward pass, its outputs included; time is that of both, the
medians of rounds in which the two networks run in turn. They have the same weights, and their gradients are compared.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from detkit.cli.errors import run_command
from detkit.config import get_cfg
from detkit.modeling import Backbone, build_backbone
from detkit.utils.env import resolve_device

_STAGES = ["res2", "res3", "res4", "res5"]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and give its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("norms", nargs="*", metavar="NORM", help="as in MODEL.RESNETS.NORM (default: BN FrozenBN)")
    add("--depth", type=int, default=50, help="of the ResNet (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that are counted (default: %(default)s)")
    add("--size", type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"), help="(default: 480 640)")
    add("--device", default="cpu", help="auto, cpu, cuda (default: %(default)s)")
    add("--threads", type=int, help="(default: torch's own choice)")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure with each norm, and print a table."""
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    if any(side < 32 or side % 32 for side in args.size):
        raise ValueError(f"--size must be multiples of 32, got {args.size[0]} {args.size[1]}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    image = torch.rand(1, 3, *args.size, device=device).to(memory_format=torch.channels_last)
    rows = [_row(norm, args.depth, image, args.rounds) for norm in args.norms or ("BN", "FrozenBN")]
    headers = ["norm", "kept (MB)", "kept with checkpoints (MB)", "time with checkpoints", "same gradients"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".0f", ".0f", ".2f", ""), tablefmt="github"))


def _row(norm: str, depth: int, image: Tensor, rounds: int) -> list[object]:
    plain = _build(norm, depth, is_checkpointed=False, image=image)
    saving = _build(norm, depth, is_checkpointed=True, image=image)
    saving.load_state_dict(copy.deepcopy(plain.state_dict()))
    kept = [_kept_bytes(network, image) / 1e6 for network in (plain, saving)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for network, seconds in zip((plain, saving), times, strict=True):
            seconds.append(_seconds(network, image))
    gradients = zip(plain.parameters(), saving.parameters(), strict=True)
    is_same = all(a.grad is None or torch.equal(a.grad, b.grad) for a, b in gradients)  # type: ignore[arg-type]
    return [norm, *kept, statistics.median(times[1]) / statistics.median(times[0]), "yes" if is_same else "no"]


def _build(norm: str, depth: int, *, is_checkpointed: bool, image: Tensor) -> Backbone:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0])
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", _STAGES, "MODEL.RESNETS.OUT_FEATURES", _STAGES])
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm])
    cfg.merge_from_list(["MODEL.RESNETS.CHECKPOINT_PER_STAGE", [is_checkpointed] * len(_STAGES)])
    return build_backbone(cfg).to(memory_format=torch.channels_last).to(image.device).train()


def _kept_bytes(network: Backbone, image: Tensor) -> int:
    """Give the bytes that a forward pass allocates and does not free again."""
    if image.is_cuda:
        before = torch.cuda.memory_allocated(image.device)
        outputs = network(image)
        return torch.cuda.memory_allocated(image.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        outputs = network(image)
    del outputs  # held until here: what the profiler has seen freed does not count
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


def _seconds(network: Backbone, image: Tensor) -> float:
    network.zero_grad()
    start = time.perf_counter()
    sum(level.square().mean() for level in network(image).values()).backward()  # type: ignore[union-attr]
    if image.is_cuda:
        torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
