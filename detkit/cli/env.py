"""`detkit env`: print versions, devices and environment variables, for a bug report."""

from collections.abc import Sequence

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.utils.env import collect_env_info


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    PARSERS["env"](prog).parse_args(argv)
    return run_command(lambda: print(collect_env_info()))
