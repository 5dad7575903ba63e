"""Measure the memory that `MODEL.RESNETS.CHECKPOINT_PER_STAGE` saves in R50-FPN, and its time.

    python benchmarks/checkpointing.py BN FrozenBN

Memory is what a forward pass leaves allocated for the backward pass, its outputs included; time is
that of both, the medians of rounds in which the two networks run in turn. They have the same
weights, and their gradients are compared.
"""

import argparse
import copy
import functools
import statistics
import sys
from collections.abc import Sequence

import torch
from backbones import add_options, image_asked_for, seconds_of
from tabulate import tabulate
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from detkit.cli.errors import run_command
from detkit.config import get_cfg
from detkit.modeling import Backbone, build_backbone

_STAGES = ["res2", "res3", "res4", "res5"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("norms", nargs="*", metavar="NORM", help="as in MODEL.RESNETS.NORM (default: BN FrozenBN)")
    add("--depth", type=int, default=50, help="of the ResNet (default: %(default)s)")
    add_options(parser, devices="auto, cpu, cuda")
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Measure with each norm, and print a table."""
    image = image_asked_for(args)
    rows = [_row(norm, args.depth, image, args.rounds) for norm in args.norms or ("BN", "FrozenBN")]
    headers = [
        "norm",
        "kept (MB)",
        "kept with checkpoints (MB)",
        "time with checkpoints",
        "same gradients",
    ]
    print(
        tabulate(rows, headers=headers, floatfmt=("", ".0f", ".0f", ".2f", ""), tablefmt="github")
    )


def _row(norm: str, depth: int, image: Tensor, rounds: int) -> list[object]:
    plain = _build(norm, depth, is_checkpointed=False, image=image)
    saving = _build(norm, depth, is_checkpointed=True, image=image)
    saving.load_state_dict(copy.deepcopy(plain.state_dict()))
    kept = [_kept_bytes(network, image) / 1e6 for network in (plain, saving)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for network, seconds in zip((plain, saving), times, strict=True):
            seconds.append(seconds_of(functools.partial(_step, network), image))
    gradients = zip(plain.parameters(), saving.parameters(), strict=True)
    is_same = all(_equal(a.grad, b.grad) for a, b in gradients)
    return [
        norm,
        *kept,
        statistics.median(times[1]) / statistics.median(times[0]),
        "yes" if is_same else "no",
    ]


def _build(norm: str, depth: int, *, is_checkpointed: bool, image: Tensor) -> Backbone:
    cfg = get_cfg()
    cfg.merge_from_list(
        ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0]
    )
    cfg.merge_from_list(["MODEL.FPN.IN_FEATURES", _STAGES, "MODEL.RESNETS.OUT_FEATURES", _STAGES])
    cfg.merge_from_list(["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.NORM", norm])
    cfg.merge_from_list(["MODEL.RESNETS.CHECKPOINT_PER_STAGE", [is_checkpointed] * len(_STAGES)])
    return build_backbone(cfg).to(memory_format=torch.channels_last).to(image.device).train()


def _kept_bytes(network: Backbone, image: Tensor) -> int:
    """Return the bytes that a forward pass allocates and does not free again."""
    if image.is_cuda:
        before = torch.cuda.memory_allocated(image.device)
        outputs = network(image)
        return torch.cuda.memory_allocated(image.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        outputs = network(image)
    del outputs  # held until here: what the profiler has seen freed does not count
    return sum(event.self_cpu_memory_usage for event in events.key_averages())


def _step(network: Backbone, image: Tensor) -> None:
    network.zero_grad()
    torch.stack([level.square().mean() for level in network(image).values()]).sum().backward()


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


if __name__ == "__main__":
    sys.exit(main())
