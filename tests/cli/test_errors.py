import errno
import io
import sys
from pathlib import Path

import pytest
import torch

from detkit.cli.errors import is_written_for_users, message_of, run_command
from detkit.config import get_cfg
from detkit.structures import Boxes
from detkit.utils.errors import DataError, MissingFileError, UserError
from detkit.utils.registry import Registry


def _unknown_name() -> None:
    Registry("BACKBONE").get("ResNet")


def _assertion_of_detkit() -> None:
    raise AssertionError("what our own code guarantees does not hold")


def _programmers_mistake() -> None:
    Boxes(torch.zeros(3))  # detkit raises, but no user's file or setting is the cause


def _bug_in_detkit() -> None:
    get_cfg().merge_from_list(5)  # pyright: ignore: len() of a number fails inside detkit, which raised nothing itself


def _error_of_the_users_module() -> None:
    raise ValueError("raised in a user's own module")


def _missing_file() -> None:
    Path("/nowhere/at_all.txt").read_bytes()


def _from_worker(kind: type[Exception], name: str, text: str) -> Exception:
    """What torch's data loader makes of an error in a worker."""
    return kind(
        "Caught BadImageError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f'  File "x.py", line 3, in f\n    raise error\n{name}: {text}\n'
    )


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        pytest.param(
            _unknown_name, "error: 'ResNet' is not registered as BACKBONE.", id="raised by detkit"
        ),
        pytest.param(
            _missing_file,
            "error: /nowhere/at_all.txt: No such file or directory",
            id="raised by the system",
        ),
        pytest.param(
            lambda: _raise(OSError(errno.ENOSPC, "No space left on device")),
            "error: a result could not be written: No space left on device",
            id="full disk, of which the system names no file",
        ),
        pytest.param(
            lambda: _raise(
                _from_worker(DataError, "detkit.utils.errors.DataError", "a.jpg is empty")
            ),
            "error: a.jpg is empty",
            id="raised by detkit in a worker",
        ),
        pytest.param(
            lambda: _raise(
                _from_worker(
                    MissingFileError,
                    "detkit.utils.errors.MissingFileError",
                    "image file b.jpg does not exist",
                )
            ),
            "error: image file b.jpg does not exist",
            id="file that detkit misses in a worker",
        ),
        pytest.param(
            lambda: _raise(
                _from_worker(
                    FileNotFoundError, "FileNotFoundError", "image file b.jpg does not exist"
                )
            ),
            "error: image file b.jpg does not exist",
            id="missing file in a worker",
        ),
    ],
)
def test_mistake_of_the_user_is_one_message(
    function, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(function) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.parametrize("variable", ["", "NO_COLOR"])
def test_error_is_red_on_a_terminal_unless_it_shall_not_be(variable, monkeypatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    run_command(_raise, DataError("a.jpg is empty"))
    head = "error:" if variable else "\x1b[31merror:\x1b[0m"
    assert screen.getvalue() == f"{head} a.jpg is empty\n"


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        pytest.param(_bug_in_detkit, TypeError, id="an operation failed in detkit"),
        pytest.param(_assertion_of_detkit, AssertionError, id="an assertion of detkit failed"),
        pytest.param(_programmers_mistake, (ValueError, TypeError), id="wrong call of a class"),
        pytest.param(_error_of_the_users_module, ValueError, id="raised elsewhere"),
        pytest.param(
            lambda: _raise(_from_worker(AssertionError, "AssertionError", "does not hold")),
            AssertionError,
            id="an assertion of detkit failed in a worker",
        ),
        pytest.param(
            lambda: _raise(
                _from_worker(ZeroDivisionError, "ZeroDivisionError", "division by zero")
            ),
            ZeroDivisionError,
            id="an operation failed in a worker",
        ),
    ],
)
def test_anything_else_keeps_its_traceback(function, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        run_command(function)


def test_command_refuses_values_that_code_of_a_project_might_know(capsys) -> None:
    setting = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosinLR"]
    assert run_command(lambda: get_cfg().merge_from_list(setting)) == 2
    assert "got 'WarmupCosinLR'. Did you mean 'WarmupCosineLR'" in capsys.readouterr().err
    get_cfg().merge_from_list(setting)


def test_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run_command(_unknown_name)


def test_interrupt_ends_with_its_own_status_and_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("result", "status"),
    [
        pytest.param(None, 0, id="nothing"),
        pytest.param({"AP": 1.0}, 0, id="results"),
        pytest.param(3, 3, id="number"),
    ],
)
def test_success_gives_the_status_of_the_function(result: object, status: int) -> None:
    assert run_command(lambda: result) == status


def test_arguments_are_passed_on() -> None:
    assert run_command(max, 3, 5) == 5


def test_message_of_a_key_error_has_no_quotes_around_it() -> None:
    assert message_of(KeyError("no such part")) == "no such part"


def test_only_errors_of_our_class_and_about_files_are_written_for_users() -> None:
    assert is_written_for_users(UserError("this setting is wrong"))
    assert is_written_for_users(FileNotFoundError(2, "No such file or directory", "a.jpg"))
    assert not is_written_for_users(ValueError("a bug"))
    assert not is_written_for_users(OSError("socket closed"))


def test_name_in_a_message_neither_begins_a_line_nor_acts_on_a_terminal(capsys) -> None:
    assert (
        run_command(_raise, DataError("cannot read a\nerror: \x1b[31mall is well\udcff.png")) == 2
    )
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: cannot read a"
    assert second == r"  error: \x1b[31mall is well\udcff.png"


def test_message_of_megabytes_is_cut(capsys):
    def fail() -> None:
        raise UserError("begin " + "x" * 10**6 + " end")

    assert run_command(fail) == 2
    said = capsys.readouterr().err
    assert len(said) < 5000
    assert said.startswith("error: begin x")
    assert "x [...] x" in said
    assert "x end\n" in said


@pytest.mark.parametrize(("name", "is_told"), [("größe.json", True), ("size.json", False)])
def test_locale_that_cannot_name_a_file_is_told(name, is_told, capsys, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    assert run_command(_raise, MissingFileError(f"{name} does not exist")) == 2
    assert ("PYTHONUTF8=1" in capsys.readouterr().err) == is_told
