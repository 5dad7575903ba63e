"""Parsing of command lines: errors of one line, and the arguments that commands share.

Nothing here imports torch, which takes seconds to load: help and mistakes are shown at once.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from detkit.config.user_modules import add_no_imports
from detkit.utils.logger import error_head
from detkit.utils.text import did_you_mean, printable

_EXAMPLES = """\
examples:
  one GPU, or the CPU:
    {0} --config-file config.yaml MODEL.WEIGHTS model.pth SOLVER.BASE_LR 0.001
  8 GPUs of one machine:
    {0} --num-gpus 8 --config-file config.yaml
    torchrun --nproc_per_node=8 {0} --config-file config.yaml
  two machines, with RANK 0 on the first and 1 on the second:
    {0} --num-gpus 8 --num-machines 2 --machine-rank RANK \\
        --dist-url tcp://ADDRESS_OF_MACHINE_0:29500 --config-file config.yaml
"""


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, with the nearest name and where to look."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**settings)

    def error(self, message: str) -> NoReturn:
        hint = ""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            hint = did_you_mean(match[1].partition("=")[0], self._option_string_actions)
        elif match := re.match(r"argument (.+): invalid choice: '(.*?)' \(choose from", message):
            named = (a for a in self._actions if match[1] in (*a.option_strings, a.dest, a.metavar))
            hint = did_you_mean(match[2], [str(c) for a in named for c in a.choices or ()])
        text = f"{printable(message)}.{hint} {self.prog} --help lists the options"
        self.exit(2, f"{error_head(sys.stderr)} {text}\n")


def add_config_arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, settings: str
) -> None:
    """Add `--config-file`, `--no-imports`, and settings at the end of the command line.

    Args:
        parser: Gets `config_file` ("" where it may be left out) and `opts`.
        required: Whether there must be a config.
        settings: Help on the settings.
    """
    config_help = "YAML file, or the name of a config that comes with detkit"
    parser.add_argument(
        "--config-file", default="", required=required, metavar="FILE", help=config_help
    )
    add_no_imports(parser)
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        action=_Settings,
        default=[],
        metavar="KEY VALUE",
        help=settings,
    )


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the number of processes and machines, which `launch` takes."""
    add = parser.add_argument
    gpus_help = "processes on this machine, one per GPU (default: 1)"
    add("--num-gpus", type=int, default=1, metavar="N", help=gpus_help)
    add("--num-machines", type=int, default=1, metavar="N", help="machines (default: 1)")
    rank_help = "number of this machine, from 0"
    add("--machine-rank", type=int, default=0, metavar="N", help=rank_help)
    url_help = "where process 0 listens (default: a free port of this machine)"
    add("--dist-url", default="auto", metavar="URL", help=url_help)


def default_argument_parser(epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a training script's command line.

    Args:
        epilog: Text below the help; None shows examples.

    Example:
        >>> args = default_argument_parser().parse_args(["--num-gpus", "2", "SOLVER.MAX_ITER", "9"])
        >>> args.num_gpus, args.opts
        (2, ['SOLVER.MAX_ITER', '9'])
    """
    parser = Parser(epilog=_EXAMPLES.format(Path(sys.argv[0]).name) if epilog is None else epilog)
    settings = "settings that win over the file, at the end of the command line"
    add_config_arguments(parser, required=False, settings=settings)
    add = parser.add_argument
    resume_help = "continue from the last checkpoint in OUTPUT_DIR, where there is one"
    add("--resume", action="store_true", help=resume_help)
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, do not train")
    partial_help = "evaluate weights that do not fill every tensor of the model"
    add("--allow-partial", action="store_true", help=partial_help)
    add_machine_arguments(parser)
    return parser


class _Settings(argparse.Action):
    """Store the settings at the end of the command line, and refuse an option among them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        words = [str(word) for word in values or []]
        misplaced = [word for word in words if word.startswith("--")]
        if misplaced:
            parser.error(
                f"{misplaced[0]} must come before the settings KEY VALUE, which end the command"
                " line"
            )
        setattr(namespace, self.dest, words)
