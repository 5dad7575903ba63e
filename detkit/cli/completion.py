"""`detkit completion`: print a script that completes commands, options, configs and settings.

It is written from the parsers and lists all words itself, so that the Tab key starts no Python.
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from detkit.cli.errors import run_command
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg
from detkit.model_zoo import list_configs

# Stand for the names of the packaged configs and of all settings, which the scripts hold once.
_CONFIGS, _KEYS = "$configs", "$keys"
# Arguments that take a config: `--config-file`, and those of `config show` and `config diff`.
_CONFIG_ARGUMENTS = ("config_file", "file", "a", "b")


class _Words(NamedTuple):
    """What may follow a command."""

    options: dict[str, str]
    """Each with its help."""
    values: dict[str, list[str]]
    """Of the options that take one; no words stand for any, such as a file."""
    words: list[str]


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Run the command and return its exit status; see `detkit.cli.command.main`."""
    return run_command(_run, PARSERS["completion"](prog).parse_args(argv))


def _run(args: argparse.Namespace) -> None:
    from detkit.cli.command import COMMANDS  # which names this command

    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[args.shell]
    print(write(COMMANDS))


def _words_after(command: str) -> _Words:
    found = _Words({}, {}, [])
    if command in PARSERS:
        _collect(PARSERS[command](f"detkit {command}"), found)
    return found._replace(words=list(dict.fromkeys(found.words)))


def _collect(parser: argparse.ArgumentParser, found: _Words) -> None:
    for action in parser._actions:
        choices = [str(choice) for choice in action.choices or ()]
        if action.dest in _CONFIG_ARGUMENTS:
            choices.append(_CONFIGS)
        for option in (o for o in action.option_strings if o.startswith("--")):
            # Expanded as in argparse's own help.
            found.options[option] = (action.help or "") % vars(action)
            if action.nargs != 0:
                found.values[option] = choices
        if not action.option_strings:
            found.words.extend(choices)
        if action.dest in ("opts", "keys"):
            found.words.append(_KEYS)
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _collect(below, found)


def _bash(commands: Mapping[str, str]) -> str:
    """Return the script for bash; where no word fits, it completes names of files."""
    cases = "\n".join(_bash_cases(commands))
    return f"""_detkit() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" words="" options=""
  local configs={shlex.quote(" ".join(list_configs()))}
  local keys={shlex.quote(" ".join(get_cfg().keys_of_leaves()))}
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[COMP_CWORD-1]}}" in
{cases}
  esac
  case "$COMP_CWORD $current" in
    '1 '*) words="{" ".join([*commands, "--help", "--version"])}" ;;
    *' -'*) words="$options" ;;
    *' ') words="${{words//$keys/}}" ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _detkit detkit"""


def _bash_cases(commands: Mapping[str, str]) -> Iterator[str]:
    for command in commands:
        options, values, words = _words_after(command)
        for option, choices in values.items():
            yield f"""    '{command} {option}') words="{" ".join(choices)}" ;;"""
        lists = " ".join(options), " ".join(words)
        yield f"""    '{command} '*) options="{lists[0]}" words="{lists[1]}" ;;"""


def _zsh(commands: Mapping[str, str]) -> str:
    """Return the script for zsh, which runs that for bash."""
    start = "autoload -U +X compinit bashcompinit && compinit && bashcompinit"
    return f"{start}\n{_bash(commands)}"


def _fish(commands: Mapping[str, str]) -> str:
    """Return the script for fish, which shows the help beside each word."""
    lines = [
        f"set -l configs {' '.join(list_configs())}",
        f"set -l keys {' '.join(get_cfg().keys_of_leaves())}",
    ]
    for command, text in commands.items():
        lines.append(f"complete -c detkit -n __fish_use_subcommand -a {command} -d {_quoted(text)}")
        options, values, words = _words_after(command)
        given = f"complete -c detkit -n '__fish_seen_subcommand_from {command}'"
        for option, help_text in options.items():
            line = f"{given} -l {option.removeprefix('--')} -d {_quoted(help_text)}"
            if option in values:
                line += " -r"
                line += f' -a "{" ".join(values[option])}"' if values[option] else ""
            lines.append(line)
        if words:
            lines.append(f'{given} -a "{" ".join(words)}"')
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Return a text in quotes for fish, which knows other escapes than `shlex` writes."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
