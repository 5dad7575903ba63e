"""`detkit eval`: evaluate a checkpoint, as `detkit train --eval-only` does."""

from collections.abc import Sequence
from pathlib import Path

from detkit.cli import train
from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.engine import launch


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    parser = PARSERS["eval"](prog)
    args = parser.parse_args(argv)
    if not args.config_file:
        beside = Path(args.weights).expanduser().parent / "config.yaml"
        if not args.weights or not beside.is_file():
            parser.error(
                "--config-file is needed: a YAML file, or the name of a config that comes with"
                " detkit; only of weights with a config.yaml beside them it may be left out"
            )
        args.config_file = str(beside)
    if args.weights:
        args.opts = ["MODEL.WEIGHTS", args.weights, *args.opts]
    if args.dataset:
        args.opts = ["DATASETS.TEST", tuple(args.dataset), *args.opts]
    machines = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    return run_command(launch, train.run, *machines, (args,))
