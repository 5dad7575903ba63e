import subprocess
import sys
from pathlib import Path

import pytest

from detkit.cli import main
from detkit.cli.command import COMMANDS


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: detkit {command}" in capsys.readouterr().out


def test_benchmark_says_where_it_is_found_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("detkit.cli.command._BENCHMARKS", tmp_path)
    assert main(["benchmark", "--quick"]) == 2
    assert "python benchmarks/speed.py" in capsys.readouterr().err


def test_unknown_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["trian"])
    assert "'trian' (choose from" in capsys.readouterr().err


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_words_after_the_command_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "SOLVER.MAX_ITER", "2"])
    assert "detkit train: error: --config-file is needed" in capsys.readouterr().err


def test_help_does_not_load_torch() -> None:
    code = "import sys, detkit.cli; detkit.cli.command._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "detkit", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("detkit ")
