import argparse
import re
import shlex

import pytest

from detkit.cli import main
from detkit.cli.command import COMMANDS
from detkit.cli.parsers import PARSERS
from detkit.config import get_cfg
from detkit.model_zoo import find_config

QUICK_START = "quick_start/faster_rcnn_R_18_FPN_shapes.yaml"
EXAMPLES = [
    (command, line.strip())
    for command, parser in PARSERS.items()
    for line in (parser(f"detkit {command}").epilog or "").splitlines()[1:]
]


def test_every_parser_is_that_of_a_command_and_has_an_example() -> None:
    assert set(PARSERS) <= set(COMMANDS)
    assert {command for command, _ in EXAMPLES} == set(PARSERS)


@pytest.mark.parametrize(("command", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_example_of_the_help_is_understood(command: str, line: str) -> None:
    program, name, *words = shlex.split(line.partition(" > ")[0])
    assert (program, name) == ("detkit", command)
    args = PARSERS[command](f"detkit {command}").parse_args(words)
    config = getattr(args, "config_file", "")
    cfg = get_cfg()
    if config and not config.startswith("output/quick_start/"):
        cfg.merge_from_file(find_config(config))
    cfg.merge_from_list(getattr(args, "opts", []))
    # What the other examples read, the first one has written.
    cfg.merge_from_file(find_config(QUICK_START))
    assert cfg.OUTPUT_DIR == "./output/quick_start"


@pytest.mark.parametrize(
    "line", [line for name, line in EXAMPLES if name in ("configs", "config", "completion", "env")]
)
def test_example_of_a_quick_command_works_as_printed(line: str, capsys) -> None:
    assert main(shlex.split(line.partition(" > ")[0])[1:]) == 0
    assert capsys.readouterr().out.count("\n") > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(["train", "--resum"], "--config-file is needed", id="shortened option"),
        pytest.param(["train", "--hlep"], "Did you mean '--help'?", id="misspelt option"),
        pytest.param(["show-batch", "--outptu=x", "--config-file", "x", "--output", "y"],
                     "unrecognized arguments: --outptu=x. Did you mean '--output'", id="with a value"),
        pytest.param(["convert-dataset", "a", "b", "--to", "yollo"], "Did you mean 'yolo'?", id="misspelt choice"),
        pytest.param(["config", "shwo"], "Did you mean 'show'?", id="misspelt action"),
        pytest.param(["show-batch", "-n", "x"], "invalid int value: 'x'", id="no number"),
        pytest.param(["show-batch"], "required: --config-file, --output", id="missing options"),
        pytest.param(["train", "--config-file", "x", "SEED", "1", "--resume"], "--resume must come before", id="misplaced"),
        pytest.param(["env", "a\nb\x1b[0m"], r"unrecognized arguments: a\nb\x1b[0m.", id="control characters"),
    ],
)  # fmt: skip
def test_mistake_on_the_command_line_is_one_line_that_says_where_to_look(
    words: list[str], message: str, capsys
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert re.search(r"detkit [\w-]+ --help lists the options$", line)


# What an option is stored as -> its spellings and what it takes.
SHARED = {
    "config_file": ({"--config-file"}, "FILE"),
    "output": ({"--output"}, "DIR"),
    "weights": ({"--weights", "--model"}, "FILE"),
    "model": ({"--weights", "--model"}, "FILE"),
    "max_images": ({"--max-images", "-n"}, "N"),
    "opts": (set(), "KEY VALUE"),
}


def test_options_of_one_meaning_have_one_name() -> None:
    found = set()
    for command, parser in PARSERS.items():
        for action in parser(None)._actions:
            is_positional = not action.option_strings and action.dest != "opts"
            if action.dest in SHARED and not is_positional:
                spelt = set(action.option_strings), action.metavar
                assert spelt == SHARED[action.dest], (command, action.dest)
                found.add(action.dest)
    assert found == set(SHARED)


def test_old_spellings_are_understood() -> None:
    parse = PARSERS["show-batch"](None).parse_args
    assert parse(["--config-file", "x", "-n", "3", "--output", "y"]).max_images == 3
    weights: argparse.Namespace = PARSERS["convert-weights"](None).parse_args(
        ["a", "b", "SEED", "1", "--config-file", "x"]
    )
    assert (weights.config_file, weights.opts) == ("x", ["SEED", "1"])
    assert PARSERS["train"](None).parse_args(["--config", "x", "--eval-only"]).eval_only


def test_formats_to_write_are_those_of_the_data_package() -> None:
    from detkit.data.datasets.formats.write import TARGETS

    (action,) = (a for a in PARSERS["convert-dataset"](None)._actions if a.dest == "to")
    assert action.choices == TARGETS


def test_kinds_to_save_are_those_that_can_be_written() -> None:
    from detkit.cli.prediction_files import FORMATS

    (action,) = (a for a in PARSERS["predict"](None)._actions if a.dest == "save")
    assert action.choices == ("pictures", *FORMATS)
