import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import detkit
from detkit.cli import main
from detkit.cli.command import COMMANDS
from detkit.config import get_cfg
from detkit.model_zoo import list_configs


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
    assert main(["trian"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no command 'trian'. Did you mean 'train'? detkit --help")


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "COMMAND" in capsys.readouterr().err


def test_words_after_the_command_reach_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "SOLVER.MAX_ITER", "2"])
    assert "error: --config-file is needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["train", "--outptu"],
        ["configs"],
        ["config", "show", "mask_rcnn_R_50_FPN_1x"],
        ["completion", "bash"],
    ],
    ids=" ".join,
)
def test_what_computes_nothing_does_not_load_torch(words: list[str]) -> None:
    code = (
        "import sys, detkit.cli\n"
        f"try: detkit.cli.main({words!r})\n"
        "finally: assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "AssertionError" not in done.stderr
    assert done.stdout or "error" in done.stderr


def test_garbage_collector_leaves_out_what_a_command_imports() -> None:
    code = (
        "import gc, detkit.cli\n"
        "detkit.cli.main(['configs', 'no such'])\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_garbage_collector_of_a_program_is_left_alone() -> None:
    frozen = gc.get_freeze_count()
    main(["configs", "own_data"])
    assert (gc.get_freeze_count(), gc.isenabled()) == (frozen, True)


def test_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "detkit", "--version"], check=True, capture_output=True, text=True
    )
    assert done.stdout.startswith("detkit ")


def test_configs_are_listed_with_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    names = [line.split()[0] for line in lines if ".yaml" in line]
    assert names == [name for name in list_configs() if "Base-" not in name]
    (line,) = [
        line for line in lines if line.startswith("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    ]
    assert line.split()[1] == "*"


def test_configs_with_a_word_are_those_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "own_data"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if ".yaml" in line] == [
        "own_data/faster_rcnn.yaml",
        "own_data/faster_rcnn_small.yaml",
        "own_data/mask_rcnn.yaml",
        "own_data/rotated_faster_rcnn.yaml",
    ]
    assert main(["configs", "own_dta"]) == 2
    assert "Did you mean 'own_data'" in capsys.readouterr().err


def test_reader_of_the_list_may_stop_early(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["configs"]) == 0


def test_config_explains_a_key_and_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "explain", "SOLVER.NUM_DECAYS", "EARLY_STOP"]) == 0
    text = capsys.readouterr().out
    assert "SOLVER.NUM_DECAYS = 3\nNumber of decays" in text
    assert "EARLY_STOP.PATIENCE" in text
    assert main(["config", "explain", "SOLVER.BASE_LRR"]) == 2
    assert "SOLVER.BASE_LR" in capsys.readouterr().err


def test_config_shows_all_settings_or_those_that_are_not_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("SEED: 3\nSOLVER: {BASE_LR: 0.001, STEPS: [5]}\nMODEL: {CUSTOM: {WIDTH: 8}}\n")
    assert main(["config", "show", str(file)]) == 0
    whole = get_cfg()
    (tmp_path / "whole.yaml").write_text(capsys.readouterr().out)
    whole.merge_from_file(str(tmp_path / "whole.yaml"))
    assert (whole.SEED, whole.MODEL.CUSTOM.WIDTH, whole.SOLVER.STEPS) == (3, 8, (5,))
    assert main(["config", "show", "--changed", str(file)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {
        "MODEL": {"CUSTOM": {"WIDTH": 8}},
        "SEED": 3,
        "SOLVER": {"STEPS": [5]},  # the learning rate is the default
    }


def test_config_diff_names_what_differs_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "diff", "mask_rcnn_R_50_FPN_1x", "faster_rcnn_R_50_FPN_1x"]) == 2
    assert "several packaged configs" in capsys.readouterr().err
    assert main(["config", "diff", "retinanet_R_50_FPN_1x", "retinanet_R_50_FPN_3x"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "SOLVER.MAX_ITER: 90000 -> 270000",
        "SOLVER.STEPS: (60000, 80000) -> (210000, 250000)",
    ]
    assert main(["config", "diff", "retinanet_R_50_FPN_1x", "retinanet_R_50_FPN_1x"]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_env_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in text
    assert f"{detkit.__version__} in " in text
