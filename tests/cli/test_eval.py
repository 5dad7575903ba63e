from pathlib import Path

import pytest
import torch

from detkit.cli import eval as eval_command
from detkit.cli import main, train


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


@pytest.mark.parametrize("is_inside", [True, False])
def test_settings_of_weights_are_in_them_or_beside_them(
    is_inside: bool, run: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "model.pth"
    torch.save(
        {"model": {"a": torch.zeros(1)}, **({"config": "SEED: 7"} if is_inside else {})}, weights
    )
    (tmp_path / "config.yaml").write_text(f"SEED: {8 if is_inside else 7}")
    assert main(["eval", "--weights", str(weights), "VIS_PERIOD", "5"]) == 0
    monkeypatch.setattr(train, "default_setup", lambda cfg, args: None)
    cfg = train.setup(run[0])
    assert Path(cfg.MODEL.WEIGHTS) == weights
    assert (cfg.SEED, cfg.VIS_PERIOD) == (7, 5)


def test_without_config_and_weights_it_says_what_is_needed(run: list, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "--weights are needed, which hold their config, or --config-file" in line
    assert run == []
