"""`detkit config explain KEY`: show the meaning, default and legal values of settings."""

import argparse
from collections.abc import Sequence

from detkit.cli.errors import run_command
from detkit.config import explain


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: Words of the command line; None takes those of this process.
        prog: Name of the command in its help.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    parser.add_argument("action", choices=["explain"])
    key_help = "a setting, such as SOLVER.BASE_LR, or a group of them, such as SOLVER"
    parser.add_argument("keys", nargs="+", metavar="KEY", help=key_help)
    return run_command(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Print what there is to say of each key."""
    print("\n\n".join(map(explain, args.keys)))
