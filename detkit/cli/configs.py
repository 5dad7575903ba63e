"""`detkit configs`: list the configs that come with detkit."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.model_zoo import list_configs, published_weights
from detkit.utils.errors import UnknownNameError
from detkit.utils.file_io import packaged_configs
from detkit.utils.text import cut, did_you_mean

# How the first line of a config begins; common parts of others begin otherwise.
_HEAD = "# Reproduces: "
_COLUMNS = 120


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    return run_command(run, PARSERS["configs"](prog).parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Print a line per config; a star marks those with published weights."""
    heads = {name: _first_line(name) for name in list_configs()}
    described = {
        name: head.removeprefix(_HEAD).removeprefix("nothing published; ")
        for name, head in heads.items()
        if head.startswith(_HEAD)
    }
    chosen = [name for name in described if args.word.lower() in name.lower()]
    if not chosen:
        words = {part for name in described for part in Path(name).parts}
        raise UnknownNameError(
            f"no config has {args.word!r} in its name.{did_you_mean(args.word, words)}"
        )
    width = max(map(len, chosen))
    lines = []
    for name in chosen:
        star = "*" if published_weights(str(packaged_configs() / name)) else " "
        line = f"{name:<{width}} {star} {described[name]}"
        lines.append(cut(line, _COLUMNS))
    lines.append("")
    lines.append(
        "* has published weights: detkit predict --config-file NAME finds objects with them"
    )
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        # Python writes the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _first_line(name: str) -> str:
    with (packaged_configs() / name).open(encoding="utf-8") as file:
        return file.readline().strip().rstrip(".")
