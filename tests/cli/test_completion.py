import shutil
import subprocess

import pytest

from detkit.cli import main
from detkit.cli.command import COMMANDS


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("bash") is None:
        pytest.skip("needs bash")
    done = subprocess.run(
        ["python", "-m", "detkit", "completion", "bash"], check=True, capture_output=True, text=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param(["ev"], ["eval"], id="command"),
        pytest.param([""], [*COMMANDS, "--help", "--version"], id="any command"),
        pytest.param(["train", "--res"], ["--resume"], id="option"),
        pytest.param(["train", "--config-file", "quick_start/mask_rcnn_v"],
                     ["quick_start/mask_rcnn_vit_tiny_shapes.yaml"], id="config"),
        pytest.param(["eval", "--weights", "quick_start/fas"], [], id="file that is no config"),
        pytest.param(["eval", "--weights", "S"], [], id="value that is no setting"),
        pytest.param(["config", "diff", "x", "quick_start/fas"],
                     ["quick_start/faster_rcnn_R_18_FPN_shapes.yaml"], id="second config"),
        pytest.param(["convert-dataset", "a", "b", "--to", ""], ["coco", "voc", "yolo"], id="choice"),
        pytest.param(["train", "SOLVER.NESTE"], ["SOLVER.NESTEROV"], id="setting"),
        pytest.param(["train", "SEED", ""], [], id="value of a setting"),
        pytest.param(["config", "expl"], ["explain"], id="action"),
        pytest.param(["config", "explain", "VIS_PER"], ["VIS_PERIOD"], id="key to explain"),
    ],
)  # fmt: skip
def test_bash_completes(script: str, words: list[str], found: list[str]) -> None:
    line = " ".join(f'"{word}"' for word in ["detkit", *words])
    code = f'COMP_WORDS=({line}); COMP_CWORD={len(words)}; _detkit; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{code}"], check=True, capture_output=True, text=True
    )
    assert (done.stdout.split(), done.stderr) == (found, "")


def test_fish_gets_a_line_per_option_with_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "fish"]) == 0
    lines = capsys.readouterr().out.splitlines()
    given = "complete -c detkit -n '__fish_seen_subcommand_from convert-weights'"
    assert f"{given} -l config-file -d 'compare with this model, and write only what it takes'" in [
        line.partition(" -r")[0] for line in lines
    ]
    assert all(line.count("'") % 2 == 0 for line in lines if "\\'" not in line)


def test_zsh_runs_the_script_for_bash(capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    bash = capsys.readouterr().out
    main(["completion", "zsh"])
    zsh = capsys.readouterr().out
    assert zsh.endswith(bash)
    assert "bashcompinit" in zsh.splitlines()[0]
