"""What does not train, in both loops: parts that SOLVER.FREEZE names, and norms that are fixed at random."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from detkit.cli import train

TOOLS = Path(__file__).parents[2] / "tools"
FROZEN = ("backbone.bottom_up.res3.", "backbone.fpn_output2.", "proposal_generator.rpn_head.conv.")
SETTINGS = [
    *("SOLVER.FREEZE", "['bottom_up[.]res3', 'fpn_output2', 'rpn_head[.]conv[.]']"),
    *("SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TEST", "()"),
]


def _plain_loop(argv: list[str]) -> int:
    main = runpy.run_path(str(TOOLS / "plain_train_net.py"))["main"]
    sys.argv = ["plain_train_net.py", *argv]
    return main()


LOOPS = pytest.mark.parametrize(
    "loop", [train.main, _plain_loop], ids=["trainer", "loop written out"]
)


@LOOPS
def test_parts_that_are_named_do_not_change_in_five_steps(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, loop
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # put back afterwards
    assert loop(["--config-file", "tiny.yaml", *SETTINGS]) == 0
    first, last = (
        torch.load(workplace / "out" / f"{name}.pth", weights_only=True)["model"]
        for name in ("model_0000000", "model_final")
    )
    changed = {name for name in last if not torch.equal(first[name], last[name])}
    assert changed == {name for name in last if not name.startswith(FROZEN)}
    assert any(name.endswith("running_mean") for name in last if name.startswith(FROZEN))


@LOOPS
def test_frozen_norms_of_a_model_from_scratch_are_warned_about_once(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, loop
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    settings = ["MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()"]
    assert loop(["--config-file", "tiny.yaml", *settings]) == 0
    log = (workplace / "out" / "log.txt").read_text()
    assert (
        log.count(
            "FrozenBN layers (backbone.bottom_up.stem.conv1.norm, ...) are fixed as they were built"
        )
        == 1
    )
