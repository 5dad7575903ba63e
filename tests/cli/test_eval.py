from pathlib import Path

import pytest

from detkit.cli import eval as eval_command
from detkit.cli import main


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list:
    """What would be run."""
    started = []
    monkeypatch.setattr(eval_command, "launch", lambda run, *_: started.append(_[-1][0]))
    return started


def test_weights_and_data_sets_become_settings_and_settings_win(run: list) -> None:
    words = [
        "--weights",
        "model.pth",
        "--dataset",
        "a_val",
        "--dataset",
        "b_val",
        "--num-gpus",
        "2",
    ]
    assert main(["eval", *words, "--config-file", "my.yaml", "SEED", "3"]) == 0
    (args,) = run
    assert (args.eval_only, args.resume, args.num_gpus) == (True, False, 2)
    assert args.config_file == "my.yaml"
    assert args.opts == [
        *("DATASETS.TEST", ("a_val", "b_val")),
        *("MODEL.WEIGHTS", "model.pth"),
        *("SEED", "3"),
    ]


def test_settings_of_weights_are_in_the_config_beside_them(run: list, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["eval", "--weights", str(tmp_path / "model.pth")]) == 0
    assert run[0].config_file == str(tmp_path / "config.yaml")


@pytest.mark.parametrize("words", [[], ["--weights", "nowhere/model.pth"]])
def test_without_any_config_it_says_what_is_needed(words: list[str], run: list, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", *words])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--config-file is needed" in line
    assert run == []
